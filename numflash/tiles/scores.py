"""From raw products to attention scores: scale, features, and the keys that a query sees.

Masks are bands: query i sees the keys j with band_lo <= j - i <= band_hi, and j < seqlen_k.
Causal attention and sliding windows are bands; without either, the band is everything.

Score i of a thread is in its row i // columns and its column i % columns. The loops over scores
are flat because the compiler for Blackwell does not unroll nested ones, and a tile that is indexed
by a loop's variable lies in local memory, not in registers.
"""

import math
from functools import cache

from numflash.ptx import cuda, device_function, f32, i32
from numflash.tiles.features import make_score
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES

NEG_INF = f32(-math.inf)


@cache
def make_scale_scores_backward(rows, columns, features, by_row, keeps_slopes):
    """scale_scores(s_acc, slopes, row, column, scores, args)

    Turns products Q K^T into scores, in place: s = scores.scale s, and what the functions of
    `features` make of it; `args` are theirs. With keeps_slopes `slopes` receives the derivative
    of each score by the scaled product. Queries are the rows of the tile, or its columns.
    """
    n_scores, score = rows * columns, make_score(features)

    @device_function
    def scale_scores(s_acc, slopes, row, column, scores, args):
        first = f32(i32(row + scores.shift - column if by_row else column + scores.shift - row))
        for i in range(n_scores):
            r, c = ROW_LANES * (i // columns), COLUMN_LANES * (i % columns)
            key = f32(c - r if by_row else r - c)
            s, slope = score(s_acc[i] * scores.scale, first, key, args)
            if keeps_slopes:
                slopes[i] = slope
            s_acc[i] = s

    return scale_scores


@cache
def make_scale_scores(rows, columns, features):
    """scale_scores(s_acc, row, column, scores, args)

    As `make_scale_scores_backward` where nobody needs slopes.
    """
    scale_and_keep = make_scale_scores_backward(rows, columns, features, True, False)

    @device_function
    def scale_scores(s_acc, row, column, scores, args):
        scale_and_keep(s_acc, s_acc, row, column, scores, args)

    return scale_scores


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
