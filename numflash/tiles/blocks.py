"""The work of a block: its tile, head and batch entry, its sequence, and the keys that it sees.

    Grid        the tiles of a forward, as the host laid them out over blocks
    Place       the tile of one block
    Sequence    the queries and keys of the batch entry that the tile is of
    Keys        the stages of keys that the rows of the tile see

All threads of a block compute them, or one for them. All sizes are below 2 ** 31, and divisions
are of unsigned 32-bit numbers, which take a quarter of the code of Python's.
"""

from functools import cache
from typing import NamedTuple

from numflash.ptx import (
    device_function,
    function_of_numbers,
    i32,
    i64,
    mov_ctaid_x,
    mov_nctaid_x,
    u32,
)


class Grid(NamedTuple):
    """The tiles of a forward.

    Attributes:
        num_rows: rows of a head, with the rows of heads that are packed.
        num_heads: query heads of all batch entries.
        pack: query heads of a token that are neighbouring rows.
        num_splits: blocks that share the keys of a tile.
        heads_in_flight: packed heads whose tiles take turns.
    """

    num_rows: i32
    num_heads: i32
    pack: i32
    num_splits: i32
    heads_in_flight: i32


class Place(NamedTuple):
    """The tile of a block.

    Attributes:
        start: its first row: of queries, or in kernels that own keys, of keys.
        head: its query head; the first of several that are packed or share the keys.
        head_kv: its key-value head.
        batch: its batch entry.
        split: its share of the keys.
    """

    start: i32
    head: i32
    head_kv: i32
    batch: i32
    split: i32


class Sequence(NamedTuple):
    """The queries and keys of a batch entry. Query i sees the keys j with lo <= j - i <= hi.

    Attributes:
        seqlen_q, seqlen_k: their numbers.
        first_q, first_k: the rows of the first in their arrays.
        lo, hi: the band. Both count from the first query and the first key.
    """

    seqlen_q: i32
    seqlen_k: i32
    first_q: i32
    first_k: i32
    lo: i32
    hi: i32


class Keys(NamedTuple):
    """The stages of keys from `begin` up to, but without, `end`; none where that is not above."""

    begin: i32
    end: i32


class Whole(NamedTuple):
    """Tiles that begin at a key from `first` to `last` need no mask."""

    first: i32
    last: i32


