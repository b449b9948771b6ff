"""The order in which blocks of keys add to dQ of a tile of queries, always the same.

Each tile of queries of a query head has a turn, a number that begins at 0. A block adds to the
tile when the turn equals its rank there, and then adds 1 to the turn; the last block makes it 0
again, so that a launch may be repeated. Blocks begin in the order of their numbers
(`cuda.blockIdx`), the last keys of a head come first, and the rank counts the blocks of later keys
that the tile sees:

    rank = last_block - block

"Block" is here what works on a tile of keys. Where blocks draw such places one after another, the
order is that of the draws (`kernels.wgmma.places`).

With a block mask it counts the tiles of keys that the list of the tile of queries has. A block
therefore waits only for blocks that began before it: the earliest that has not ended waits for
nobody, and all end, however few run at once and whatever else runs on the GPU. A block walks over
the tiles that see its keys, the first of them first. With a causal mask the first is on the
block's own diagonal, so blocks of a head that run at once are at different tiles. Where all tiles
see all keys a block follows the one before it, some tiles behind. That is predicted to cost
little, because the blocks of several heads take turns: fewer of one head begin at once.

Sequences that have lengths of their own have a list of tiles of keys in which those of a sequence
follow each other, the last one first (`ListShape.in_turn`). All heads of a tile take turns.

Source: FlashAttention PR 1893 for the order of causal blocks.
"""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, function_of_numbers, i32, u32
from numflash.tiles import blocks, steps
from numflash.tiles.blocks import Place
from numflash.tiles.division import divide, quotient, tiles_of
from numflash.tiles.sequences import Keys


@cache
def make_place_of_last_keys(tile_n, traits):
    """place_of_last_keys(number, shape, mask): the `Place` of a tile of tile_n keys; see above.

    `shape` is a record of `kernels.arguments.turns_shape_of`. Of a `BundledShape`,
    `heads_in_flight` key-value heads take turns, then the next ones.
    """
    if traits.ragged:
        return blocks.make_place_of_keys(tile_n, traits)

    @function_of_numbers
    def place_of_last_keys(number, shape, mask):
        num_blocks = tiles_of(shape.seqlen_k, tile_n)
        num_heads_kv = quotient(shape.num_heads_q, shape.group_size)
        bundle = quotient(number, shape.heads_in_flight * num_blocks)
        first = i32(bundle * shape.heads_in_flight)
        in_flight = min(shape.heads_in_flight, shape.batch_size * num_heads_kv - first)
        block, head = divide(number - first * num_blocks, in_flight)
        batch, head_kv = divide(first + head, num_heads_kv)
        start = i32((num_blocks - 1 - block) * tile_n)
        return Place(start, i32(head_kv * shape.group_size), head_kv, batch, i32(0))

    return place_of_last_keys


class Places(NamedTuple):
    """The places of a batch entry's tiles of queries among all that have sums and a turn.

    Attributes:
        num_tiles: of each query head.
        first_head: before the entry's heads so many have places.
        first_tile: before the entry's tiles so many of a head have places.
    """

    num_tiles: i32
    first_head: i32
    first_tile: i32


@cache
def make_places_of(tile_m, traits):
    """places_of(batch, shape): the `Places` of a batch entry; `shape` is a record as above."""

    @function_of_numbers
    def places_of(batch, shape):
        num_tiles = tiles_of(shape.seqlen_q, tile_m)
        return Places(num_tiles, batch * shape.num_heads_q, 0)

    @device_function
    def places_in_list(batch, shape):
        return Places(shape.most_tiles, i32(0), shape.tiles_before[batch])

    return places_in_list if traits.ragged else places_of


@function_of_numbers
def place_of_tile(tile, head, places):
    """The place of a tile of queries of a query head."""
    first = i32(i32(places.first_head + head) * places.num_tiles)
    return i32(first + i32(places.first_tile + tile))


@cache
def make_has_place(traits):
    """has_place(tile, places): whether a tile of queries has a place.

    Where sequences have lengths of their own, tiles that overlap may have none.
    """

    @function_of_numbers
    def all_have_places(tile, places):
        return True

    @function_of_numbers
    def has_place(tile, places):
        return places.first_tile + tile < places.num_tiles

    return has_place if traits.ragged else all_have_places


