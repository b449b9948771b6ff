"""The blocks of a kernel over a call: which tiles each owns, and which it walks over.

What cannot be known without reading arrays is taken from what stands for it, and said so.
"""

from dataclasses import dataclass

import numpy as np

from numflash.reference.sequences import Extents, extents_of, lists_of
from numflash.runtime.arrays import to_numpy
from numflash.selection.geometry import heads_of_backward, tiles_listed
from numflash.selection.layout import (
    EDGE,
    EMPTY,
    WHOLE,
    Launch,
    Places,
    Seen,
    Tiling,
    launch_of,
    listed_places,
    order_of,
    owns_keys,
    places,
    tiles_seen,
)

from ...lengths import sequences_of
from ...model import block_clocks
from ...model.clocks import BlockClocks
from ...records import ResourceUsage
from ..asked import Asked, Kernel, NotShownError
from .block_masks import Blocks, block_mask, tiles_of_lists, with_blocks

MOST_PLACES = 2**22
"""Of more, nobody follows each."""


@dataclass(frozen=True)
class Laid:
    """Where the blocks of a kernel work.

    Attributes:
        tiling: the tiles of the head that is drawn.
        seen: the tiles that the band leaves of each tile of rows.
        kinds: EMPTY, EDGE or WHOLE of each tile where a block mask has a say, too; else None.
        head: the number of that head among those of all batch entries.
        splits: blocks that share the walk of each tile of rows, evenly; 1 of listed tiles.
        count: blocks of the launch; of persistent ones, their walks.
        fit: blocks that fit on an SM.
        owns_keys: whether blocks own keys and walk over queries.
        launch: of sequences of one length, else None.
        blocks: the block mask, where there is one that was read.
        listed: the places of sequences that have lengths of their own.
        notes: what is drawn, where that is not all, and what stands for numbers that were not
            read.
    """

    tiling: Tiling
    seen: Seen
    kinds: np.ndarray | None
    head: int
    splits: int
    count: int
    fit: int
    owns_keys: bool
    launch: Launch | None = None
    blocks: Blocks | None = None
    listed: Places | None = None
    notes: tuple[str, ...] = ()

    def resident(self, num_sms: int) -> int:
        """Blocks that share an SM, as many as fit and as there are."""
        return max(1, min(self.fit, -(-self.count // num_sms)))

    @property
    def work(self) -> np.ndarray:
        """The tiles that each tile of rows visits."""
        if self.kinds is not None:
            return (self.kinds != EMPTY).sum(axis=1)
        return self.seen.end - self.seen.begin

    @property
    def whole(self) -> np.ndarray:
        """Of these, those without a mask."""
        if self.kinds is not None:
            return (self.kinds == WHOLE).sum(axis=1)
        return self.seen.whole_end - self.seen.whole_begin

    def row(self, number: int) -> np.ndarray:
        """The kinds of a tile of rows, uint8 of (column_tiles,)."""
        if self.kinds is not None:
            return self.kinds[number]
        begin, end, whole_begin, whole_end = (int(each[number]) for each in self.seen)
        found = np.full(self.tiling.column_tiles, EMPTY, np.uint8)
        found[begin:end] = EDGE
        found[whole_begin:whole_end] = WHOLE
        return found

    def shares(self, number: int) -> list[np.ndarray]:
        """The tiles that each block visits of those that share a tile of rows, in order."""
        tiles = np.flatnonzero(self.row(number) != EMPTY)
        if self.listed is None:
            share = max(1, -(-len(tiles) // self.splits))
            return [tiles[n : n + share] for n in range(0, len(tiles), share)]
        found, start = self.listed, number * self.tiling.row_tile
        of_row = (found.head == self.head) & (found.start == start)
        ends = zip(found.begin[of_row], found.end[of_row], strict=True)
        return [tiles[(tiles >= begin) & (tiles < end)] for begin, end in sorted(set(ends))]


def laid(asked: Asked, kernel: Kernel) -> Laid:
    """The blocks of a kernel that walks over tiles.

    Raises:
        NotShownError: there are no scores, or blocks are in clusters.
    """
    problem = asked.problem
    if kernel.config.cluster > 1:
        raise NotShownError("its blocks are in clusters, and where those work is not drawn")
    if not problem.batch * problem.num_heads_q:
        raise NotShownError("there are no heads, so there is nothing to draw")
    found = _dense(asked, kernel) if problem.lengths is None else _listed(asked, kernel)
    if not found.tiling.rows or not found.tiling.columns:
        raise NotShownError("there are no scores, so there is nothing to draw")
    return found


def places_of(found: Laid, num_heads_q: int) -> tuple[Places, np.ndarray]:
    """The places of all blocks, and the tiles that each visits.

    Raises:
        NotShownError: there are too many.
    """
    if found.listed is not None:
        return found.listed, found.listed.tiles
    launch = found.launch
    count = launch.tiling.row_tiles * launch.heads * launch.splits
    if count > MOST_PLACES:
        raise NotShownError(f"{count:,} walks are more than are followed one by one")
    at = places(launch)
    if found.blocks is None:
        return at, at.tiles
    return at, tiles_of_lists(at, launch, found.blocks, num_heads_q)


def clocks_of(asked: Asked, kernel: Kernel, found: Laid) -> BlockClocks:
    """The clocks of a block by the calibrated model, of which `Kernel.prediction` is made.

    Raises:
        NotShownError: the model knows none.
    """
    resources = ResourceUsage(0, 0, 0, kernel.config.num_threads, found.fit, "")
    try:
        return block_clocks(asked.machine, kernel.problem, kernel.config, resources, kernel.code)
    except ValueError as error:
        raise NotShownError(f"the model has no clocks of this kernel: {error}") from error


def _fit(kernel: Kernel) -> int:
    """Blocks that fit on an SM."""
    if kernel.report is not None:
        return max(1, kernel.report.blocks_per_sm)
    return 1 if kernel.prediction is None else kernel.prediction.blocks_per_sm


def _dense(asked: Asked, kernel: Kernel) -> Laid:
    pack, in_flight = kernel.geometry.pack, kernel.geometry.heads_in_flight
    order = order_of(kernel.config)
    if order == "last keys first":
        in_flight = heads_of_backward(asked.problem, asked.machine.l2_bytes)
    launch = launch_of(kernel.config, asked.problem, pack, in_flight)
    tiling, by_keys, kinds, notes = launch.tiling, owns_keys(order), None, []
    blocks = None
    if asked.problem.blocks is not None:
        blocks = block_mask(asked, by_keys)
        if blocks is None:
            notes.append("the lists of the block mask were not read: all blocks are taken as kept")
        elif tiling.rows and tiling.columns:
            kinds = with_blocks(tiling, blocks)
            if blocks.kinds[..., 0, 0].size > 1:
                notes.append("of batch entry 0, head 0")
    count = launch.heads * launch.splits
    if order != "dealt keys":
        count *= tiling.row_tiles * (1 + (order == "dV and dK apart"))
    return Laid(
        tiling,
        tiles_seen(tiling),
        kinds,
        0,
        launch.splits if order == "in bundles" else 1,
        count,
        _fit(kernel),
        by_keys,
        launch=launch,
        blocks=blocks,
        notes=tuple(notes),
    )


# Sequences with lengths of their own


def _listed(asked: Asked, kernel: Kernel) -> Laid:
    problem, config = asked.problem, kernel.config
    by_keys = owns_keys(order_of(config))
    shape = kernel.geometry.listed or tiles_listed(problem, config, by_keys=by_keys)
    q, k, notes = _lengths(asked, kernel)
    group, apart = problem.group_size, getattr(config, "apart", False)
    shared, repeats = (group, group) if by_keys else (shape.pack, 1)
    heads, tiles = problem.num_heads_q // shared, lists_of(q, k, shape).tiles
    found = listed_places(tiles, heads, shared, repeats, apart)
    entry = int(np.argmax(q.length * k.length))
    queries, keys = int(q.length[entry]), int(k.length[entry])
    moved = shape.aligned * (keys - queries)
    lo, hi, rows, columns = shape.lo + moved, shape.hi + moved, queries, keys
    if by_keys:
        lo, hi, rows, columns = -hi, -lo, keys, queries
    tiling = Tiling(rows * shape.pack, columns, shape.tile, shape.stage, lo, hi, shape.pack)
    of_all = f"of sequence {entry} of {len(q.length)}, the largest: queries {queries:,}, "
    blocks = int(found.block[-1]) + 1 if len(found) else 0
    return Laid(
        tiling,
        tiles_seen(tiling),
        None,
        entry * problem.num_heads_q,
        1,
        blocks,
        _fit(kernel),
        by_keys,
        listed=found,
        notes=(f"{of_all}keys {keys:,}", *notes),
    )


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
