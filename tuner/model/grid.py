"""A kernel laid out over a problem: blocks, the tiles each visits, bytes of device memory.

Where blocks work is said by `numflash.selection.layout`. A problem class stands for the problem
with its rounded sizes. Of sequences with lengths of their own the tiles are those of the list that
`numflash.reference.sequences` makes of the lengths that the class is measured with,
`tuner.lengths`.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from numflash.configs import Config, MmaConfig, Traits, implementation_of
from numflash.problem.classes import ProblemClass
from numflash.problem.sequences import HEADER_WORDS, NO_LIMIT, RECORD_WORDS, ListShape
from numflash.reference.sequences import (
    BEGIN,
    END,
    ENTRY,
    ENTRY_BITS,
    START,
    Extents,
    Lists,
    lists_of,
)
from numflash.selection.geometry import LEAST_STAGES, PACKED_SEQLEN, heads_of_a_bundle
from numflash.selection.layout import (
    EDGE,
    EMPTY,
    TAKE_TURNS,
    Launch,
    Tiling,
    heads_in_turn,
    order_of,
    owns_keys,
    places,
    taken_by,
    tiles_seen,
)

from ..lengths import sequences_of
from ..space.machines import Machine
from .kept import Kept, kinds_of_tiles

_UNBOUNDED = 2**40
_FLOAT_BYTES = 4
_MANY_ROUNDS = 64
_DENSE = Traits("float16", 32, 32)
# More records than tiles that splits may make, all heads together: those of an H200, four a block.
_SHARES = 4 * 132


@dataclass(frozen=True)
class Walks:
    """Tiles that the blocks of one head visit.

    Attributes:
        tiles: of each block, most first.
        edges: tiles of a block that an edge of the mask or the end of the columns crosses, on
            average.
        row_blocks: walks of a block, one after another.
    """

    tiles: np.ndarray
    edges: float
    row_blocks: int = 1

    @cached_property
    def total(self) -> int:
        """Tiles of all blocks."""
        return int(self.tiles.sum())

    @cached_property
    def most(self) -> int:
        """Tiles of the block with the most."""
        return int(self.tiles[0])

    @property
    def is_even(self) -> bool:
        """Whether all blocks have as many."""
        return int(self.tiles[-1]) == self.most


@dataclass(frozen=True)
class Grid:
    """The blocks of a launch.

    Attributes:
        walks: of the blocks of one head.
        heads: how often those are launched.
        packed: query heads in the rows of a tile.
        splits: blocks that share one walk of the problem.
        entries: sequences, or lists of a block mask, whose walks `walks` holds.
        parts: float32 parts of a row of the result, on average; 0 where all rows are whole.
        launch: where its blocks work, of a forward on tensor cores and of gradients in one kernel
            with no heads in flight; None of a list of tiles, whose heads follow each other tile by
            tile.
        kept: the blocks that are not empty; None of those that a band leaves.
    """

    walks: Walks
    heads: int
    packed: int
    splits: int
    entries: int = 1
    parts: float = 0.0
    launch: Launch | None = None
    kept: Kept | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the launch."""
        return len(self.walks.tiles) * self.heads

    @property
    def mean_tiles(self) -> float:
        """Tiles that a block visits on average."""
        return self.walks.total / len(self.walks.tiles)


def band(problem: ProblemClass) -> tuple[int, int]:
    """Query i sees the keys j with band_lo <= j - i <= band_hi."""
    if problem.mask == "full":
        return -_UNBOUNDED, _UNBOUNDED
    high = problem.seqlen_k - problem.seqlen_q
    return (-_UNBOUNDED if problem.window is None else high - problem.window + 1), high


