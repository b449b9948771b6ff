"""Traits: the properties that a kernel is compiled for, fixed by the problem."""

import re
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote, unquote

from numflash.configs.features import BY_NAME, rows_of
from numflash.functions.nodes import is_const
from numflash.functions.program import Program

HEAD_DIM_STEP = 32
MAX_HEAD_DIM = 256
FP8_STEP = 64
"""Codes of 8-bit floats are stored with head dims padded to a multiple of this."""
DTYPES = ("float16", "bfloat16", "float32")
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that kernels compute with: the next multiple of 32."""
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


def padded_fp8_head_dim(head_dim: int) -> int:
    """The head_dim that codes of 8-bit floats are stored with: the next multiple of 64."""
    return -(-head_dim // FP8_STEP) * FP8_STEP


def rows_in_turn(head_dim: int, head_dim_v: int) -> int:
    """Rows of the heads whose blocks take turns where each owns rows of its own: 8 MiB of 16 bits.

    Args:
        head_dim, head_dim_v: padded.
    """
    return 2**22 // (head_dim + head_dim_v)


@dataclass(frozen=True)
class Asked:
    """Properties of a problem that kernels are chosen by, besides its traits.

    Attributes:
        rows: of the output per head; tiles of twice as many and more would mostly idle.
        positive_scale: whether softmax_scale is above 0.
        no_bulk_copies: why bulk copies cannot fetch and store the problem's tensors, or its rows
            do not fit warpgroups; None if they can.
    """

    rows: int = 2**30
    positive_scale: bool = True
    no_bulk_copies: str | None = None


@dataclass(frozen=True)
class Traits:
    """Properties of a problem that a kernel is compiled for.

    Attributes:
        dtype: "float16", "bfloat16" or "float32".
        head_dim, head_dim_v: padded to a multiple of 32.
        features: names of those that are compiled in, of `configs.features`, in its order.
        vectorized: rows are 16-byte aligned, so that 16 bytes are loaded at once.
        tf32: float32 is multiplied as tf32, on the tensor cores.
        fp8: q, k and v are e4m3 codes, with head dims padded to a multiple of 64; dtype is that
            of the result.
        key_scales: with fp8, scales of K and V may differ within a tile.
        selected: only the heads that a table on the device names are computed.
        blocks: queries and keys of a block of the block mask; () without one.
        ragged: sequences have lengths of their own, and a list on the device says which tiles
            there are (`kernels.sequences.schedule`).
        paged: with ragged, K and V lie in pages of a cache, which a table on the device names.
        codes: K and V are e4m3 codes in memory, with a scale for each sequence and head; q is not.
        dlse: of the kernel of delta: lse has a gradient of its own.
        given_delta: of the kernel of delta: the product of dO and O is the caller's.
        plain_delta: of the kernel of delta: it also leaves delta unscaled.
        float32_out: results, gradients among them, are float32 where q, k and v have fewer bits;
            of the kernel of delta: O is.
        program: the text of the caller's functions (`functions.program.Program`); "" without.
        read: of kernels for the gradient of an array that the program reads: the number of its
            read among `Program.partials`, as text; "" of other kernels.
        absolute: of the kernel that sums the gradients of a read by rows: their absolute values.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...] = ()
    vectorized: bool = True
    tf32: bool = False
    fp8: bool = False
    key_scales: bool = False
    selected: bool = False
    blocks: tuple[int, int] | tuple[()] = ()
    ragged: bool = False
    paged: bool = False
    codes: bool = False
    dlse: bool = False
    given_delta: bool = False
    plain_delta: bool = False
    float32_out: bool = False
    program: str = ""
    read: str = ""
    absolute: bool = False

    _FLAGS: ClassVar = {
        "vectorized": "vec",
        "tf32": "tf32",
        "fp8": "fp8",
        "key_scales": "keyscales",
        "selected": "selected",
        "ragged": "ragged",
        "paged": "paged",
        "codes": "codes",
        "dlse": "dlse",
        "given_delta": "delta",
        "plain_delta": "plain",
        "float32_out": "out32",
        "absolute": "absolute",
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

        unknown = [name for name in self.features if name not in BY_NAME]
        if unknown:
            raise ValueError(f"features must be of {', '.join(BY_NAME)}, got {', '.join(unknown)}")
        in_order = tuple(name for name in BY_NAME if name in self.features)
        object.__setattr__(self, "features", in_order)
        if self.tf32 and self.dtype != "float32":
            raise ValueError(f"tf32 is a way to multiply float32, not {self.dtype}")
        if self.fp8 and (
            self.dtype == "float32" or self.head_dim % FP8_STEP or self.head_dim_v % FP8_STEP
        ):
            raise ValueError(
                f"kernels for fp8 have results of 16 bits and head dims that are multiples of "
                f"{FP8_STEP}, got {self.dtype}, {self.head_dim} and {self.head_dim_v}"
            )
        if self.float32_out and self.dtype == "float32":
            raise ValueError(
                "results of float32 are float32 anyhow: float32_out goes with 16 bits"
            )
        if self.ragged and self.fp8:
            raise ValueError("kernels for fp8 know one length for all sequences: without ragged")
        if self.paged and not self.ragged:
            raise ValueError("pages go with sequences that have lengths of their own: ragged")
        if self.codes and (self.fp8 or self.dtype == "float32"):
            raise ValueError(
                f"codes of K and V go with q and products of 16 bits, got "
                f"{'fp8' if self.fp8 else self.dtype}"
            )
        if self.key_scales and not self.fp8:
            raise ValueError("scales of keys go with fp8")
        if self.blocks and (len(self.blocks) != 2 or min(self.blocks) <= 0):
            raise ValueError(
                f"blocks must be () or numbers of queries and keys above 0, got {self.blocks}"
            )
        # Raises ValueError where the text is none.
        program = Program.parse(self.program)
        if self.read and self.read not in map(str, range(len(program.partials))):
            raise ValueError(
                f"read must be the number of one of the program's {len(program.partials)} reads "
                f"that scores change with, got {self.read!r}"
            )

    @property
    def out_dtype(self) -> str:
        """The dtype of results."""
        return "float32" if self.float32_out else self.dtype

    @property
    def program_scores(self) -> bool:
        """Whether the program maps scores to other scores."""
        return bool(self.program) and Program.parse(self.program).score is not None

    @property
    def program_bends(self) -> bool:
        """Whether the derivative of the program's score function is not 1.

        That by the score, or with `read` that by the element.
        """
        if self.read:
            return not is_const(Program.parse(self.program).partials[int(self.read)].slope, 1)
        return bool(self.program) and Program.parse(self.program).bends

    @property
    def dtype_of_read(self) -> str:
        """The dtype of the gradient of the array that `read` is of; float32 without."""
        if not self.read or self.float32_out:
            return "float32"
        program = Program.parse(self.program)
        return program.aux[program.partials[int(self.read)].aux].dtype

    @property
    def program_indexes(self) -> frozenset[str]:
        """Which of "i" and "j" the program indexes arrays by."""
        return Program.parse(self.program).indexes if self.program else frozenset()

    @property
    def keeps_scores(self) -> bool:
        """Whether the program hides keys from queries."""
        return bool(self.program) and Program.parse(self.program).keep is not None

    @property
    def shapes_scores(self) -> bool:
        """Whether a feature or the program maps scores to other scores."""
        of_features = any(row.hook == "score" for row in rows_of(self.features))
        return of_features or self.program_scores

    @property
    def has_functions(self) -> bool:
        """Whether anything happens to scores between their product and the band's edges."""
        return self.shapes_scores or self.keeps_scores

    @property
    def bends_scores(self) -> bool:
        """Whether scores have a derivative that the backward must keep."""
        if self.read:
            return self.program_bends
        return any(row.bends for row in rows_of(self.features)) or self.program_bends

    @property
    def drops_weights(self) -> bool:
        """Whether a feature weighs P once a row has its sum."""
        return any(row.hook == "weigh" for row in rows_of(self.features))

    @property
    def of_a_head(self) -> str | None:
        """The heads' own values that forbid packing them; None if they can be packed."""
        if self.program and Program.parse(self.program).uses & {"h", "i"}:
            return "a function of queries"
        return next((row.of_a_head for row in rows_of(self.features) if row.of_a_head), None)

    def torn(self, tile_m: int, tile_n: int) -> str | None:
        """Why tiles of queries and keys do not fit the blocks of the block mask, or None."""
        if not self.blocks:
            return None
        for what, tile, block in zip(
            ("queries", "keys"), (tile_m, tile_n), self.blocks, strict=True
        ):
            if block % tile:
                return f"its tiles of {tile} {what} do not divide block_mask's blocks of {block}"
        return None

    @property
    def rows_in_turn(self) -> int:
        """Rows of the heads whose blocks take turns, as the function of this name says."""
        return rows_in_turn(self.head_dim, self.head_dim_v)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in global memory."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def operand_bytes(self) -> int:
        """Bytes of one element of k and v in global memory."""
        return 1 if self.fp8 or self.codes else self.dtype_bytes

    def __str__(self) -> str:
        flags = [short for name, short in self._FLAGS.items() if getattr(self, name)]
        if self.blocks:
            flags.append(f"blocks{self.blocks[0]}x{self.blocks[1]}")
        if self.read:
            flags.append(f"read{self.read}")
        sizes = f"d{self.head_dim}", f"dv{self.head_dim_v}"
        program = [f"program:{_quoted(self.program)}"] if self.program else []
        return "-".join([self.dtype, *sizes, *self.features, *flags, *program])

    @classmethod
    def parse(cls, text: str) -> "Traits":
        """The inverse of `str`. Raises ValueError for anything else."""
        pattern = r"(\w+)-d(\d+)-dv(\d+)((?:-\w+)*)(?:-program:(\S+))?"
        match = re.fullmatch(pattern, text, re.ASCII)
        if match is not None:
            words = match[4].split("-")
            flags = {name: short in words for name, short in cls._FLAGS.items()}
            features = tuple(name for name in BY_NAME if name in words)
            found = re.search(r"-blocks([1-9]\d*)x([1-9]\d*)", match[4], re.ASCII)
            flags["blocks"] = (int(found[1]), int(found[2])) if found else ()
            found = re.search(r"-read(\d+)", match[4], re.ASCII)
            flags["read"] = found[1] if found else ""
            program = unquote(match[5] or "")
            sizes = int(match[2]), int(match[3])
            traits = cls(match[1], *sizes, features, **flags, program=program)
            if str(traits) == text:
                return traits
        raise ValueError(f"traits must look like float16-d64-dv64-softcap-vec, got {text!r}")


def _quoted(program: str) -> str:
    """A program without spaces and dashes, which separate traits from others."""
    return quote(program, safe="()[],.:;=+*<>").replace("-", "%2D")
