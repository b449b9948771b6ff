"""Configs of the kernels that make block masks: tiles of a function, and lists of tiles.

Their string form: `w4`. A warp has a block of the mask, or a list.
"""

from dataclasses import dataclass
from typing import ClassVar

from numflash.configs.letters import Lettered, number
from numflash.configs.traits import Traits


@dataclass(frozen=True)
class _ByWarp(Lettered):
    """Common to all: each warp has something by itself."""

    num_warps: int = number("w", 4, always=True)

    implementation: ClassVar = "block-mask"
    example: ClassVar = "w4"

    def __post_init__(self):
        if not 0 < self.num_warps <= 32:
            raise ValueError(
                f"num_warps of {type(self).__name__} must be 1 to 32, got {self.num_warps}"
            )

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Blocks or lists that one thread block makes."""
        return self.num_warps

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits: it always can."""
        return None

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: none."""
        return 0


@dataclass(frozen=True)
class MaskTilesConfig(_ByWarp):
    """Each warp asks a function about all queries and keys of one block."""

    family: ClassVar = "mask-tiles"


@dataclass(frozen=True)
class MaskScatterConfig(_ByWarp):
    """Each warp marks the blocks of one row of FlexAttention's lists."""

    family: ClassVar = "mask-scatter"


@dataclass(frozen=True)
class MaskListsConfig(_ByWarp):
    """Each warp lists the blocks of one row, or of one column."""

    family: ClassVar = "mask-lists"


BLOCK_MASK_CONFIGS: dict[str, type] = {
    config.family: config for config in (MaskTilesConfig, MaskScatterConfig, MaskListsConfig)
}
"""Kernel family -> its config class."""
