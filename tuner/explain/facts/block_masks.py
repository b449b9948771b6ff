"""Tiles of a launch that a block mask leaves."""

import numpy as np

from numflash.selection.layout import EMPTY, Launch, Places, tiles_seen

from ...model import Kept


def tiles_of_lists(found: Places, launch: Launch, kept: Kept, num_heads_q: int) -> np.ndarray:
    """Of each place the tiles of blocks that are not empty; rows of `kept` are those of places.

    Splits share these evenly; of heads that repeat each has its own list.
    """
    tiling, blocks = launch.tiling, (kept.kinds != EMPTY).astype(np.int64)
    per_block = kept.size[1] // tiling.column_tile
    before = np.pad(blocks.cumsum(-1), [(0, 0)] * 3 + [(1, 0)])
    blocks = np.pad(blocks, [(0, 0)] * 3 + [(0, 1)])
    row = found.start // tiling.pack // kept.size[0]
    seen = tiles_seen(tiling)
    begin, end = (each[found.start // tiling.row_tile] for each in (seen.begin, seen.end))
    total = np.zeros(len(found), np.int64)
    for repeat in range(found.repeats):
        batch, head = np.divmod(found.head + repeat, num_heads_q)
        where = np.minimum(batch, len(blocks) - 1), np.minimum(head, blocks.shape[1] - 1), row
        for tile, sign in ((end, 1), (begin, -1)):
            block, part = np.divmod(tile, per_block)
            total += sign * (before[*where, block] * per_block + blocks[*where, block] * part)
    if launch.splits == 1 or launch.order != "in bundles":
        return total
    share = -(-total // launch.splits)
    return np.clip(total - found.split * share, 0, share)
