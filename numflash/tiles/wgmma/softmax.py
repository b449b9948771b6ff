"""Online softmax of a warpgroup in base 2, apart from the rescaling of O.

While the tensor cores still add to O, it cannot be rescaled: `make_online_softmax` turns S to P
and returns the factors for O. The method is that of `tiles.mma.softmax`.
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, max_f32
from numflash.tiles.mma.softmax import (
    follow_maximum,
    limit_of_row,
    make_exponentials,
    make_subtract_from_rows,
    row_max_of_quad,
    shift_of_row,
)
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.scores import NEG_INF


@cache
def make_online_softmax(n_tiles):
    """online_softmax(s_acc, rows, factors, scale_log2): S -> P in place.

    True if O must be multiplied by `factors`, a row each, before anything is added to it.
    scale_log2 is positive. `rows` are four arrays over the two rows of a thread: row_max; row_sum,
    this lane's share until the end; and kept because registers are left, limits and shifts, as
    `limit_of_row` and `shift_of_row` give them.
    """
    largest_of_rows = make_largest_of_rows(n_tiles)
    subtract_from_rows = make_subtract_from_rows(1, n_tiles)
    exponentials = make_exponentials(1, n_tiles)

    @device_function
    def online_softmax(s_acc, rows, factors, scale_log2):
        row_max, row_sum, limits, shifts = rows
        largest = cuda.local.array(2, f32)
        subtrahends = cuda.local.array(2, f32)
        largest[0], largest[1] = largest_of_rows(s_acc)
        has_grown = (largest[0] > limits[0]) | (largest[1] > limits[1])
        has_grown = cuda.any_sync(FULL_WARP, has_grown)
        if has_grown:
            for r in range(2):
                grows = largest[r] > limits[r]
                subtrahends[r] = follow_maximum(
                    r, grows, largest[r], row_max, row_sum, factors, scale_log2
                )
                limits[r] = limit_of_row(row_max[r], scale_log2)
                shifts[r] = shift_of_row(row_max[r], scale_log2)
            is_huge = (subtrahends[0] != f32(0)) | (subtrahends[1] != f32(0))
            if cuda.any_sync(FULL_WARP, is_huge):
                subtract_from_rows(s_acc, subtrahends)
        exponentials(s_acc, scale_log2, shifts, row_sum)
        return has_grown

    return online_softmax


@device_function
def begin_rows(limits, shifts):
    """Rows that have seen no key: the values kept of them beside row_max and row_sum."""
    for r in range(2):
        limits[r], shifts[r] = NEG_INF, f32(0)


@cache
def make_largest_of_rows(n_tiles):
    """largest_of_rows(s_acc): of both rows of a thread the largest score, over their quad."""

    @device_function
    def largest_of_rows(s_acc):
        # Two chains of maxima a row: half the latency.
        above, above_too, below, below_too = s_acc[0], s_acc[1], s_acc[2], s_acc[3]
        for tile in range(1, n_tiles):
            above = max_f32(above, s_acc[4 * tile])
            above_too = max_f32(above_too, s_acc[4 * tile + 1])
            below = max_f32(below, s_acc[4 * tile + 2])
            below_too = max_f32(below_too, s_acc[4 * tile + 3])
        above = row_max_of_quad(max_f32(above, above_too))
        below = row_max_of_quad(max_f32(below, below_too))
        return above, below

    return largest_of_rows
