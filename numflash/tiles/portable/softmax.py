"""Online softmax, a row spread over the 8 lanes of `lanes`.

exp(x) is computed as 2 ** (x log2 e), by the exponential that the hardware has; the maximum is
subtracted before the multiplication, so that equal scores cancel exactly however large they are.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867), as
used in FlashAttention (arXiv 2205.14135, Algorithm 1) and FlashAttention-2 (arXiv 2307.08691).
"""

import math
from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, max_f32, st_shared_f32
from numflash.tiles.portable.dropout import make_weight
from numflash.tiles.portable.lanes import COLUMN_LANES, FULL_WARP, ROW_LANES
from numflash.tiles.scores import NEG_INF

LOG2_E = f32(math.log2(math.e))
LN_2 = f32(math.log(2))


@device_function
def exp_f32(x):
    """e ** x, to a few ulp; 0 for -inf."""
    return ex2_approx_ftz_f32(x * LOG2_E)


@device_function
def row_max_of_lanes(x):
    """The maximum over the 8 lanes that share a row, in all of them."""
    for i in range(3):
        distance = 1 << i
        x = max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, distance))
    return x


@device_function
def row_sum_of_lanes(x):
    """The sum over the 8 lanes that share a row, in all of them."""
    for i in range(3):
        distance = 1 << i
        x += cuda.shfl_xor_sync(FULL_WARP, x, distance)
    return x


@cache
def make_online_softmax(rows, columns, n_out, p_pitch, features):
    """online_softmax(s_acc, row_max, row_sum, o_acc, smem, p, kept)

    Takes in one block of scores: P = exp(S - row_max) goes to shared memory at `p`, this
    thread's first element of the tile; earlier sums are scaled to the new maximum.
    row_sum stays this lane's share until the end, when `row_sum_of_lanes` adds up the row. With
    features that weigh P, `kept` says of which scores it goes there (`tiles.portable.dropout`).
    """
    weight = make_weight(features)

    @device_function
    def online_softmax(s_acc, row_max, row_sum, o_acc, smem, p, kept):
        for r in range(rows):
            new_max = row_max[r]
            for c in range(columns):
                new_max = max_f32(new_max, s_acc[columns * r + c])
            new_max = row_max_of_lanes(new_max)
            # While a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
            shift = new_max if new_max > NEG_INF else f32(0)
            row_scale = exp_f32(row_max[r] - shift)
            row_max[r] = new_max
            row_sum[r] *= row_scale
            for c in range(columns):
                probability = exp_f32(s_acc[columns * r + c] - shift)
                row_sum[r] += probability
                probability = weight(kept, columns * r + c, probability)
                st_shared_f32(smem, p + ROW_LANES * p_pitch * r + COLUMN_LANES * c, probability)
            for j in range(n_out):
                o_acc[n_out * r + j] *= row_scale

    return online_softmax
