"""From raw products to attention scores: scale, features, and the keys that a query sees.

Masks are bands: query i sees the keys j with band_lo <= j - i <= band_hi, and j < seqlen_k.
Causal attention and sliding windows are bands; without either, the band is everything.
"""

import math
from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, f32, i32
from numflash.tiles.features import looks_at_distances

NEG_INF = f32(-math.inf)


class Corner(NamedTuple):
    """The first score of a thread in a tile, from which its others count.

    Attributes:
        row, column: a row and a key; in a tile whose rows are keys, a key and a query.
        sequence: the `Sequence` of both.
        is_full: whether the caller's mask keeps every key of the tile, and is not asked.
    """

    row: i32
    column: i32
    sequence: object
    is_full: bool


@cache
def make_place(by_row, stopped=frozenset("ij")):
    """place(corner, r, c, scores): (i, j) of the score r rows and c columns from a corner.

    As the caller's program counts them. Those that are `stopped` stop at the ends of the sequence:
    the last query or key stands for others, which the mask hides. Rows are queries: none are
    packed where a function looks at them (`Traits.of_a_head`).
    """
    stops_i, stops_j = "i" in stopped, "j" in stopped

    @device_function
    def place(corner, r, c, scores):
        row, column, sequence = i32(corner.row + r), i32(corner.column + c), corner.sequence
        i, j = (row, column) if by_row else (column, row)
        i = min(i, i32(sequence.seqlen_q - 1)) if stops_i else i
        j = min(j, i32(sequence.seqlen_k - 1)) if stops_j else j
        return i32(i + scores.given.row), i32(j + scores.given.column)

    return place


@device_function
def _no_place(corner, r, c, scores):
    return i32(0), i32(0)


@cache
def make_distance(traits, by_row):
    """distance(corner, scores): i - j at a corner, float32, as the caller's program counts them.

    0 where it does not look at distances alone.
    """
    if not looks_at_distances(traits):
        return _no_distance

    @device_function
    def distance(corner, scores):
        row, column, given = corner.row, corner.column, scores.given
        far = i32(row - column) if by_row else i32(column - row)
        return f32(i32(far + given.row - given.column))

    return distance


@device_function
def _no_distance(corner, scores):
    return f32(0)


def make_place_of_score(traits, by_row, stopped):
    """place_of_score(corner, r, c, scores): as `make_place`, if a score function looks at it."""
    return make_place(by_row, stopped) if traits.program_scores else _no_place
