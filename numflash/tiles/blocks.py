"""The work of a block: its tile, and the head and batch entry of that tile.

    Grid        the tiles of a forward, as the host laid them out over blocks
    Place       the tile of one block; a RaggedPlace where sequences have lengths of their own

All threads of a block compute them, or one for them. The sequence of a place, and the keys that
its rows see, are in `tiles.sequences`.
"""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, function_of_numbers, i32, mov_ctaid_x, mov_nctaid_x, u32
from numflash.ptx.clusters import mov_clusterid_x, mov_nclusterid_x
from numflash.tiles.division import divide, quotient, tiles_of
from numflash.tiles.sequences import Keys, Sequence


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


class RaggedPlace(NamedTuple):
    """The tile of a block where sequences have lengths of their own: a `Place`, and more.

    Attributes:
        sequence: its `Sequence`.
        tiles: `Keys`, the tiles of the other side in its split that the band lets it see.
        slot: the place of its part among `parts`; -1 if its tile is not split.
    """

    start: i32
    head: i32
    head_kv: i32
    batch: i32
    split: i32
    sequence: Sequence
    tiles: Keys
    slot: i32


# The records of sequences that have lengths of their own: `kernels.sequences.schedule`. On the
# host `problem.sequences` and `reference.sequences` have the same numbers.

HEADER_WORDS = RECORD_WORDS = 8
ENTRY_BITS = 20
"""The last word of a record has the number of the sequence in these bits; above is the split's."""


@device_function
def _place_of_record(number, head, slot, shape, mask):
    """The `RaggedPlace` of a record and a query head; `shape` is a `RaggedShape`."""
    records, at = shape.records, i32(HEADER_WORDS + RECORD_WORDS * number)
    seqlen_q, seqlen_k = records[at + 1], records[at + 3]
    word = records[at + 7]
    shift = i32(shape.aligned * (seqlen_k - seqlen_q))
    sequence = Sequence(
        seqlen_q,
        seqlen_k,
        records[at],
        records[at + 2],
        i32(mask.lo + shift),
        i32(mask.hi + shift),
        shift,
    )
    return RaggedPlace(
        records[at + 4],
        head,
        quotient(head, shape.group_size),
        i32(word & ((1 << ENTRY_BITS) - 1)),
        i32(u32(word) >> u32(ENTRY_BITS)),
        sequence,
        Keys(records[at + 5], records[at + 6]),
        slot,
    )


@device_function
def _beyond_records(number, heads, shape):
    return number >= shape.records[0] * heads


@device_function
def _never_beyond(number, heads, shape):
    return False


def make_is_idle(traits):
    """is_idle(number, heads, shape): whether a block has no tile.

    The grid has `heads` blocks for each record that there may be; the list may be shorter.
    """
    return _beyond_records if traits.ragged else _never_beyond


@cache
def make_num_places_of_keys(tile_n, traits):
    """num_places_of_keys(shape): all tiles of tile_n keys of all key-value heads."""
    ragged = traits.ragged

    @device_function
    def num_places_of_keys(shape):
        heads = quotient(shape.num_heads_q, shape.group_size)
        if ragged:
            return i32(shape.records[0] * heads)
        return i32(tiles_of(shape.seqlen_k, tile_n) * i32(heads * shape.batch_size))

    return num_places_of_keys


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


@device_function
def _ragged_place_of_queries(number, shape, mask):
    record, head = divide(number, shape.num_heads_q)
    return _place_of_record(record, head, i32(-1), shape, mask)


@device_function
def _ragged_place_of_keys(number, shape, mask):
    record, head_kv = divide(number, quotient(shape.num_heads_q, shape.group_size))
    return _place_of_record(record, i32(head_kv * shape.group_size), i32(-1), shape, mask)


@cache
def make_place_in_turn(traits):
    """place_in_turn(number, num_tiles, rows, num_heads, batch_size): (tile, head, batch)

    The tiles of heads of `rows` rows, where the first tile of a head has the most work. Heads come
    in bundles of `Traits.rows_in_turn`, of which only the first may have fewer: of a bundle the
    first tiles of all heads come first, then the second ones. So the last blocks to begin are
    short.
    """
    rows_in_turn = traits.rows_in_turn

    @function_of_numbers
    def place_in_turn(number, num_tiles, rows, num_heads, batch_size):
        in_flight = max(i32(1), quotient(i32(rows_in_turn), rows))
        heads = i32(batch_size * num_heads)
        # Counted from the end, where bundles are whole.
        from_end = i32(heads * num_tiles - 1 - number)
        behind = i32(quotient(from_end, in_flight * num_tiles) * in_flight)
        bundle = min(in_flight, i32(heads - behind))
        tile, head = divide(i32(from_end - behind * num_tiles), bundle)
        batch, head = divide(i32(heads - 1 - behind - head), num_heads)
        return i32(num_tiles - 1 - tile), head, batch

    return place_in_turn


