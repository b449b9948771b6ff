"""Configs of the kernels that quantise to 8-bit floats, find maxima for it, and go back.

Their string forms: `sm89-t128w8` for blocks of 128 tokens and 8 warps, `w8` and `sm89-w8`.
Appended to the first are `-hadamard` where rows are rotated, `-transposed` where tokens become
innermost, `-token` or `-given` for scales of single tokens or from an array, `-codes` where the
source is codes already, `-measure` where only the maximum is wanted, `-statistics`, and `-e5m2`;
to the last `-hadamard`, `-transposed` and `-e5m2`.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from numflash.configs.formats import FORMATS
from numflash.configs.letters import Lettered, chosen, number, switch, word
from numflash.configs.mma_rules import too_new
from numflash.configs.traits import Asked, Traits
from numflash.configs.warps import WarpsConfig, expect_warps
from numflash.runtime.devices import Architecture

GENERATIONS = ("sm75", "sm80", "sm89")
"""Generations of instructions: sm89 has some for conversions from and to 8-bit floats."""
SCALES = ("block", "token", "given")
"""The maximum behind a scale: of the thread block's tokens, of one token, or from an array."""
COLUMNS = 8
"""Neighbouring elements that a thread loads at once; 16 of codes."""
MAX_BLOCK_TOKENS = 256
_MAX_ELEMENTS = 2**15
_MAX_THREADS = 512
_TOKEN_STEP = 16
_WORD_BYTES = 4


def _expect_generation(config) -> None:
    if config.generation not in GENERATIONS:
        raise ValueError(
            f"{type(config).__name__} must begin with one of {', '.join(GENERATIONS)}, "
            f"got {config.generation!r}"
        )
    if config.format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {config.format!r}")


@dataclass(frozen=True)
class _Threads(Lettered):
    """Common to those whose threads share rows."""

    implementation: ClassVar = "fp8"

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        return None


@dataclass(frozen=True)
class QuantizeConfig(_Threads):
    """A block quantises block_tokens tokens of one head.

    Attributes:
        generation: of instructions.
        block_tokens: tokens that one block owns; with scale "block" they share a scale.
        num_warps: per block.
        hadamard: rows are rotated first.
        transposed: codes are stored with the tokens innermost.
        scale: "block", "token" or "given".
        codes: the source is codes, which are only laid out again.
        measure: the block's maximum is the only result.
        statistics: sums of squares and of squared errors are another result.
        format: "e4m3" or "e5m2".
    """

    generation: str = word(r"sm\d+", "-")
    block_tokens: int = number("t")
    num_warps: int = number("w")
    hadamard: bool = switch("hadamard")
    transposed: bool = switch("transposed")
    scale: str = chosen({"block": "", "token": "-token", "given": "-given"}, "block")
    codes: bool = switch("codes")
    measure: bool = switch("measure")
    statistics: bool = switch("statistics")
    format: str = chosen({"e4m3": "", "e5m2": "-e5m2"}, "e4m3")

    family: ClassVar = "quantize"
    example: ClassVar = "sm89-t128w8"

    def __post_init__(self):
        _expect_generation(self)
        expect_warps(self)
        tokens = self.block_tokens
        if tokens & (tokens - 1) or not _TOKEN_STEP <= tokens <= MAX_BLOCK_TOKENS:
            raise ValueError(
                f"block_tokens must be a power of two from {_TOKEN_STEP} to {MAX_BLOCK_TOKENS}, "
                f"got {tokens}"
            )
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        plain = self.scale == "block" and not self.statistics
        if self.codes and (self.hadamard or self.measure or not plain):
            raise ValueError(f"{self}: codes are laid out again, and nothing else")
        if self.measure and (self.transposed or not plain):
            raise ValueError(f"{self}: a maximum has no layout, scale or statistics")

    @property
    def block_rows(self) -> int:
        """Tokens that one block owns."""
        return self.block_tokens

    @property
    def columns(self) -> int:
        """Neighbouring elements that a thread loads at once."""
        return 2 * COLUMNS if self.codes else COLUMNS

    def lanes(self, traits: Traits) -> int:
        """Neighbouring threads that share a row."""
        if self.codes or not self.transposed:
            return 4
        return 16 if traits.head_dim == 256 else 8

    def rows_per_thread(self, traits: Traits) -> int:
        """Rows of which a thread has a part; 0 if they do not come out even."""
        rows, odd = divmod(self.block_tokens * self.lanes(traits), self.num_threads)
        return 0 if odd else rows

    def elements_per_thread(self, traits: Traits) -> int:
        """Elements that a thread keeps in registers."""
        return self.block_tokens * traits.head_dim // self.num_threads

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        rows = self.rows_per_thread(traits)
        if traits.head_dim % 64:
            return f"codes have head dims that are multiples of 64, not {traits.head_dim}"
        if rows == 0 or (self.transposed and rows % 4):
            step = 4 if self.transposed else 1
            return f"its threads do not have multiples of {step} rows"
        if self.transposed and self.num_threads // self.lanes(traits) % 4:
            return "its threads do not cover groups of 16 tokens"
        if self.block_tokens * traits.head_dim > _MAX_ELEMENTS and not self.codes:
            return f"its blocks can own {_MAX_ELEMENTS} elements at most"
        return None

    def tile_words(self, traits: Traits) -> int:
        """Shared words in which codes change places; see `tiles.quantize.transposition`."""
        if not self.transposed:
            return 0
        columns = traits.head_dim
        # Eight groups of 16 tokens reach over all banks, fewer need a gap after eight columns.
        if self.block_tokens < 8 * _TOKEN_STEP:
            columns += columns // 8
        return columns * self.block_tokens // _WORD_BYTES

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: the tile, and three floats a warp."""
        return _WORD_BYTES * (self.tile_words(traits) + 3 * self.num_warps)


@dataclass(frozen=True)
class AmaxConfig(WarpsConfig):
    """A block finds the largest of a group of values."""

    num_warps: int = number("w", 1, always=True)

    implementation: ClassVar = "fp8"
    family: ClassVar = "amax"
    example: ClassVar = "w8"
    block_rows: ClassVar = 1

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: a float a warp."""
        return _WORD_BYTES * self.num_warps


