"""A block mask on the host, and the tiles that it leaves."""

from typing import NamedTuple

import numpy as np

from numflash.api.block_masks import FULL, PARTIAL, BlockMask, own
from numflash.selection.layout import EDGE, EMPTY, WHOLE, Launch, Places, Tiling, tiles_seen

from ..asked import Asked


class Blocks(NamedTuple):
    """A block mask on the host: EMPTY, EDGE or WHOLE of (batch, heads, rows, columns) of blocks.

    Rows, and the first of its sizes, are of the side that blocks of the kernel own.
    """

    kinds: np.ndarray
    size: tuple[int, int]


def block_mask(asked: Asked, by_keys: bool) -> Blocks | None:
    """The block mask of the call; None where it may not be read."""
    mask = own(asked.question.options.get("block_mask"))
    if not asked.question.data or not isinstance(mask, BlockMask):
        return None
    tiles = mask.tiles()
    kinds = np.select([tiles == FULL, tiles == PARTIAL], [WHOLE, EDGE], EMPTY).astype(np.uint8)
    size = mask.block_size
    return Blocks(kinds.swapaxes(2, 3), size[::-1]) if by_keys else Blocks(kinds, size)


def with_blocks(tiling: Tiling, blocks: Blocks) -> np.ndarray:
    """Kinds of the first head's tiles, where both the band and the block mask have a say."""
    seen, n = tiles_seen(tiling), np.arange(tiling.column_tiles)
    begin, end, whole_begin, whole_end = (each[:, None] for each in seen)
    of_band = ((n >= begin) & (n < end)).astype(np.uint8)
    of_band += (n >= whole_begin) & (n < whole_end)
    row = np.arange(tiling.row_tiles) * tiling.row_tile // tiling.pack // blocks.size[0]
    column = n * tiling.column_tile // blocks.size[1]
    return np.minimum(of_band, blocks.kinds[0, 0][row[:, None], column])


def tiles_of_lists(found: Places, launch: Launch, blocks: Blocks, num_heads_q: int) -> np.ndarray:
    """Of each place the tiles of blocks that are not empty.

    Splits share these evenly; of heads that repeat each has its own list.
    """
    tiling, kept = launch.tiling, (blocks.kinds != EMPTY).astype(np.int64)
    per_block = blocks.size[1] // tiling.column_tile
    before = np.pad(kept.cumsum(-1), [(0, 0)] * 3 + [(1, 0)])
    kept = np.pad(kept, [(0, 0)] * 3 + [(0, 1)])
    row = found.start // tiling.pack // blocks.size[0]
    seen = tiles_seen(tiling)
    begin, end = (each[found.start // tiling.row_tile] for each in (seen.begin, seen.end))
    total = np.zeros(len(found), np.int64)
    for repeat in range(found.repeats):
        batch, head = np.divmod(found.head + repeat, num_heads_q)
        where = np.minimum(batch, len(kept) - 1), np.minimum(head, kept.shape[1] - 1), row
        for tile, sign in ((end, 1), (begin, -1)):
            block, part = np.divmod(tile, per_block)
            total += sign * (before[*where, block] * per_block + kept[*where, block] * part)
    if launch.splits == 1 or launch.order != "in bundles":
        return total
    share = -(-total // launch.splits)
    return np.clip(total - found.split * share, 0, share)
