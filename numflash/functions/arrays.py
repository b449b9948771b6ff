"""What a program reads: the arrays and numbers of `aux`."""

from dataclasses import dataclass

MAX_RANK = 8
DTYPES = {
    "float16": "f",
    "bfloat16": "f",
    "float32": "f",
    "int32": "i",
    "int64": "i",
    "uint8": "i",
    "bool": "b",
}
"""dtype of an array of `aux` -> type of its elements in a kernel; int64 is cut to 32 bits."""
PAIR_BYTES = {"float16": 4, "bfloat16": 4, "float32": 8, "int32": 8, "uint8": 2, "bool": 2}
"""dtype of an array of which two neighbours may be read at once -> the bytes of both."""
NUMBERS = {"f32": "f", "i32": "i"}
"""Kind of a number of `aux` -> type."""


@dataclass(frozen=True)
class Array:
    """An array of `aux`.

    Attributes:
        dtype: a name in `DTYPES`.
        rank: its number of axes.
        unit: elements of the last axis are neighbours; else its stride is an argument.
        paired: all that is read with an even last index has an even offset, and the address is a
            multiple of 16 bytes, so that it and its neighbour can be read at once.
    """

    dtype: str
    rank: int
    unit: bool = False
    paired: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise TypeError(f"arrays of aux must be of {', '.join(DTYPES)}, got {self.dtype}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"arrays of aux have up to {MAX_RANK} axes, got {self.rank}")
        if self.unit and not self.rank:
            raise ValueError("an array without axes has no neighbours")
        if self.paired and not (self.unit and self.dtype in PAIR_BYTES):
            raise ValueError(f"elements of {self.dtype} cannot be read by pairs")

    @property
    def type(self) -> str:
        """Type of its elements in a kernel."""
        return DTYPES[self.dtype]

    def __str__(self):
        return f"{self.dtype}[{self.rank}{'p' if self.paired else 'u' if self.unit else ''}]"


@dataclass(frozen=True)
class Number:
    """A number of `aux` that may change from call to call; `kind` is "f32" or "i32"."""

    kind: str

    def __post_init__(self):
        if self.kind not in NUMBERS:
            raise TypeError(f"numbers of aux are f32 or i32, got {self.kind!r}")

    @property
    def type(self) -> str:
        """Type in a kernel."""
        return NUMBERS[self.kind]

    def __str__(self):
        return self.kind