@cache
def make_last_block(tile_m, tile_n):
    """last_block(tile, sequence): the last tile of keys whose block adds to a tile of queries.

    Only for tiles that see keys (`is_seen`). Both say from the side of queries what `tiles_seen`
    says from the side of keys: rows of a tile that are past the end of the sequence count, too.
    """

    @function_of_numbers
    def last_block(tile, sequence):
        last_key = i32(i32(tile * tile_m) + i32(sequence.hi + tile_m - 1))
        return quotient(min(last_key, i32(sequence.seqlen_k - 1)), tile_n)

    return last_block


@cache
def make_first_block(tile_m, tile_n):
    """first_block(tile, sequence): the first such tile of keys; see `make_last_block`."""

    @function_of_numbers
    def first_block(tile, sequence):
        return quotient(max(i32(0), i32(i32(tile * tile_m) + sequence.lo)), tile_n)

    return first_block


@cache
def make_rank_of(tile_m, tile_n, traits):
    """rank_of(block, tile, head, batch, sequence, mask)

    How many blocks of keys add to a tile of queries of a query head before this one. `mask` lists
    by queries, here and below.
    """
    last_block, steps_of = make_last_block(tile_m, tile_n), steps.make_steps_of(traits, tile_n)

    @function_of_numbers
    def rank_of(block, tile, head, batch, sequence, mask):
        return u32(last_block(tile, sequence) - block)

    @device_function
    def rank_in_list(block, tile, head, batch, sequence, mask):
        before = Keys(i32(block + 1), i32(last_block(tile, sequence) + 1))
        begin, end = steps_of(mask, batch, head, i32(tile * tile_m), before)
        return u32(end - begin)

    return rank_in_list if traits.blocks else rank_of


@cache
def make_adds_last(tile_m, tile_n, traits):
    """adds_last(block, tile, head, batch, sequence, mask): whether no block adds after it."""
    first_block, steps_of = make_first_block(tile_m, tile_n), steps.make_steps_of(traits, tile_n)

    @function_of_numbers
    def adds_last(block, tile, head, batch, sequence, mask):
        return block == first_block(tile, sequence)

    @device_function
    def is_first_in_list(block, tile, head, batch, sequence, mask):
        after = Keys(i32(first_block(tile, sequence)), i32(block))
        begin, end = steps_of(mask, batch, head, i32(tile * tile_m), after)
        return begin == end

    return is_first_in_list if traits.blocks else adds_last


@cache
def make_has_sums(tile_m, tile_n, traits):
    """has_sums(tile, head, batch, sequence, mask): whether blocks add to a tile of queries."""
    last_block, first_block = make_last_block(tile_m, tile_n), make_first_block(tile_m, tile_n)
    is_seen, steps_of = make_is_seen(tile_m, tile_n), steps.make_steps_of(traits, tile_n)

    @function_of_numbers
    def has_sums(tile, head, batch, sequence, mask):
        return is_seen(tile, sequence)

    @device_function
    def has_sums_by_list(tile, head, batch, sequence, mask):
        if not is_seen(tile, sequence):
            return False
        seen = Keys(i32(first_block(tile, sequence)), i32(last_block(tile, sequence) + 1))
        begin, end = steps_of(mask, batch, head, i32(tile * tile_m), seen)
        return begin < end

    return has_sums_by_list if traits.blocks else has_sums


@cache
def make_is_seen(tile_m, tile_n):
    """is_seen(tile, sequence): whether the band lets a tile of queries see keys."""
    last_block = make_last_block(tile_m, tile_n)

    @function_of_numbers
    def is_seen(tile, sequence):
        if sequence.seqlen_k == 0 or tile * tile_m + tile_m - 1 + sequence.hi < 0:
            return False
        end = min((last_block(tile, sequence) + 1) * tile_n, sequence.seqlen_k)
        return end > tile * tile_m + sequence.lo

    return is_seen