@function_of_numbers
def quotient(x, by):
    """x // by of numbers that are not negative."""
    return i32(u32(x) // u32(by))


@function_of_numbers
def divide(x, by):
    """(x // by, x % by) of numbers that are not negative."""
    whole = quotient(x, by)
    return whole, i32(x - whole * by)


@function_of_numbers
def tiles_of(length, tile):
    """The number of tiles that cover so many rows."""
    return quotient(length + tile - 1, tile)


@device_function
def token_of_row(row, pack):
    """The token of a row where `pack` query heads of a token are neighbouring rows."""
    return quotient(row, pack)


@device_function
def first_of_head(tensor, batch, head):
    """The offset of the first row of a head; `tensor` has the strides `batch` and `head`."""
    return batch * tensor.batch + head * tensor.head


@device_function
def first_of_rows(tensor, batch, head, row):
    """The offset of a row of a head; `tensor` has the strides `batch`, `head` and `row`."""
    return first_of_head(tensor, batch, head) + row * tensor.row


@function_of_numbers
def first_of_statistics(batch, head, shape):
    """The offset of a head in an array (batch, num_heads_q, seqlen_q), as lse and delta are."""
    return i64(batch * shape.num_heads_q + head) * shape.seqlen_q


# The place of a block


@function_of_numbers
def place_in_heads(number, num_tiles, num_heads):
    """(tile, head, batch): the tiles of a head come one after the other, then the next head's."""
    head_of_batch, tile = divide(number, num_tiles)
    batch, head = divide(head_of_batch, num_heads)
    return tile, head, batch


@function_of_numbers
def number_of_head_kv(batch, head_kv, shape):
    """The number of a key-value head among those of all batch entries."""
    return i32(batch * quotient(shape.num_heads_q, shape.group_size) + head_kv)


@cache
def make_place_of_queries(tile_m):
    """place_of_queries(number, shape): the `Place` of a tile of tile_m queries of one head.

    The last rows come first: in a causal problem they see the most keys.
    """

    @function_of_numbers
    def place_of_queries(number, shape):
        num_tiles = tiles_of(shape.seqlen_q, tile_m)
        tile, head, batch = place_in_heads(number, num_tiles, shape.num_heads_q)
        start = i32((num_tiles - 1 - tile) * tile_m)
        return Place(start, head, quotient(head, shape.group_size), batch, i32(0))

    return place_of_queries


@cache
def make_place_of_keys(tile_n):
    """place_of_keys(number, shape): the `Place` of a tile of tile_n keys of one head.

    The first keys come first: in a causal problem the most queries see them.
    """

    @function_of_numbers
    def place_of_keys(number, shape):
        num_tiles = tiles_of(shape.seqlen_k, tile_n)
        num_heads_kv = quotient(shape.num_heads_q, shape.group_size)
        tile, head_kv, batch = place_in_heads(number, num_tiles, num_heads_kv)
        start, head = i32(tile * tile_n), i32(head_kv * shape.group_size)
        return Place(start, head, head_kv, batch, i32(0))

    return place_of_keys


@device_function
def grid_of(shape, layout):
    """The `Grid` of a forward, from the records `kernels.arguments.Shape` and `Layout`."""
    num_rows, num_heads = shape.seqlen_q * layout.pack, shape.batch_size * shape.num_heads_q
    return Grid(
        i32(num_rows), i32(num_heads), layout.pack, layout.num_splits, layout.heads_in_flight
    )


@cache
def make_place_of(tile_m):
    """place_of(number, grid, shape): the `Place` of a tile of rows, see `make_block_place`."""
    block_place = make_block_place(tile_m)

    @function_of_numbers
    def place_of(number, grid, shape):
        start, head_of_batch, split = block_place(number, grid)
        batch, head = divide(head_of_batch, shape.num_heads_q)
        return Place(start, head, quotient(head, shape.group_size), batch, split)

    return place_of


@cache
def make_block_place(tile_m):
    """block_place(place, grid)

    (first row, first head of all batch entries, split of the keys) of a tile of rows. Heads go in
    bundles of heads_in_flight, whose K and V are read at about the same time. In the last bundle
    the last rows, which in a causal problem see the most keys, come first, in the one before it
    they come last, and so on: from one place to the next the work changes little.
    """

    @function_of_numbers
    def block_place(place, grid):
        num_rows, num_heads, pack, num_splits, heads_in_flight = grid
        in_order = u32(place // u32(num_splits))
        split = u32(place - in_order * u32(num_splits))
        num_m_blocks = u32(u32(num_rows + tile_m - 1) // u32(tile_m))
        per_bundle = u32(u32(heads_in_flight) * num_m_blocks)
        packed_heads = u32(u32(num_heads) // u32(pack))
        number = u32(in_order // per_bundle)
        later_bundles = u32((packed_heads - u32(1)) // u32(heads_in_flight) - number)
        first_head = u32(number * u32(heads_in_flight))
        bundle = u32(min(u32(heads_in_flight), packed_heads - first_head))
        in_bundle = u32(in_order - first_head * num_m_blocks)
        m_block = u32(in_bundle // bundle)
        head = first_head + in_bundle - m_block * bundle
        if later_bundles % u32(2) == u32(0):
            m_block = u32(num_m_blocks - u32(1) - m_block)
        return i32(m_block * u32(tile_m)), i32(head * u32(pack)), i32(split)

    return block_place


@cache
def make_walk(tile_m):
    """walk(grid): (first place, step, number of places); `next_place` leads on."""

    @device_function
    def walk(grid):
        num_rows, num_heads, pack, num_splits, _ = grid
        num_m_blocks = u32(num_rows + tile_m - 1) // u32(tile_m)
        num_places = u32(num_m_blocks * (u32(num_heads) // u32(pack)) * u32(num_splits))
        place = mov_ctaid_x()
        return place, u32(u32(2) * (mov_nctaid_x() - place) - u32(1)), num_places

    return walk


@device_function
def next_place(place, step):
    """The place that a block takes after this one, and the next step.

    Rounds alternate direction: where places become cheaper one after the other, a block that got
    a long tile gets a short one next, and all have as much to do.
    """
    return u32(place + step), u32(u32(2) * mov_nctaid_x() - step)


# The sequence of a place, and the keys that its rows see


@device_function
def sequence_of(shape, mask):
    """The `Sequence` of each batch entry of arrays in which all are of one length."""
    return Sequence(shape.seqlen_q, shape.seqlen_k, i32(0), i32(0), mask.lo, mask.hi)


@device_function
def seen_from_keys(sequence):
    """A `Sequence` with queries for keys and keys for queries: key j sees the queries i."""
    return Sequence(
        sequence.seqlen_k,
        sequence.seqlen_q,
        sequence.first_k,
        sequence.first_q,
        i32(-sequence.hi),
        i32(-sequence.lo),
    )


@device_function
def last_of(start, rows, seqlen):
    """The last of so many rows from `start` on that is in the sequence."""
    return i32(min(start + rows, seqlen) - 1)


@function_of_numbers
def tiles_seen(first, last, stage_n, sequence):
    """The `Keys`, in stages of stage_n, that some of the queries `first` to `last` see."""
    end = max(0, min(sequence.seqlen_k, last + sequence.hi + 1))
    return Keys(quotient(max(0, first + sequence.lo), stage_n), tiles_of(end, stage_n))


@function_of_numbers
def tiles_seen_whole(first, last, tile_n, sequence):
    """The tiles of tile_n keys that all of the queries `first` to `last` see, as `Whole`."""
    end = min(sequence.seqlen_k, first + sequence.hi + 1)
    return Whole(i32(last + sequence.lo), i32(end - tile_n))


@function_of_numbers
def tokens_of(row, rows, pack, sequence):
    """(first, last): the tokens of so many rows from `row` on, of heads that are packed."""
    last_row = last_of(row, rows, sequence.seqlen_q * pack)
    return token_of_row(row, pack), token_of_row(last_row, pack)


@cache
def make_whole_keys(tile_n, rows):
    """whole_keys(row, grid, sequence): the tiles that all of `rows` rows from `row` on see."""

    @function_of_numbers
    def whole_keys(row, grid, sequence):
        first, last = tokens_of(row, rows, grid.pack, sequence)
        return tiles_seen_whole(first, last, tile_n, sequence)

    return whole_keys