@dataclass(frozen=True)
class EstimateConfig(AmaxConfig):
    """A block estimates the error that 8 bits make for one key-value head."""

    family: ClassVar = "estimate"


@dataclass(frozen=True)
class DequantizeConfig(_Threads):
    """Four threads compute a row of numbers from its codes.

    Attributes:
        generation: of instructions.
        num_warps: per block.
        hadamard: rows are rotated back.
        transposed: codes have the tokens innermost.
        format: "e4m3" or "e5m2".
    """

    generation: str = word(r"sm\d+", "-")
    num_warps: int = number("w", 4, always=True)
    hadamard: bool = switch("hadamard")
    transposed: bool = switch("transposed")
    format: str = chosen({"e4m3": "", "e5m2": "-e5m2"}, "e4m3")

    family: ClassVar = "dequantize"
    example: ClassVar = "sm89-w4"
    lanes: ClassVar = 4

    def __post_init__(self):
        _expect_generation(self)
        expect_warps(self)

    @property
    def block_rows(self) -> int:
        """Tokens that one block owns."""
        return self.num_threads // self.lanes

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: none."""
        return 0


QUANTIZE_CONFIGS: dict[str, type] = {
    config.family: config
    for config in (QuantizeConfig, AmaxConfig, EstimateConfig, DequantizeConfig)
}
"""Kernel family -> its config class."""


def cannot_run(config, traits: Traits, limits: Architecture, asked: Asked) -> str | None:
    """Why a config cannot run on a GPU with these traits; None if it can."""
    generation = getattr(config, "generation", GENERATIONS[0])
    return too_new(generation, limits) or config.misfit(traits)


@cache
def quantize_config(
    generation: str,
    head_dim: int,
    block: int | None = None,
    *,
    transposed: bool = False,
    codes: bool = False,
    **options,
) -> QuantizeConfig | None:
    """The config that is used for a padded head_dim.

    Args:
        generation: of the GPU.
        head_dim: padded to a multiple of 64.
        block: tokens that one thread block must own, because they share a scale; None if any.
        transposed, codes, options: as `QuantizeConfig` has them.

    Returns:
        A config that fits every GPU; None if a thread block cannot own `block` tokens.
    """
    tokens = block or (128 if head_dim <= 128 else 64)
    if tokens > MAX_BLOCK_TOKENS or tokens * head_dim > _MAX_ELEMENTS:
        return None
    probe = QuantizeConfig(generation, tokens, 1, transposed=transposed, codes=codes, **options)
    traits = Traits("float16", head_dim, head_dim)
    # Few elements a thread, so that many warps hide each other's waits, but enough that what is
    # done once is little; four rows where codes change places.
    elements = head_dim // probe.lanes(traits) * (4 if transposed else 1)
    fewest = 48 if options.get("hadamard") else 32
    while elements < max(fewest, tokens * head_dim // _MAX_THREADS):
        elements *= 2
    warps = max(1, tokens * head_dim // elements // 32)
    return QuantizeConfig(generation, tokens, warps, transposed=transposed, codes=codes, **options)
