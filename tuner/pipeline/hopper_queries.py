"""The warps of a Hopper block that owns keys which fetch tiles of queries.

The order is that of `numflash.kernels.wgmma.queries`.
"""

from collections.abc import Iterator

from .steps import Claim, Fetch, Fill, Step, Walk


def produce(walk: Walk, stages: int) -> Iterator[Step]:
    """K and V, which come once, and then Q and dO tile by tile."""
    if walk.tiles:
        yield Fetch("OWNED", 0, 0)
    for tile in range(walk.tiles):
        for channel in ("Q", "DO"):
            yield Claim(channel, tile % stages)
            yield Fetch(channel, tile % stages, tile)


def assist(walk: Walk, stages: int) -> Iterator[Step]:
    """lse and delta of each tile."""
    for tile in range(walk.tiles):
        yield Claim("ROWS", tile % stages)
        yield Fill("ROWS", tile % stages, tile, "statistics")
