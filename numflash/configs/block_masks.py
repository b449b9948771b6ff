"""Configs of the kernels that make block masks: tiles of a function, and lists of tiles.

Their string form: `w4`. A warp has a block of the mask, or a list.
"""

from dataclasses import dataclass
from typing import ClassVar

from numflash.configs.letters import number
from numflash.configs.warps import WarpsConfig


@dataclass(frozen=True)
class _ByWarp(WarpsConfig):
    """Common to all."""

    num_warps: int = number("w", 4, always=True)

    implementation: ClassVar = "block-mask"
    example: ClassVar = "w4"


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
