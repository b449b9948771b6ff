"""The blocks of a kernel over a call: which tiles each owns, and which it walks over.

What cannot be known without reading arrays is taken from what stands for it, and said so.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from numflash.api.block_masks import own
from numflash.problem.block_masks import ListedBlocks
from numflash.reference.sequences import Extents, extents_of, lists_of
from numflash.runtime.arrays import to_numpy
from numflash.selection.geometry import heads_of_backward, tiles_listed
from numflash.selection.layout import (
    EDGE,
    EMPTY,
    WHOLE,
    Launch,
    Places,
    Tiling,
    launch_of,
    listed_places,
    order_of,
    owns_keys,
    places,
    tile_kinds,
)

from ...lengths import sequences_of
from ..asked import Asked, Kernel


@dataclass(frozen=True)
class Laid:
    """Where the blocks of a kernel work.

    Attributes:
        places: of all blocks, in their order.
        tiles: of each place, the tiles that it walks over: without those of empty blocks.
        tiling: the tiles of the head that is drawn.
        kinds: EMPTY, EDGE or WHOLE of each of them.
        head: the number of that head among those of all batch entries.
        splits: blocks that share the walk of each tile of rows, evenly; 1 of listed tiles.
        resident: blocks that share an SM, where there are so many.
        owns_keys: whether blocks own keys and walk over queries.
        notes: what is drawn, where that is not all, and what stands for numbers that were not
            read.
    """

    places: Places
    tiles: np.ndarray
    tiling: Tiling
    kinds: np.ndarray
    head: int
    splits: int
    resident: int
    owns_keys: bool
    notes: tuple[str, ...] = ()

    def shares(self, row: int) -> list[np.ndarray]:
        """The tiles that each block visits of those that share a tile of rows, in order."""
        tiles = np.flatnonzero(self.kinds[row] != EMPTY)
        if self.splits > 1:
            share = max(1, -(-len(tiles) // self.splits))
            return [tiles[n : n + share] for n in range(0, len(tiles), share)]
        of_row = (self.places.head == self.head) & (
            self.places.start == row * self.tiling.row_tile
        )
        ends = zip(self.places.begin[of_row], self.places.end[of_row], strict=True)
        return [tiles[(tiles >= begin) & (tiles < end)] for begin, end in sorted(set(ends))]


def laid(asked: Asked, kernel: Kernel) -> Laid:
    """The blocks of a kernel that walks over tiles."""
    if asked.problem.lengths is None:
        return _dense(asked, kernel)
    return _listed(asked, kernel)


def _resident(asked: Asked, kernel: Kernel, found: Places) -> int:
    fit = 1 if kernel.prediction is None else kernel.prediction.blocks_per_sm
    if kernel.report is not None:
        fit = kernel.report.blocks_per_sm
    blocks = int(found.block[-1]) + 1 if len(found) else 0
    return max(1, min(fit, -(-blocks // asked.machine.num_sms)))


class _Blocks(NamedTuple):
    """A block mask on the host: its kinds (batch, heads, rows, columns), with the band's sides."""

    kinds: np.ndarray
    size: tuple[int, int]


def _dense(asked: Asked, kernel: Kernel) -> Laid:
    launch = _launch(asked, kernel)
    found, by_keys = places(launch), owns_keys(launch.order)
    tiling, kinds, notes = launch.tiling, tile_kinds(launch.tiling), []
    tiles = found.tiles
    if asked.problem.blocks is not None:
        blocks = _block_mask(asked, by_keys)
        if blocks is None:
            notes.append("the lists of the block mask were not read: all blocks are taken as kept")
        else:
            heads = asked.problem.num_heads_q
            tiles = _tiles_of_lists(found, launch, blocks, heads)
            kinds, which = _with_blocks(kinds, tiling, blocks)
            notes += which
    splits = launch.splits if launch.order == "in bundles" else 1
    resident = _resident(asked, kernel, found)
    return Laid(found, tiles, tiling, kinds, 0, splits, resident, by_keys, tuple(notes))


def _launch(asked: Asked, kernel: Kernel) -> Launch:
    pack, in_flight = kernel.geometry.pack, kernel.geometry.heads_in_flight
    if kernel.problem.family == "backward" and order_of(kernel.config) == "last keys first":
        in_flight = heads_of_backward(asked.problem, asked.machine.l2_bytes)
    return launch_of(kernel.config, asked.problem, pack, in_flight)


# A block mask


def _block_mask(asked: Asked, by_keys: bool) -> _Blocks | None:
    """The block mask of the call, its first side the one that blocks own; None if unread."""
    mask = asked.question.options.get("block_mask")
    if not asked.question.data or mask is None:
        return None
    mask = own(mask)
    if not isinstance(mask, ListedBlocks):
        return None
    kinds, size = _kinds_of_blocks(mask), mask.block_size
    return _Blocks(kinds.swapaxes(2, 3), size[::-1]) if by_keys else _Blocks(kinds, size)


def _kinds_of_blocks(mask: ListedBlocks) -> np.ndarray:
    """Blocks that are kept in part are `EDGE`, as `BlockMask.tiles` counts them."""
    kinds = mask.tiles()
    return np.where(kinds == 2, WHOLE, np.where(kinds == 1, EDGE, EMPTY)).astype(np.uint8)


