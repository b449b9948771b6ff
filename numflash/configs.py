"""Kernel configs: what a kernel is compiled for, and what may be tuned about it.

`Traits` is fixed by the problem: dtype, head dims, and which features the kernel has. A config
(`ForwardConfig`, `BackwardDkDvConfig`, `BackwardDqConfig`, `DeltaConfig`) is a free choice among
equally right ones: tile sizes and warps. Both have a short string form, used in file names, test
ids and on the command line: `float16-d64-dv64-softcap-vec` and `m64n32w4`.

Everything here is plain arithmetic; nothing imports Numba.
"""

import re
from dataclasses import dataclass, fields
from typing import ClassVar

FLOAT_BYTES = 4
HEAD_DIM_STEP = 32
MAX_HEAD_DIM = 256
DTYPES = ("float16", "bfloat16", "float32")
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that kernels compute with: the next multiple of 32."""
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


@dataclass(frozen=True)
class Traits:
    """What a kernel is compiled for.

    Attributes:
        dtype: "float16", "bfloat16" or "float32".
        head_dim, head_dim_v: padded to a multiple of 32.
        softcap, alibi: the feature is compiled in.
        vectorized: rows are 16-byte aligned, so that 16 bytes are loaded at once.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    softcap: bool = False
    alibi: bool = False
    vectorized: bool = True

    _FLAGS: ClassVar = {
        "softcap": "softcap",
        "alibi": "alibi",
        "vectorized": "vec",
    }

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % HEAD_DIM_STEP or not 0 < value <= MAX_HEAD_DIM:
                raise ValueError(
                    f"{name} of a kernel must be a multiple of {HEAD_DIM_STEP} up to "
                    f"{MAX_HEAD_DIM}, got {value}"
                )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in global memory."""
        return _DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        flags = [short for name, short in self._FLAGS.items() if getattr(self, name)]
        return "-".join([self.dtype, f"d{self.head_dim}", f"dv{self.head_dim_v}", *flags])

    @classmethod
    def parse(cls, text: str) -> "Traits":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\w+)-d(\d+)-dv(\d+)((?:-\w+)*)", text, re.ASCII)
        if match is not None:
            flags = {name: short in match[4].split("-") for name, short in cls._FLAGS.items()}
            traits = cls(match[1], int(match[2]), int(match[3]), **flags)
            if str(traits) == text:
                return traits
        raise ValueError(f"traits must look like float16-d64-dv64-softcap-vec, got {text!r}")


class SmemLayout:
    """Where the float32 tiles of a block lie in its shared memory.

    A pitch is the distance between rows, in floats. Rows of `head_dim` floats are padded by 4;
    rows of scores, a multiple of 8, to an odd multiple of 8. This spreads the lanes of
    `tiles.lanes` over all banks.
    """

    def __init__(self, **shapes: tuple[int, int]):
        self.pitches: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        end = 0
        for name, (rows, columns) in shapes.items():
            self.offsets[name] = end
            self.pitches[name] = columns | 8 if name == "p" else columns + 4
            end += rows * self.pitches[name]
        self.smem_bytes = end * FLOAT_BYTES


@dataclass(frozen=True)
class _Tiled:
    """Common to the tiled kernels: tile sizes and warps. Which of them is the row tile differs."""

    tile_m: int
    tile_n: int
    num_warps: int

    family: ClassVar[str]
    _row_tile: ClassVar[str] = "tile_m"

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"{field.name} of {type(self).__name__} must be positive, "
                    f"got {getattr(self, field.name)}"
                )
        rows, columns = self.row_tile, self.column_tile
        if rows % (4 * self.num_warps) or columns % 8:
            raise ValueError(
                f"{type(self).__name__} {self}: the row tile ({self._row_tile} = {rows}) must be "
                f"a multiple of 4 x num_warps and the other tile ({columns}) of 8"
            )
        if self.num_threads > 1024:
            raise ValueError(f"{type(self).__name__} {self}: a block has at most 32 warps")

    @property
    def row_tile(self) -> int:
        """The tile whose rows are shared out over the warps."""
        return getattr(self, self._row_tile)

    @property
    def column_tile(self) -> int:
        """The tile that the main loop walks in."""
        return self.tile_n if self._row_tile == "tile_m" else self.tile_m

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Rows of the output that one block computes."""
        return self.row_tile

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        raise NotImplementedError

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block."""
        return self.smem_layout(traits).smem_bytes

    def __str__(self) -> str:
        return f"m{self.tile_m}n{self.tile_n}w{self.num_warps}"

    @classmethod
    def parse(cls, text: str) -> "_Tiled":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = re.fullmatch(r"m([1-9]\d*)n([1-9]\d*)w([1-9]\d*)", text, re.ASCII)
        if match is None:
            raise ValueError(f"a {cls.family} config must look like m64n32w4, got {text!r}")
        return cls(*map(int, match.groups()))


@dataclass(frozen=True)
class ForwardConfig(_Tiled):
    """A block computes tile_m rows of O; K and V come in tiles of tile_n."""

    family: ClassVar = "forward"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            q=(self.tile_m, traits.head_dim),
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            p=(self.tile_m, self.tile_n),
        )


@dataclass(frozen=True)
class BackwardDqConfig(_Tiled):
    """A block computes tile_m rows of dQ; K and V come in tiles of tile_n."""

    family: ClassVar = "backward-dq"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            q=(self.tile_m, traits.head_dim),
            do=(self.tile_m, traits.head_dim_v),
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            p=(self.tile_m, self.tile_n),
        )


@dataclass(frozen=True)
class BackwardDkDvConfig(_Tiled):
    """A block computes tile_n rows of dK and dV; Q and dO come in tiles of tile_m."""

    family: ClassVar = "backward-dkdv"
    _row_tile: ClassVar = "tile_n"

    def smem_layout(self, traits: Traits) -> SmemLayout:
        """The shared-memory tiles of a kernel with these traits."""
        return SmemLayout(
            k=(self.tile_n, traits.head_dim),
            v=(self.tile_n, traits.head_dim_v),
            q=(self.tile_m, traits.head_dim),
            do=(self.tile_m, traits.head_dim_v),
            p=(self.tile_n, self.tile_m),
        )


@dataclass(frozen=True)
class DeltaConfig:
    """A block computes delta = rowsum(O * dO) for one row a warp."""

    num_warps: int = 8

    family: ClassVar = "delta"

    def __post_init__(self):
        if not 0 < self.num_warps <= 32:
            raise ValueError(f"num_warps of DeltaConfig must be 1 to 32, got {self.num_warps}")

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Rows that one block computes."""
        return self.num_warps

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: none."""
        return 0

    def __str__(self) -> str:
        return f"w{self.num_warps}"

    @classmethod
    def parse(cls, text: str) -> "DeltaConfig":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = re.fullmatch(r"w([1-9]\d*)", text, re.ASCII)
        if match is None:
            raise ValueError(f"a {cls.family} config must look like w8, got {text!r}")
        return cls(int(match[1]))


Config = ForwardConfig | BackwardDkDvConfig | BackwardDqConfig | DeltaConfig
FAMILIES: dict[str, type] = {
    config.family: config
    for config in (ForwardConfig, BackwardDkDvConfig, BackwardDqConfig, DeltaConfig)
}
"""Kernel family -> its config class."""

# Preferred first. The first that the rows fill, whose registers fit the head dims and whose shared
# memory fits the device is the default.
_PREFERENCES = {
    "forward": ("m64n64w4", "m64n32w4", "m32n32w4", "m32n16w4", "m16n16w4"),
    "backward-dq": ("m64n32w4", "m32n32w4", "m32n16w4", "m16n16w4", "m16n8w4"),
    "backward-dkdv": ("m32n64w4", "m32n32w4", "m16n32w4", "m16n16w4", "m8n16w4"),
    "delta": ("w8",),
}
# float32 accumulators a thread can hold next to its operands without spilling.
_MAX_ACCUMULATORS = 112


def accumulators_per_thread(config: Config, traits: Traits) -> int:
    """float32 accumulators that one thread of a tiled kernel keeps through the main loop."""
    if isinstance(config, DeltaConfig):
        return 1
    rows = config.row_tile // (4 * config.num_warps)
    scores = rows * config.column_tile // 8
    columns, columns_v = traits.head_dim // 8, traits.head_dim_v // 8
    if isinstance(config, ForwardConfig):
        return scores + rows * columns_v
    if isinstance(config, BackwardDqConfig):
        return 2 * scores + rows * columns
    return 2 * scores + rows * (columns + columns_v)


def default_config(family: str, traits: Traits, max_smem_bytes: int, rows: int = 2**30) -> Config:
    """The config to use where nothing better is known.

    Args:
        family: "forward", "backward-dkdv", "backward-dq" or "delta".
        traits: what the kernel is compiled for.
        max_smem_bytes: shared memory that one block of the device can have.
        rows: rows of the output per head; tiles of twice as many and more would mostly idle.

    Raises:
        ValueError: the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernel family must be one of {', '.join(FAMILIES)}, got {family!r}")
    configs = [FAMILIES[family].parse(text) for text in _PREFERENCES[family]]
    for config in configs:
        fits = config.smem_bytes(traits) <= max_smem_bytes
        is_filled = config.block_rows < 2 * rows
        if fits and is_filled and accumulators_per_thread(config, traits) <= _MAX_ACCUMULATORS:
            return config
    return configs[-1]
