"""Where blocks work, in NumPy: the host's only copy of the orders that kernels compute.

    Tiling      the tiles of a head, and how far each sees: `tiles_seen`, `tile_kinds`
    Launch      a kernel laid out over heads, in plain numbers; `places` are those of its blocks
    Places      the tile of each place, and the tiles of the other side that it walks over

A block owns rows: of queries, or in kernels for dK and dV of keys. It walks over columns, the
other side. Kernels compute the same from a block's number: `tiles.blocks`, `tiles.steps` and
`tiles.wgmma.turns_of_blocks`, which are plain Python in the simulator only. A test compares both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from numflash.configs import Config, implementation_of
from numflash.configs.traits import padded_head_dim, rows_in_turn
from numflash.problem.problem import AttentionProblem
from numflash.reference.sequences import (
    BEGIN,
    END,
    ENTRY,
    ENTRY_BITS,
    HEADER_WORDS,
    RECORD_WORDS,
    START,
)

EMPTY, EDGE, WHOLE = range(3)
"""Kinds of tiles: no row sees a column of it; some see some; all see all, and need no mask."""


class Tiling(NamedTuple):
    """The tiles of one head.

    Attributes:
        rows: of the side that blocks own; with heads that are packed, those of all of them.
        columns: of the other side.
        row_tile, column_tile: rows and columns of a tile.
        lo, hi: row i sees the columns j with lo <= j - i <= hi. Of packed heads i is the token.
        pack: heads that are neighbouring rows.
    """

    rows: int
    columns: int
    row_tile: int
    column_tile: int
    lo: int
    hi: int
    pack: int = 1

    @property
    def row_tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.rows // self.row_tile)

    @property
    def column_tiles(self) -> int:
        """Tiles of columns."""
        return -(-self.columns // self.column_tile)


class Seen(NamedTuple):
    """The tiles of columns that each tile of rows sees, each an array of (row_tiles,).

    Attributes:
        begin, end: some of its rows see the tiles from `begin` up to `end`.
        whole_begin, whole_end: all of its rows see all of these; they lie between the former.
    """

    begin: np.ndarray
    end: np.ndarray
    whole_begin: np.ndarray
    whole_end: np.ndarray


def tiles_seen(tiling: Tiling) -> Seen:
    """The tiles that a band leaves, by `tiles.sequences.tiles_seen` and `tiles_seen_whole`.

    Example:
        >>> tiles_seen(Tiling(256, 256, 128, 64, -256, 0)).end.tolist()
        [2, 4]
    """
    rows, columns, row_tile, tile, lo, hi, pack = tiling
    row = np.arange(0, rows, row_tile)
    first, last = row // pack, (np.minimum(row + row_tile, rows) - 1) // pack
    begin = np.maximum(0, first + lo) // tile
    end = np.maximum(begin, -(-np.clip(last + hi + 1, 0, columns) // tile))
    whole_begin = np.clip(-(-(last + lo) // tile), begin, end)
    whole_end = np.clip(np.minimum(columns, first + hi + 1) // tile, whole_begin, end)
    return Seen(begin, end, whole_begin, whole_end)


def tile_kinds(tiling: Tiling) -> np.ndarray:
    """EMPTY, EDGE or WHOLE of each tile, uint8 of (row_tiles, column_tiles)."""
    seen, n = tiles_seen(tiling), np.arange(tiling.column_tiles)
    begin, end, whole_begin, whole_end = (x[:, None] for x in seen)
    some, whole = (n >= begin) & (n < end), (n >= whole_begin) & (n < whole_end)
    return some.astype(np.uint8) + whole


class Launch(NamedTuple):
    """A kernel laid out over heads, all of whose sequences are of one length.

    Attributes:
        tiling: of each head.
        order: of `ORDERS`, in which places follow each other.
        heads: that have tiles of their own, of all batch entries: packed heads count as one, and
            in kernels that own keys these are key-value heads.
        splits: blocks that share the columns of a tile of rows, or in "dealt keys" the tiles of a
            head.
        in_flight: heads whose blocks take turns.
        repeats: query heads whose columns a block walks over, one after the other.
    """

    tiling: Tiling
    order: str
    heads: int
    splits: int = 1
    in_flight: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class Places:
    """All places of a launch, each attribute an int64 array of (places,).

    Attributes:
        block: whose place it is. Blocks begin in the order of their numbers, and a block takes
            its places in the order in which they stand here. Persistent blocks take places as
            `taken_by` says, whatever this says; where blocks draw places it is the place's number.
        start: the first row of its tile.
        head: its query head, of all batch entries; the first of those that share the tile.
        split: its share; where dK and dV are apart 0 is dV and 1 is dK.
        begin, end: the tiles of columns from `begin` up to `end` are its walk.
        repeats: query heads for which it walks there, an int.
    """

    block: np.ndarray
    start: np.ndarray
    head: np.ndarray
    split: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    repeats: int = 1

    def __len__(self) -> int:
        return len(self.start)

    @property
    def tiles(self) -> np.ndarray:
        """Tiles of columns that each place walks over, of all heads that repeat."""
        return (self.end - self.begin) * self.repeats


# The orders, each (tile of rows, head, split, block) of every place


def _in_bundles(launch: Launch):
    """Bundles of heads; of the last one the last rows first, of that before it last, to and fro.

    The order of `tiles.blocks.make_block_place`.
    """
    tiles, heads, in_flight = launch.tiling.row_tiles, launch.heads, launch.in_flight
    number = np.arange(tiles * heads * launch.splits)
    in_order, split = np.divmod(number, launch.splits)
    bundle = in_order // (in_flight * tiles)
    first = bundle * in_flight
    tile, head = np.divmod(in_order - first * tiles, np.minimum(in_flight, heads - first))
    later = (heads - 1) // in_flight - bundle
    return np.where(later % 2 == 0, tiles - 1 - tile, tile), first + head, split, number


def _first_keys_first(launch: Launch):
    """Heads in turn, all bundles but the first whole: `tiles.blocks.make_place_of_keys`."""
    tile, head, split, number = _last_keys_first(launch)
    return tile[::-1], launch.heads - 1 - head[::-1], split, number


def _last_queries_first(launch: Launch):
    """The same from the last rows: `tiles.blocks.make_place_of_queries`."""
    tile, head, split, number = _first_keys_first(launch)
    return launch.tiling.row_tiles - 1 - tile, head, split, number


def _apart(launch: Launch):
    """dV and dK of a tile of keys are neighbours: `kernels.mma.backward_dkdv`."""
    tile, head, _, _ = (np.repeat(x, 2) for x in _first_keys_first(launch))
    number = np.arange(len(tile))
    return tile, head, number % 2, number


def _last_keys_first(launch: Launch):
    """Heads in turn: `tiles.wgmma.turns_of_blocks.make_place_of_last_keys`."""
    tiles, heads, in_flight = launch.tiling.row_tiles, launch.heads, launch.in_flight
    number = np.arange(tiles * heads)
    first = number // (in_flight * tiles) * in_flight
    tile, head = np.divmod(number - first * tiles, np.minimum(in_flight, heads - first))
    return tiles - 1 - tile, first + head, np.zeros_like(number), number


def _dealt_keys(launch: Launch):
    """A block takes every splits-th tile of keys of a head: `kernels.mma.backward`."""
    tiles, heads, splits = launch.tiling.row_tiles, launch.heads, launch.splits
    of_a_head = np.argsort(np.arange(tiles) % splits, kind="stable")
    tile, head = np.tile(of_a_head, heads), np.repeat(np.arange(heads), tiles)
    return tile, head, tile % splits, head * splits + tile % splits


ORDERS = {
    "in bundles": _in_bundles,
    "last queries first": _last_queries_first,
    "first keys first": _first_keys_first,
    "dV and dK apart": _apart,
    "last keys first": _last_keys_first,
    "dealt keys": _dealt_keys,
}
"""The orders by name."""


TAKE_TURNS = "last queries first", "first keys first", "dV and dK apart"
"""Those whose heads take turns by `heads_in_turn`."""


def order_of(config: Config) -> str:
    """The name in `ORDERS` of the order in which a config's blocks work.

    Args:
        config: of a forward or a backward.

    Raises:
        ValueError: its blocks own no tiles of queries or keys.

    Example:
        >>> order_of(parse_config("backward-dq", "m64n64w4"))
        'last queries first'
    """
    row, family = implementation_of(config), config.family
    if family == "forward":
        return "in bundles" if row.has_tensor_cores else "last queries first"
    if family == "backward-dq":
        return "last queries first"
    if family == "backward-dkdv":
        return "dV and dK apart" if getattr(config, "apart", False) else "first keys first"
    if family == "backward":
        return "last keys first" if row.needs_maps else "dealt keys"
    raise ValueError(f"blocks of {family} own no tiles of queries or keys")


def owns_keys(order: str) -> bool:
    """Whether blocks of an order own keys and walk over queries."""
    return order not in ("in bundles", "last queries first")


def places(launch: Launch) -> Places:
    """The places of a launch, in their order.

    Example:
        >>> found = places(Launch(Tiling(256, 256, 128, 64, -256, 0), "last queries first", 1))
        >>> found.start.tolist(), found.tiles.tolist()
        ([128, 0], [4, 2])
    """
    tiling = launch.tiling
    tile, head, split, block = ORDERS[launch.order](launch)
    seen = tiles_seen(tiling)
    begin, end = seen.begin[tile], seen.end[tile]
    if launch.order == "in bundles" and launch.splits > 1:
        share = -(-(end - begin) // launch.splits)
        begin = begin + split * share
        end = np.maximum(begin, np.minimum(end, begin + share))
    head = head * tiling.pack * launch.repeats
    return Places(block, tile * tiling.row_tile, head, split, begin, end, launch.repeats)


def launch_of(
    config: Config, problem: AttentionProblem, pack: int = 1, in_flight: int = 1
) -> Launch:
    """The launch of a config for a problem whose sequences are of one length.

    Args:
        config: of a forward, with its splits, or of a backward.
        problem: the question.
        pack: heads that are packed, by `geometry.heads_packed`.
        in_flight: heads whose blocks take turns: `Geometry.heads_in_flight`, or of Hopper's
            backward in one kernel `geometry.heads_of_backward`; in the orders of `TAKE_TURNS`
            `heads_in_turn` decides.

    Raises:
        ValueError: its blocks own no tiles of queries or keys, or are in clusters, which own one
            together.
    """
    if config.cluster > 1:
        raise ValueError(f"where blocks of {config} work, in clusters, is not followed")
    order, queries, keys = order_of(config), problem.seqlen_q, problem.seqlen_k
    lo, hi, splits = problem.band_lo, problem.band_hi, getattr(config, "num_splits", 1)
    if owns_keys(order):
        tiling = Tiling(keys, queries, config.row_tile, config.column_tile, -hi, -lo)
        heads = problem.batch * problem.num_heads_kv
        if order in TAKE_TURNS:
            in_flight = _heads_in_turn(problem, keys)
        return Launch(tiling, order, heads, splits, in_flight, problem.group_size)
    stage = getattr(config, "stage_n", config.column_tile)
    tiling = Tiling(queries * pack, keys, config.row_tile, stage, lo, hi, pack)
    heads = problem.batch * problem.num_heads_q // pack
    if order in TAKE_TURNS:
        in_flight = _heads_in_turn(problem, queries)
    return Launch(tiling, order, heads, splits, in_flight)


def heads_in_turn(rows: int, rows_in_turn: int) -> int:
    """Heads of so many rows whose blocks take turns, by `tiles.blocks.make_place_in_turn`.

    Args:
        rows: of a head, of the side that blocks own.
        rows_in_turn: of all heads that take turns, `Traits.rows_in_turn`.
    """
    return max(1, rows_in_turn // max(1, rows))


def _heads_in_turn(problem: AttentionProblem, rows: int) -> int:
    columns = (padded_head_dim(n) for n in (problem.head_dim, problem.head_dim_v))
    return heads_in_turn(rows, rows_in_turn(*columns))


def listed_places(
    tiles: np.ndarray, heads: int, shared: int = 1, repeats: int = 1, apart: bool = False
) -> Places:
    """The places of a list of tiles, of sequences with lengths of their own.

    Args:
        tiles: the list, int32, of `reference.sequences.lists_of`.
        heads: of a batch entry that have tiles of their own.
        shared: query heads of a tile: packed ones, or the group of a key-value head.
        repeats: query heads whose columns a block walks over, one after the other.
        apart: whether dK and dV are.

    Returns:
        The heads of a record one after the other, record by record.
    """
    words = tiles[HEADER_WORDS:].reshape(-1, RECORD_WORDS).astype(np.int64)
    block = np.arange(len(words) * heads * (1 + apart))
    number, part = np.divmod(block, 1 + apart)
    record, head = np.divmod(number, heads)
    start, begin, end, word = (words[record, n] for n in (START, BEGIN, END, ENTRY))
    entry, split = word & ((1 << ENTRY_BITS) - 1), word >> ENTRY_BITS
    head = (entry * heads + head) * shared
    end = np.maximum(begin, end)
    return Places(block, start, head, part if apart else split, begin, end, repeats)


# Persistent blocks


def taken_by(count: int, blocks: int) -> np.ndarray:
    """The block that takes each of `count` places: to and fro, as `tiles.blocks.next_place` says.

    Example:
        >>> taken_by(7, 3).tolist()
        [0, 1, 2, 2, 1, 0, 0]
    """
    turn, block = np.divmod(np.arange(count), blocks)
    return np.where(turn % 2 == 0, block, blocks - 1 - block)


def persistent_walks(count: int, blocks: int) -> Iterator[np.ndarray]:
    """The places of each of so many persistent blocks, in the order in which it takes them."""
    taken = np.argsort(taken_by(count, blocks), kind="stable")
    ends = np.cumsum(np.bincount(taken_by(count, blocks), minlength=blocks))
    return iter(np.split(taken, ends[:-1]))
