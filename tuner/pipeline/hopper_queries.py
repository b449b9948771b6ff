"""The warps of a Hopper block for gradients that fetch: what it owns, and tiles of the other side.

The order is that of `numflash.kernels.wgmma.queries`; a block that owns queries fetches alike.
"""

from collections.abc import Iterator

from .steps import Claim, Fetch, Fill, Step, Walk


def produce(walk: Walk, stages: int, walked: tuple[str, str] = ("Q", "DO")) -> Iterator[Step]:
    """What the block owns, which comes once, and then the two channels tile by tile."""
    if walk.tiles:
        yield Fetch("OWNED", 0, 0)
    for tile in range(walk.tiles):
        for channel in walked:
            yield Claim(channel, tile % stages)
            yield Fetch(channel, tile % stages, tile)


def assist(walk: Walk, stages: int) -> Iterator[Step]:
    """lse and delta of each tile."""
    for tile in range(walk.tiles):
        yield Claim("ROWS", tile % stages)
        yield Fill("ROWS", tile % stages, tile, "statistics")