@lru_cache(maxsize=64)
def visible_scores(problem: ProblemClass, kept: Kept | None = None) -> int:
    """Scores that are not masked, over all heads; of a block that is kept in part all of them."""
    if problem.traits.ragged:
        found, entries = 0, sequences_of(problem)
        alone = replace(problem, traits=_DENSE, page_size=0, batch_heads=1, group_size=1)
        for q, k in zip(*entries, strict=True):
            found += visible_scores(replace(alone, seqlen_q=q, seqlen_k=k))
        return found * (problem.batch_heads // len(entries.seqlens_q))
    low, high = band(problem)
    rows = np.arange(problem.seqlen_q)
    begin = np.minimum(np.maximum(0, rows + low), problem.seqlen_k)
    end = np.maximum(begin, np.minimum(problem.seqlen_k, rows + high + 1))
    if kept is None:
        return int((end - begin).sum()) * problem.batch_heads
    m, n = kept.size
    blocks = (kept.kinds != EMPTY).reshape(-1, *kept.kinds.shape[2:])[:, rows // m]
    before = np.pad(blocks.cumsum(-1), [(0, 0), (0, 0), (1, 0)])
    blocks = np.pad(blocks, [(0, 0), (0, 0), (0, 1)])
    seen = sum(
        sign * (before[:, rows, at // n] * n + blocks[:, rows, at // n] * (at % n)).sum()
        for at, sign in ((end, 1), (begin, -1))
    )
    return int(seen) * problem.batch_heads // len(blocks)


def lay(problem: ProblemClass, config: Config, kept: Kept | None = None) -> Grid:
    """The blocks of a tiled kernel; clusters count as one each, where there are any.

    Args:
        problem: the class.
        config: the kernel's, or of the same tiles and with the `blocks_order` of its blocks.
        kept: what its block mask keeps; None takes all that the band leaves. Of query heads that
            share keys and differ, the first one's stand for all where blocks own keys.
    """
    if problem.traits.ragged:
        return _lay_list(problem, config)
    order = getattr(config, "blocks_order", None) or order_of(config)
    packed = 1 if owns_keys(order) else heads_packed(problem, config)
    tiles = rows_of(config), config.column_tile
    return _laid(problem, order, *tiles, packed, getattr(config, "num_splits", 1), kept)


def rows_of(config: Config) -> int:
    """Rows of a block, or of a cluster."""
    return getattr(config, "cluster", 1) * config.row_tile


@lru_cache(maxsize=1024)
def _laid(
    problem: ProblemClass,
    order: str,
    row_tile: int,
    column_tile: int,
    packed: int,
    splits: int,
    kept: Kept | None,
) -> Grid:
    low, high = band(problem)
    queries, keys = problem.seqlen_q, problem.seqlen_k
    if owns_keys(order):
        tiling = Tiling(keys, queries, row_tile, column_tile, -high, -low)
        heads, repeats = problem.batch_heads // problem.group_size, problem.group_size
    else:
        tiling = Tiling(queries * packed, keys, row_tile, column_tile, low, high, packed)
        heads, repeats = problem.batch_heads // packed, 1
    in_flight = 1
    if order in TAKE_TURNS:
        in_flight = heads_in_turn(tiling.rows, problem.traits.rows_in_turn)
    launch = Launch(tiling, order, heads, splits, in_flight, repeats)
    parts = splits if splits > 1 or order == "dealt keys" else 0
    # Both blocks of a tile have as much to do where dK and dV are apart.
    apart = order == "dV and dK apart"
    alone = launch._replace(heads=1, in_flight=1, order="first keys first" if apart else order)
    walks, lists = (_walks(alone), 1) if kept is None else _walks_of_blocks(alone, kept)
    heads = heads * (1 + apart) // lists
    return Grid(walks, heads, packed, splits, lists, parts, launch, kept)


def _lay_list(problem: ProblemClass, config: Config) -> Grid:
    """The blocks of a kernel that goes through a list of tiles."""
    entries = len(sequences_of(problem).seqlens_q)
    heads, tiles = problem.batch_heads // entries, (rows_of(config), config.column_tile)
    if problem.family in ("forward", "backward-dq"):
        packed = heads_packed(problem, config)
        shares = 0
        if getattr(config, "num_splits", 1) > 1:
            shares = max(1, _SHARES * packed // heads)
        walks, parts = _walks_of_list(problem, *tiles, packed, shares)
        return Grid(walks, heads // packed, packed, 1, entries, parts)
    walks, _ = _walks_of_list(problem, *tiles, 1, 0)
    apart = 2 if getattr(config, "apart", False) else 1
    return Grid(walks, heads // problem.group_size * apart, 1, 1, entries)


def _band_of_list(problem: ProblemClass) -> tuple[int, int]:
    """`ListShape.lo` and `hi`: those of the last query and the last key of a sequence."""
    lo = -NO_LIMIT if problem.window is None else 1 - problem.window
    return lo, NO_LIMIT if problem.mask == "full" else 0


def _listed(problem: ProblemClass, shape: ListShape) -> tuple[Lists, np.ndarray]:
    """The lists of the lengths that a class is measured with, and their records, int64."""
    lengths = [np.array(x, np.int64) for x in sequences_of(problem)]
    lists = lists_of(*(Extents(np.cumsum(x) - x, x, False) for x in lengths), shape)
    return lists, lists.tiles[HEADER_WORDS:].reshape(-1, RECORD_WORDS).astype(np.int64)


@lru_cache(maxsize=64)
def walks_in_turn(
    problem: ProblemClass, row_tile: int, column_tile: int
) -> tuple[tuple[int, int], ...]:
    """(first tile of queries, behind the last) that each block of keys of a list visits.

    In the list's order, in which blocks add to dQ (`ListShape.in_turn`). Tiles of queries are
    numbered through all sequences, as their sums lie in memory.
    """
    shape = ListShape(row_tile, column_tile, 1, True, *_band_of_list(problem), 1, in_turn=True)
    _, records = _listed(problem, shape)
    queries = np.array(sequences_of(problem).seqlens_q, np.int64)
    tiles = -(-queries // column_tile)
    before = (np.cumsum(tiles) - tiles)[records[:, ENTRY] & (2**ENTRY_BITS - 1)]
    begin, end = records[:, BEGIN], np.maximum(records[:, BEGIN], records[:, END])
    return tuple(zip((before + begin).tolist(), (before + end).tolist(), strict=True))


@lru_cache(maxsize=1024)
def _walks_of_list(
    problem: ProblemClass, row_tile: int, column_tile: int, packed: int, shares: int
) -> tuple[Walks, float]:
    """The walks of one head through all sequences, and the parts of a row on average.

    `shares` are the most records that splits may add; 0 does not split.
    """
    by_keys = problem.family not in ("forward", "backward-dq")
    lo, hi = _band_of_list(problem)
    least = LEAST_STAGES if shares else 0
    shape = ListShape(row_tile, column_tile, packed, by_keys, lo, hi, 1, least, shares)
    lengths = [np.array(x, np.int64) for x in sequences_of(problem)]
    lists, records = _listed(problem, shape)
    start, begin, end = (records[:, word] for word in (START, BEGIN, END))
    found = np.maximum(0, end - begin)

    # Tiles of which every row sees every column, as `_walks` counts them.
    q, k = (x[records[:, ENTRY] & (2**ENTRY_BITS - 1)] for x in lengths)
    lo, hi = lo + k - q, hi + k - q
    own, columns = (k, q) if by_keys else (q, k)
    low, high = (-hi, -lo) if by_keys else (lo, hi)
    last = (np.minimum(start + row_tile, own * packed) - 1) // packed
    whole_begin = np.maximum(begin, -(-(last + low) // column_tile))
    whole_end = np.minimum(end, np.minimum(columns, start // packed + high + 1) // column_tile)
    whole = np.clip(whole_end - whole_begin, 0, found)
    repeats = problem.group_size if by_keys else 1
    edges = float((found - whole).mean()) * repeats
    in_parts = np.minimum(row_tile, own * packed - start)[lists.slots >= 0].sum()
    parts = float(in_parts / max(1, int(lengths[by_keys].sum()) * packed))
    return Walks(np.sort(found * repeats)[::-1], edges), parts


def heads_packed(problem: ProblemClass, config: Config) -> int:
    """Query heads in the rows of a tile, by the rule of `geometry.rows_packed`."""
    if problem.family != "forward" or not (row := implementation_of(config)).has_tensor_cores:
        return 1
    few = problem.seqlen_q <= PACKED_SEQLEN and problem.traits.of_a_head is None
    packed = problem.group_size if (few if config.packed is None else config.packed) else 1
    return packed if row.packs(packed) else 1


def _walks(launch: Launch) -> Walks:
    """The walks of a launch of one head."""
    seen, found = tiles_seen(launch.tiling), places(launch)
    of_rows = launch.tiling.row_tiles if launch.order != "dealt keys" else 1
    blocks = of_rows * launch.splits
    tiles = np.bincount(found.block, found.tiles, blocks).astype(np.int64)
    edges = (seen.end - seen.begin) - (seen.whole_end - seen.whole_begin)
    row_blocks = -(-len(found) // blocks)
    return Walks(np.sort(tiles)[::-1], float(edges.sum()) * launch.repeats / blocks, row_blocks)


def _walks_of_blocks(launch: Launch, kept: Kept) -> tuple[Walks, int]:
    """The walks of a launch of one head, through each list of a block mask; and how many lists."""
    tiling, found, by_keys = launch.tiling, places(launch), owns_keys(launch.order)
    kept = kept.by_keys if by_keys else kept
    blocks = kept.of_groups(launch.repeats).reshape(-1, *kept.kinds.shape[2:])
    count = (tiling.row_tiles if launch.order != "dealt keys" else 1) * launch.splits
    of_lists, edges = [], 0
    for each in blocks:
        kinds = kinds_of_tiles(tiling, each, kept.size)
        tiles = (kinds != EMPTY).sum(axis=1)[found.start // tiling.row_tile] * launch.repeats
        if launch.order == "in bundles" and launch.splits > 1:
            share = -(-tiles // launch.splits)
            tiles = np.clip(tiles - found.split * share, 0, share)
        of_lists.append(np.bincount(found.block, tiles, count).astype(np.int64))
        edges += int((kinds == EDGE).sum()) * launch.repeats
    walks = np.sort(np.concatenate(of_lists))[::-1]
    return Walks(walks, edges / len(walks), -(-len(found) // count)), len(blocks)


def heads_in_flight(problem: ProblemClass, grid: Grid, config: MmaConfig, machine: Machine) -> int:
    """Heads of a forward whose blocks are interleaved, by the rule of `selection`."""
    in_flight = config.heads_in_flight
    if problem.traits.ragged:
        return grid.heads
    if not in_flight:
        traits = problem.traits
        columns = traits.head_dim + traits.head_dim_v
        head_bytes = problem.seqlen_k * columns * traits.operand_bytes
        fits = machine.l2_bytes // 2 // head_bytes * problem.group_size // grid.packed
        sharing = problem.group_size // grid.packed
        in_flight = heads_of_a_bundle(config, fits, grid.heads, machine.num_sms, sharing)
    return max(1, min(in_flight, grid.heads))


def dealt_out(grid: Grid, heads_in_flight: int, blocks: int) -> tuple[float, int]:
    """(tiles, walks) of the busiest of so many persistent blocks that share a grid's walks."""
    walks = grid.blocks
    rounds = -(-walks // blocks)
    if grid.walks.is_even or rounds == 1:
        return float(rounds * grid.walks.most), rounds
    if rounds > _MANY_ROUNDS:
        # Rounds alternate direction: a block that is ahead in one falls back in the next.
        return walks / blocks * grid.mean_tiles + grid.walks.most / 2, rounds
    if grid.launch is None or grid.kept is not None:
        return _busiest(np.repeat(grid.walks.tiles, grid.heads), blocks)
    return _busiest_of(grid.launch._replace(in_flight=heads_in_flight), blocks)


@lru_cache(maxsize=1024)
def _busiest_of(launch: Launch, blocks: int) -> tuple[float, int]:
    return _busiest(places(launch).tiles, blocks)


def _busiest(tiles: np.ndarray, blocks: int) -> tuple[float, int]:
    taken = taken_by(len(tiles), blocks)
    found, walks = np.bincount(taken, tiles, blocks), np.bincount(taken, minlength=blocks)
    busiest = int(np.argmax(found + walks))
    return float(found[busiest]), int(walks[busiest])


def io_bytes(problem: ProblemClass) -> int:
    """Bytes if every input is read once and every result written once; of the fewest parts."""
    traits = problem.traits
    queries = problem.batch_heads * problem.seqlen_q
    keys = problem.batch_heads // problem.group_size * problem.seqlen_k
    if problem.page_size:
        # Sequences do not fill the room that they have.
        seqlens_k = sequences_of(problem).seqlens_k
        keys = problem.batch_heads // problem.group_size * sum(seqlens_k) // len(seqlens_k)
    d, dv, size = traits.head_dim, traits.head_dim_v, traits.dtype_bytes
    rows, columns = queries * d * size, keys * (d + dv) * traits.operand_bytes
    if problem.family == "forward":
        of_q = traits.operand_bytes if traits.fp8 else size
        return queries * (d * of_q + dv * size + _FLOAT_BYTES) + columns
    statistics = 2 * queries * _FLOAT_BYTES
    if problem.family == "delta":
        return 2 * queries * dv * size + 3 * queries * _FLOAT_BYTES
    if problem.family == "combine":
        return queries * (dv * size + _FLOAT_BYTES + 2 * (dv + 1) * _FLOAT_BYTES)
    if problem.family == "reduce-dq":
        return queries * d * (size + _FLOAT_BYTES)
    inputs = rows + queries * dv * size + columns + statistics
    results = {"backward-dq": rows, "backward-dkdv": columns, "backward": rows + columns}
    return inputs + results.get(problem.family, 0)


def quantised_bytes(problem: ProblemClass, reads: int = 1) -> int:
    """Bytes that the kernels move which make the codes of q, k and v, of 16 bits.

    Args:
        problem: a class on 8-bit floats.
        reads: passes over each array; two where a scale is shared by more than a block quantises.
    """
    queries = problem.batch_heads * problem.seqlen_q * problem.traits.head_dim
    keys = problem.batch_heads // problem.group_size * problem.seqlen_k
    elements = queries + keys * (problem.traits.head_dim + problem.traits.head_dim_v)
    return elements * (reads * problem.traits.dtype_bytes + problem.traits.operand_bytes)


def memory_bytes(problem: ProblemClass, config: Config, grid: Grid, slots: int, l2: int) -> float:
    """Bytes from and to device memory: data beyond the L2's size is read once per wave of blocks.

    Args:
        problem: the class.
        config: the kernel's.
        grid: its blocks.
        slots: blocks that run at once; those of a cluster read what they share once.
        l2: bytes of the L2 cache.
    """
    traits = problem.traits
    least, slots = io_bytes(problem), slots // getattr(config, "cluster", 1)
    d, size = traits.head_dim + traits.head_dim_v, traits.operand_bytes
    by_queries = problem.family in ("forward", "backward-dq")
    walked = problem.seqlen_k if by_queries else problem.seqlen_q * problem.group_size
    head_bytes = walked * d * size
    row_blocks = len(grid.walks.tiles) / grid.splits / grid.entries
    # Blocks that read the same keys (or queries) follow each other, unless heads are interleaved.
    readers = row_blocks * grid.splits * (problem.group_size // grid.packed if by_queries else 1)
    at_once = slots / max(1.0, readers)
    if problem.family == "forward" and implementation_of(config).has_tensor_cores:
        in_flight = config.heads_in_flight * grid.packed / problem.group_size
        at_once = max(at_once, in_flight or l2 // 2 // head_bytes)
    heads = problem.batch_heads // problem.group_size
    at_once = min(max(1.0, at_once), heads)
    waves = 1.0
    if at_once * head_bytes > l2:
        waves = max(1.0, at_once * readers / slots)
    of_one = grid.walks.total / grid.entries
    share = of_one * config.column_tile / max(1, row_blocks * walked)
    found = least + (waves - 1) * heads * head_bytes * min(1.0, share)
    return found + _parts_bytes(problem, grid)


def _parts_bytes(problem: ProblemClass, grid: Grid) -> float:
    """float32 parts of a result that splits write."""
    traits = problem.traits
    queries = problem.batch_heads * problem.seqlen_q
    columns = traits.head_dim if problem.family == "backward" else traits.head_dim_v + 1
    return float(queries * columns * _FLOAT_BYTES * grid.parts)


def part_bytes(problem: ProblemClass, grid: Grid) -> float:
    """Bytes that the kernel which joins the parts of `grid` moves; 0 if there are no parts."""
    parts = _parts_bytes(problem, grid)
    queries = problem.batch_heads * problem.seqlen_q
    columns = (
        problem.traits.head_dim if problem.family == "backward" else problem.traits.head_dim_v
    )
    return parts + queries * columns * problem.traits.dtype_bytes if parts else 0.0


def l2_share(machine: Machine, blocks: int) -> float:
    """Bytes a clock that an SM gets of the L2 when so many blocks run."""
    active = max(1, min(machine.num_sms, blocks))
    return min(64.0, machine.l2_bytes_per_clock / active)
