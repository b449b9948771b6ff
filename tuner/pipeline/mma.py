"""What the kernels on `mma.sync` share: a block whose warps do the same, and copies by threads.

Where copies are asynchronous they form groups; otherwise a tile is there as soon as it is asked
for, and nothing is waited for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from numflash.configs import MmaConfig, Traits

from .steps import Arrived, Commit, Copy, Load, Step, Sync

WARPS, BLOCK = "warps", "block"
"""The role of all warps of a block, and the barrier at which they meet."""


@dataclass(frozen=True)
class Copies:
    """How a block copies.

    Attributes:
        asynchronous: by `cp.async`; otherwise through registers.
    """

    asynchronous: bool

    def begin(self, name: str, buffer: int, tile: int) -> Iterator[Step]:
        """A tile to a buffer."""
        yield (Copy if self.asynchronous else Load)(name, buffer, tile)

    def commit(self) -> Iterator[Step]:
        """A group of the copies since the last one."""
        if self.asynchronous:
            yield Commit()

    def arrive(self, pending: int) -> Iterator[Step]:
        """Wait until at most `pending` groups are under way."""
        if self.asynchronous:
            yield Arrived(pending)


def copies_of(config: MmaConfig, traits: Traits) -> Copies:
    """How the kernel of a config copies."""
    if traits.fp8:
        # Codes that are multiplied as float16 are converted on their way.
        return Copies(config.multiplies_codes)
    return Copies(config.generation != "sm75" and traits.vectorized)


def tile_arrives(copies: Copies, stages: int) -> Iterator[Step]:
    """All have read the tile before; with more than one stage the next one is there."""
    if stages > 1:
        yield from copies.arrive(max(0, stages - 2))
    yield Sync(BLOCK)


def only_tile_arrives(copies: Copies, stages: int) -> Iterator[Step]:
    """With one stage: the tile that was just asked for is there."""
    if stages == 1:
        yield from copies.arrive(0)
        yield Sync(BLOCK)
