"""From raw products to attention scores: scale, features, and the keys that a query sees.

Masks are bands: query i sees the keys j with band_lo <= j - i <= band_hi, and j < seqlen_k.
Causal attention and sliding windows are bands; without either, the band is everything.

Score i of a thread is in its row i // columns and its column i % columns. The loops over scores
are flat because the compiler for Blackwell does not unroll nested ones, and a tile that is indexed
by a loop's variable lies in local memory, not in registers.
"""

import math
from functools import cache
from typing import NamedTuple

from numflash.ptx import cuda, device_function, f32, i32
from numflash.tiles.features import At, looks_at_distances, make_keep, make_score
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES

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


@cache
def make_apply_functions(rows, columns, traits, by_row, keeps_slopes, after_features=False):
    """apply_functions(s_acc, slopes, corner, scores, args)

    Turns products Q K^T into scores, in place: s = scores.scale s, and what the functions of
    `traits` make of it; `args` are theirs. With keeps_slopes `slopes` receives the derivative
    of each score by the scaled product, or with after_features by what features made of that.
    Queries are the rows of the tile, or its columns.
    """
    n_scores, score = rows * columns, make_score(traits, after_features)
    stopped = traits.program_indexes
    place, place_of_score = (
        make_place(by_row, stopped),
        make_place_of_score(traits, by_row, stopped),
    )
    has_keep, keep = traits.keeps_scores, make_keep(traits)
    distance = make_distance(traits, by_row)

    @device_function
    def apply_functions(s_acc, slopes, corner, scores, args):
        row, column, shift = corner.row, corner.column, scores.shift
        first = f32(i32(row + shift - column if by_row else column + shift - row))
        far = distance(corner, scores)
        for n in range(n_scores):
            r, c = ROW_LANES * (n // columns), COLUMN_LANES * (n % columns)
            step = f32(c - r if by_row else r - c)
            i, j = place_of_score(corner, r, c, scores)
            s, slope = score(s_acc[n] * scores.scale, At(first, far, step, i, j), args)
            if keeps_slopes:
                slopes[n] = slope
            s_acc[n] = s
        if has_keep and not corner.is_full:
            for n in range(n_scores):
                r, c = ROW_LANES * (n // columns), COLUMN_LANES * (n % columns)
                step = f32(c - r if by_row else r - c)
                i, j = place(corner, r, c, scores)
                is_kept = keep(At(f32(0), far, step, i, j), args)
                s_acc[n] = s_acc[n] if is_kept else NEG_INF

    return apply_functions


@cache
def make_mask_scores(rows, columns):
    """mask_scores(s_acc, row, column, end, mask)

    Sets scores to -inf where column - row is not between mask.lo and mask.hi, or column is not
    below `end`.
    """
    n_scores = rows * columns

    @device_function
    def mask_scores(s_acc, row, column, end, mask):
        for i in range(n_scores):
            j = column + COLUMN_LANES * (i % columns)
            distance = j - row - ROW_LANES * (i // columns)
            if j >= end or distance < mask.lo or distance > mask.hi:
                s_acc[i] = NEG_INF

    return mask_scores


@device_function
def first_row_of_thread(rows_per_warp):
    """This thread's first row in a tile."""
    return cuda.threadIdx.x // 32 * rows_per_warp + cuda.threadIdx.x % 32 // COLUMN_LANES
