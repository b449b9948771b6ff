"""Configs of the kernel that merges a part of attention onto what is there.

Their string form: `w8`, eight warps.
"""

from dataclasses import dataclass
from typing import ClassVar

from numflash.configs.letters import number
from numflash.configs.traits import Traits
from numflash.configs.warps import WarpsConfig

_VECTOR_BYTES = 16


@dataclass(frozen=True)
class MergeOntoConfig(WarpsConfig):
    """Neighbouring threads of a warp share a row."""

    num_warps: int = number("w", 8, always=True)

    implementation: ClassVar = "merging"
    family: ClassVar = "merge-onto"
    example: ClassVar = "w8"

    def lanes(self, traits: Traits) -> int:
        """Threads that share a row: a power of two, so that no row is in two warps."""
        columns = _VECTOR_BYTES // traits.dtype_bytes if traits.vectorized else 1
        threads = -(-traits.head_dim_v // columns)
        return min(32, 1 << (threads - 1).bit_length())

    def rows(self, traits: Traits) -> int:
        """Rows that one block computes."""
        return self.num_threads // self.lanes(traits)


MERGING_CONFIGS: dict[str, type] = {MergeOntoConfig.family: MergeOntoConfig}
"""Kernel family -> its config class."""
