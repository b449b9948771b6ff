"""The sequence of a place, and the keys that its rows see.

Sequence    the queries and keys of the batch entry that a tile is of, and its band
Keys        the stages of keys that the rows of the tile see
Whole       the tiles of keys that all of these rows see: they need no mask
"""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, function_of_numbers, i32
from numflash.tiles.addresses import token_of_row
from numflash.tiles.division import quotient, tiles_of


class Sequence(NamedTuple):
    """The queries and keys of a batch entry. Query i sees the keys j with lo <= j - i <= hi.

    Attributes:
        seqlen_q, seqlen_k: their numbers.
        first_q, first_k: the rows of the first in their arrays.
        lo, hi: the band. Both count from the first query and the first key.
        shift: how far the band is moved for this sequence: aligned * (seqlen_k - seqlen_q) of a
            `RaggedShape`, and 0 where all sequences are of one length.
    """

    seqlen_q: i32
    seqlen_k: i32
    first_q: i32
    first_k: i32
    lo: i32
    hi: i32
    shift: i32


class Keys(NamedTuple):
    """The stages of keys from `begin` up to, but without, `end`; none where that is not above."""

    begin: i32
    end: i32


class Whole(NamedTuple):
    """Tiles that begin at a key from `first` to `last` need no mask."""

    first: i32
    last: i32


@device_function
def sequence_of_all(shape, mask):
    """The `Sequence` of each batch entry of arrays in which all are of one length."""
    return Sequence(shape.seqlen_q, shape.seqlen_k, i32(0), i32(0), mask.lo, mask.hi, i32(0))


@device_function
def _sequence_of_any(place, shape, mask):
    return sequence_of_all(shape, mask)


@device_function
def _sequence_of_record(place, shape, mask):
    return place.sequence


def make_sequence_of(traits):
    """sequence_of(place, shape, mask): the `Sequence` of a place."""
    return _sequence_of_record if traits.ragged else _sequence_of_any


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
        i32(-sequence.shift),
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