def _over_tiles(blocks: np.ndarray, tiling: Tiling, size: tuple[int, int]) -> np.ndarray:
    """(..., row_tiles, column_tiles) of (..., rows, columns) of blocks."""
    row = np.arange(tiling.row_tiles) * tiling.row_tile // tiling.pack // size[0]
    column = np.arange(tiling.column_tiles) * tiling.column_tile // size[1]
    last_row, last_column = (n - 1 for n in blocks.shape[-2:])
    return blocks[..., np.minimum(row, last_row)[:, None], np.minimum(column, last_column)]


def _with_blocks(
    kinds: np.ndarray, tiling: Tiling, blocks: _Blocks
) -> tuple[np.ndarray, list[str]]:
    """Kinds of the first head's tiles, where both the band and the block mask have a say."""
    batch, heads = blocks.kinds.shape[:2]
    notes = ["of batch entry 0, head 0"] if batch * heads > 1 else []
    return np.minimum(kinds, _over_tiles(blocks.kinds[0, 0], tiling, blocks.size)), notes


def _tiles_of_lists(
    found: Places, launch: Launch, blocks: _Blocks, num_heads_q: int
) -> np.ndarray:
    """Of each place the tiles of blocks that are not empty.

    Splits share these evenly, and heads that repeat each have their own list.
    """
    tiling = launch.tiling
    kept = _over_tiles(blocks.kinds, tiling, blocks.size) != EMPTY
    up_to = np.concatenate([np.zeros_like(kept[..., :1], int), kept.cumsum(-1)], -1)
    whole = found
    if launch.splits > 1 and launch.order == "in bundles":
        whole = places(launch._replace(splits=1))
        whole = _repeated(whole, launch.splits)
    row, total = whole.start // tiling.row_tile, np.zeros(len(whole), int)
    for repeat in range(found.repeats):
        batch, head = np.divmod(whole.head + repeat, num_heads_q)
        batch, head = (
            np.minimum(x, n - 1) for x, n in zip((batch, head), kept.shape, strict=False)
        )
        total += up_to[batch, head, row, whole.end] - up_to[batch, head, row, whole.begin]
    if whole is found:
        return total
    share = -(-total // launch.splits)
    return np.clip(total - found.split * share, 0, share)


def _repeated(found: Places, splits: int) -> Places:
    """Each place as often as there are splits."""
    columns = (found.block, found.start, found.head, found.split, found.begin, found.end)
    return Places(*(np.repeat(x, splits) for x in columns), found.repeats)


# Sequences with lengths of their own


def _listed(asked: Asked, kernel: Kernel) -> Laid:
    problem, config = asked.problem, kernel.config
    by_keys = owns_keys(order_of(config))
    shape = kernel.geometry.listed or tiles_listed(problem, config, by_keys=by_keys)
    q, k, notes = _lengths(asked, kernel)
    tiles = lists_of(q, k, shape).tiles
    group = problem.group_size
    heads = problem.num_heads_q // (group if by_keys else shape.pack)
    apart, repeats = getattr(config, "apart", False), group if by_keys else 1
    found = listed_places(tiles, heads, group if by_keys else shape.pack, repeats, apart)
    entry = int(np.argmax(q.length * k.length)) if len(q.length) else 0
    sides = [int(x.length[entry]) if len(x.length) else 0 for x in (q, k)]
    moved = shape.aligned * (sides[1] - sides[0])
    lo, hi = shape.lo + moved, shape.hi + moved
    rows, columns = sides[::-1] if by_keys else sides
    lo, hi = (-hi, -lo) if by_keys else (lo, hi)
    tiling = Tiling(rows * shape.pack, columns, shape.tile, shape.stage, lo, hi, shape.pack)
    drawn = f"of sequence {entry} of {len(q.length)}, the largest: {sides[0]:,} queries and "
    notes = (drawn + f"{sides[1]:,} keys", *notes)
    head = entry * problem.num_heads_q
    resident, kinds = _resident(asked, kernel, found), tile_kinds(tiling)
    return Laid(found, found.tiles, tiling, kinds, head, 1, resident, by_keys, notes)


def _lengths(asked: Asked, kernel: Kernel) -> tuple[Extents, Extents, list[str]]:
    """The sequences of queries and of keys, and what stands for them if they were not read."""
    lengths, options = asked.problem.lengths, asked.question.options
    if asked.question.data and set(lengths.given) <= set(options):
        arrays = {name: to_numpy(options[name]) for name in lengths.given}
        return *(_read(lengths, side, arrays) for side in "qk"), []
    found = (np.array(x, np.int64) for x in sequences_of(kernel.problem))
    q, k = (Extents(np.cumsum(x) - x, x, False) for x in found)
    return q, k, ["lengths were not read: those by which numflash-tune measures stand for them"]


def _read(lengths, side: str, arrays: dict[str, np.ndarray]) -> Extents:
    given = (arrays.get(f"{kind}_{side}") for kind in ("cu_seqlens", "seqlens", "starts"))
    more = {"most": lengths.most(side)}
    if side == "k":
        more |= {"added": lengths.added_k, "with_start": lengths.with_start_k}
    return extents_of(lengths.bound(side), lengths.entries, *given, **more)
