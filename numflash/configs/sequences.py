"""Configs of the kernels around attention over sequences with lengths of their own.

Their string forms: `w8`, eight warps, of the kernel that lists tiles, with `-splits` where the
work of tiles is split; `w4h4` of those that rotate rows, with `-interleaved` where the pairs
are neighbours and `-narrow` where the tables are of the dtype of the rows instead of float32.
"""

from dataclasses import dataclass
from typing import ClassVar

from numflash.configs.letters import Lettered, number, switch
from numflash.configs.traits import Traits
from numflash.configs.warps import expect_warps

BINS = 1024
"""Tiles are sorted by their work up to this many tiles of the other side, less one."""
_WORD_BYTES = 4
# Pairs of columns that a thread turns at once where rows are aligned: two 16-byte accesses.
_PAIR_BYTES = 32
_MAX_HEADS = 8


@dataclass(frozen=True)
class ScheduleConfig(Lettered):
    """A block makes one list: each warp counts and places a share of its records.

    Attributes:
        num_warps: per block. Each has a counter for each amount of work in shared memory, so that
            16 and more do not fit every GPU.
        splits: whether tiles of much work have several records.
    """

    num_warps: int = number("w", 8, always=True)
    splits: bool = switch("splits")

    implementation: ClassVar = "sequences"
    family: ClassVar = "schedule"
    example: ClassVar = "w8"
    block_rows: ClassVar = 1

    def __post_init__(self):
        if self.num_warps & (self.num_warps - 1) or not 0 < self.num_warps <= 32:
            raise ValueError(
                f"num_warps of {type(self).__name__} must be a power of two from 1 to 32, got "
                f"{self.num_warps}"
            )

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits: it always can."""
        return None

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: a warp's counters, and a sum of 64 bits."""
        return _WORD_BYTES * self.num_warps * (BINS + 2)


@dataclass(frozen=True)
class RotaryConfig(Lettered):
    """A thread has a part of a row in several heads, which share their angles.

    Attributes:
        num_warps: per block.
        num_heads: heads of a token that a thread has.
        interleaved: pairs are neighbouring columns, not columns half of rotary_dim apart.
        narrow: the tables have the dtype of the rows; otherwise they are float32.
    """

    num_warps: int = number("w", 4, always=True)
    num_heads: int = number("h", 4, always=True)
    interleaved: bool = switch("interleaved")
    narrow: bool = switch("narrow")

    implementation: ClassVar = "sequences"
    family: ClassVar = "rotary"
    example: ClassVar = "w4h4"

    def __post_init__(self):
        expect_warps(self)
        if not 0 < self.num_heads <= _MAX_HEADS:
            raise ValueError(
                f"num_heads of {type(self).__name__} must be 1 to {_MAX_HEADS}, got "
                f"{self.num_heads}"
            )

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    def lanes(self, traits: Traits) -> int:
        """Neighbouring threads that share a row."""
        return traits.head_dim * traits.dtype_bytes // _PAIR_BYTES

    def tokens(self, traits: Traits) -> int:
        """Tokens of which a block has `num_heads` heads."""
        return self.num_threads // self.lanes(traits)

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits; None if it can."""
        if self.tokens(traits) == 0:
            return f"a row of head_dim {traits.head_dim} needs {self.lanes(traits)} threads"
        if self.narrow and traits.dtype == "float32":
            return "tables of float32 are the dtype of rows of float32 anyhow"
        return None

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: none."""
        return 0


@dataclass(frozen=True)
class PrepareConfig(RotaryConfig):
    """The first block makes a list, as `ScheduleConfig` says, the others append rows to a cache.

    Attributes:
        num_warps, num_heads, interleaved, narrow: as `RotaryConfig` has them.
        splits: as `ScheduleConfig` has it.
    """

    num_warps: int = number("w", 8, always=True)
    splits: bool = switch("splits")

    family: ClassVar = "prepare"
    example: ClassVar = "w8h4"

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: those of the list."""
        return ScheduleConfig(self.num_warps).smem_bytes(traits)


SEQUENCE_CONFIGS: dict[str, type] = {
    config.family: config for config in (ScheduleConfig, RotaryConfig, PrepareConfig)
}
"""Kernel family -> its config class."""
