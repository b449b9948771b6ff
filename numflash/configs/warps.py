"""Configs of one letter: the warps of a block.

Their string form: `w8`. The kernels have rows, blocks or elements, and no tiles.
"""

from dataclasses import dataclass

from numflash.configs.letters import Lettered, number
from numflash.configs.traits import Traits


def expect_warps(config) -> None:
    """Raise ValueError if no block has a config's `num_warps`."""
    if not 0 < config.num_warps <= 32:
        raise ValueError(
            f"num_warps of {type(config).__name__} must be 1 to 32, got {config.num_warps}"
        )


@dataclass(frozen=True)
class WarpsConfig(Lettered):
    """Common to all: each warp has something by itself."""

    num_warps: int = number("w")

    def __post_init__(self):
        expect_warps(self)

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def block_rows(self) -> int:
        """Rows, or whatever a warp has, that one block computes."""
        return self.num_warps

    def misfit(self, traits: Traits) -> str | None:
        """Why it cannot be built for these traits: it always can."""
        return None

    def smem_bytes(self, traits: Traits) -> int:
        """Bytes of dynamic shared memory per block: none."""
        return 0
