"""The blocks that a block mask keeps, where its lists were read: what kernels then walk over.

A class knows the sizes of a block and not which blocks are kept, which lies on the device. Without
lists the model takes every block for kept that the band leaves: the work of the longest lists.
"""

from dataclasses import dataclass

import numpy as np

from numflash.selection.layout import EMPTY, Tiling, tiles_seen

Walk = tuple[tuple[int, int], ...]
"""The tiles that a block visits, as runs of (first, behind the last), in order."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A block mask on the host. It equals itself only, so that layouts are found again by it.

    Attributes:
        kinds: EMPTY, EDGE or WHOLE of (batch, heads, rows, columns) of blocks, uint8; batch and
            heads are 1 where all share.
        size: rows and columns of a block. Rows are queries, or of `by_keys` keys.
    """

    kinds: np.ndarray
    size: tuple[int, int]

    @property
    def by_keys(self) -> "Kept":
        """The same with keys as rows."""
        return Kept(self.kinds.swapaxes(2, 3), self.size[::-1])

    def of_groups(self, group: int) -> np.ndarray:
        """`kinds` of the first query head of each group, where heads differ."""
        return self.kinds[:, ::group] if self.kinds.shape[1] > 1 else self.kinds


def kinds_of_tiles(tiling: Tiling, blocks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Kinds of a head's tiles, where both the band and its `blocks` have a say.

    Args:
        tiling: the tiles, with rows as `blocks` has them.
        blocks: (rows, columns) of `Kept.kinds`.
        size: of a block.
    """
    seen, n = tiles_seen(tiling), np.arange(tiling.column_tiles)
    begin, end, whole_begin, whole_end = (each[:, None] for each in seen)
    of_band = ((n >= begin) & (n < end)).astype(np.uint8)
    of_band += (n >= whole_begin) & (n < whole_end)
    row = np.arange(tiling.row_tiles) * tiling.row_tile // tiling.pack // size[0]
    column = n * tiling.column_tile // size[1]
    return np.minimum(of_band, blocks[row[:, None], column])


def walks_of(tiling: Tiling, blocks: np.ndarray, size: tuple[int, int]) -> tuple[Walk, ...]:
    """The walk of each tile of rows, the first one first; arguments of `kinds_of_tiles`."""
    visited = kinds_of_tiles(tiling, blocks, size) != EMPTY
    steps = np.diff(visited.astype(np.int8), axis=1, prepend=0, append=0)
    return tuple(
        tuple(zip(np.flatnonzero(row > 0).tolist(), np.flatnonzero(row < 0).tolist(), strict=True))
        for row in steps
    )