@cache
def make_place_of_queries(tile_m, traits):
    """place_of_queries(number, shape, mask): the `Place` of a tile of tile_m queries of one head.

    The last rows come first: in a causal problem they see the most keys. Heads take turns.
    """
    if traits.ragged:
        return _ragged_place_of_queries
    place_in_turn = make_place_in_turn(traits)

    @function_of_numbers
    def place_of_queries(number, shape, mask):
        num_tiles = tiles_of(shape.seqlen_q, tile_m)
        tile, head, batch = place_in_turn(
            number, num_tiles, shape.seqlen_q, shape.num_heads_q, shape.batch_size
        )
        start = i32((num_tiles - 1 - tile) * tile_m)
        return Place(start, head, quotient(head, shape.group_size), batch, i32(0))

    return place_of_queries


@cache
def make_place_of_keys(tile_n, traits):
    """place_of_keys(number, shape, mask): the `Place` of a tile of tile_n keys of one head.

    The first keys come first: in a causal problem the most queries see them. Heads take turns.
    """
    if traits.ragged:
        return _ragged_place_of_keys
    place_in_turn = make_place_in_turn(traits)

    @function_of_numbers
    def place_of_keys(number, shape, mask):
        num_tiles = tiles_of(shape.seqlen_k, tile_n)
        num_heads_kv = quotient(shape.num_heads_q, shape.group_size)
        tile, head_kv, batch = place_in_turn(
            number, num_tiles, shape.seqlen_k, num_heads_kv, shape.batch_size
        )
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


@device_function
def _ragged_place_of(number, grid, shape, mask):
    record, packed_head = divide(number, quotient(shape.num_heads_q, grid.pack))
    return _place_of_record(record, i32(packed_head * grid.pack), i32(-1), shape, mask)


@device_function
def _ragged_place_of_split(number, grid, shape, mask):
    record, packed_head = divide(number, quotient(shape.num_heads_q, grid.pack))
    slot = shape.slots[record]
    return _place_of_record(record, i32(packed_head * grid.pack), slot, shape, mask)


@cache
def make_place_of(tile_m, traits, is_split=False):
    """place_of(number, grid, shape, mask): the `Place` of a tile of rows.

    The order is that of `make_block_place`. Where sequences have lengths of their own, it is that
    of the records; the heads of a record come one after the other.
    """
    if traits.ragged:
        return _ragged_place_of_split if is_split else _ragged_place_of
    block_place = make_block_place(tile_m)

    @function_of_numbers
    def place_of(number, grid, shape, mask):
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
def make_walk(tile_m, traits, cluster=1):
    """walk(grid, shape): (first place, number of places); `next_place` leads on.

    Where blocks are in clusters a cluster takes places, of tile_m rows, as otherwise a block does.
    """
    ragged, alone = traits.ragged, cluster == 1

    @device_function
    def walk(grid, shape):
        num_rows, num_heads, pack, num_splits, _ = grid
        if ragged:
            num_places = u32(u32(shape.records[0]) * (u32(shape.num_heads_q) // u32(pack)))
        else:
            num_m_blocks = u32(num_rows + tile_m - 1) // u32(tile_m)
            num_places = u32(num_m_blocks * (u32(num_heads) // u32(pack)) * u32(num_splits))
        return mov_ctaid_x() if alone else mov_clusterid_x(), num_places

    return walk


@device_function
def next_place(place, odd):
    """The place that a block takes after this one.

    `odd` is 1 if it has taken an odd number of places, this one among them, and 0 if an even one:
    a kernel has such a parity anyway, and needs no register for a step.

    Rounds alternate direction: where places become cheaper one after the other, a block that got
    a long tile gets a short one next, and all have as much to do.
    """
    block, blocks = mov_ctaid_x(), mov_nctaid_x()
    after = u32(blocks - block - u32(1)) if odd != 0 else block
    return u32(place + u32(2) * after + u32(1))


@device_function
def next_place_of_cluster(place, odd):
    """The place that a cluster takes after this one: as `next_place`, all its blocks the same."""
    cluster, clusters = mov_clusterid_x(), mov_nclusterid_x()
    after = u32(clusters - cluster - u32(1)) if odd != 0 else cluster
    return u32(place + u32(2) * after + u32(1))
