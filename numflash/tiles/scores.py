"""From raw products to attention scores: scale, softcap, ALiBi, and which keys a query may see.

Masks are bands: query i sees the keys j with band_lo <= j - i <= band_hi, and j < seqlen_k.
Causal attention and sliding windows are bands; without either, the band is everything.

Score i of a thread is in its row i // columns and its column i % columns. The loops over scores
are flat because the compiler for Blackwell does not unroll nested ones, and a tile that is indexed
by a loop's variable lies in local memory, not in registers.
"""

import math
from functools import cache

from numflash.ptx import cuda, device_function, f32, fma_rn_f32
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES

NEG_INF = f32(-math.inf)


@cache
def make_scale_scores(rows, columns, softcap, alibi):
    """scale_scores(s_acc, cap_slopes, row, column, shift, scores, slope)

    Turns products Q K^T into scores, in place: s = scale * s; with softcap, where `scale` is
    softmax_scale / softcap, s = softcap * tanh(s); with ALiBi,
    s -= slope * |row + shift - column|. `scores` is a record with `scale` and `softcap`.
    `cap_slopes` receives the derivative 1 - tanh(s)^2 of the capped by the raw score, which the
    backward needs.
    """
    n_scores = rows * columns

    @device_function
    def scale_scores(s_acc, cap_slopes, row, column, shift, scores, slope):
        for i in range(n_scores):
            s = s_acc[i] * scores.scale
            if softcap:
                bent = f32(math.tanh(s))
                cap_slopes[i] = fma_rn_f32(-bent, bent, f32(1))
                s = scores.softcap * bent
            if alibi:
                r, c = i // columns, i % columns
                distance = row + ROW_LANES * r + shift - column - COLUMN_LANES * c
                s = fma_rn_f32(-slope, f32(abs(distance)), s)
            s_acc[i] = s

    return scale_scores


@cache
def make_slope_of(alibi):
    """slope_of(record, batch, head): ALiBi's slope of a head, 0 without ALiBi.

    `record` has the `slopes` and their strides `batch` and `head`.
    """

    @device_function
    def slope_of(record, batch, head):
        if alibi:
            return record.slopes[batch * record.batch + head * record.head]
        return f32(0)

    return slope_of


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
