"""From raw products to attention scores: softcap, ALiBi, and which keys a query may see.

Scores are kept in base 2: a score here is log2(e) times the score of the paper, so that the
softmax needs `ex2`, the exponential that the hardware has. The factor is folded, with
softmax_scale, into one operand of the product when its tile is loaded.

Masks are bands: query i sees the keys j with band_lo <= j - i <= band_hi, and j < seqlen_k.
Causal attention and sliding windows are bands; without either, the band is everything.
"""

import math
from functools import cache

from numflash.ptx import cuda, device_function, f32
from numflash.tiles.lanes import COLUMN_LANES, ROW_LANES


NEG_INF = f32(-math.inf)


@cache
def make_bend_scores(rows, columns, softcap, alibi):
    """bend_scores(s_acc, slopes, row, column, bias_shift, softcap_log2, slope_log2)

    Applies softcap, then ALiBi, to raw products in base 2, in place:
    s = softcap_log2 * tanh(s), then s -= slope_log2 * |row + bias_shift - column|.
    Where softcap is on, `slopes` receives its derivative 1 - tanh(s)^2, which the backward needs.
    """

    @device_function
    def bend_scores(s_acc, slopes, row, column, bias_shift, softcap_log2, slope_log2):
        for r in range(rows):
            for c in range(columns):
                s = s_acc[columns * r + c]
                if softcap:
                    bent = f32(math.tanh(s))
                    slopes[columns * r + c] = f32(1) - bent * bent
                    s = softcap_log2 * bent
                if alibi:
                    distance = row + ROW_LANES * r + bias_shift - column - COLUMN_LANES * c
                    s -= slope_log2 * f32(abs(distance))
                s_acc[columns * r + c] = s

    return bend_scores


@cache
def make_mask_scores(rows, columns):
    """mask_scores(s_acc, row, column, key_axis_end, band_lo, band_hi)

    Sets scores to -inf where column - row is outside the band or column is past the end.
    """

    @device_function
    def mask_scores(s_acc, row, column, end, band_lo, band_hi):
        for r in range(rows):
            for c in range(columns):
                j = column + COLUMN_LANES * c
                distance = j - row - ROW_LANES * r
                if j >= end or distance < band_lo or distance > band_hi:
                    s_acc[columns * r + c] = NEG_INF

    return mask_scores


@device_function
def band_is_partial(row, rows, column, columns, end, band_lo, band_hi):
    """Whether some score of the rows x columns block at (row, column) is masked."""
    return (
        column + columns > end
        or column + columns - 1 - row > band_hi
        or column - (row + rows - 1) < band_lo
    )


@device_function
def band_block_begin(row, band_lo, tile):
    """The first column block that some row from `row` on sees."""
    return max(0, row + band_lo) // tile


@device_function
def band_block_end(last_row, band_hi, num_columns, tile):
    """One past the last column block that some row up to `last_row` sees."""
    return (min(num_columns, max(0, last_row + band_hi + 1)) + tile - 1) // tile


@device_function
def first_row_of_thread(rows_per_warp):
    """This thread's first row in a tile."""
    return cuda.threadIdx.x // 32 * rows_per_warp + cuda.threadIdx.x % 32 // COLUMN_LANES
