"""Softmax with P of 8 bits, and O's share of a tile, of a warpgroup; see `tiles.mma.fp8_softmax`.

P of a tile is in units of the tile's own largest score of the row. A tile's part of O is summed up
by itself; when it is added to O it is multiplied by its weight, which brings it to the units of O.
"""

from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    ld_shared_v4_f32,
)
from numflash.tiles.mma.fp8_softmax import (
    P_SCALE_LOG2,
    follow_top,
    limit_of_row,
    shift_of_row,
    top_of_row,
    unit_of_row,
)
from numflash.tiles.mma.fragments import MMA_COLUMNS
from numflash.tiles.mma.softmax import make_subtract_from_rows
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.quantize.conversions import make_encode
from numflash.tiles.scores import NEG_INF
from numflash.tiles.wgmma.softmax import make_largest_of_rows


@cache
def make_tile_softmax(n_tiles, key_scales):
    """tile_softmax(s_acc, rows, factors, scales, weights, smem, position): S -> P in place.

    `scales`, positive, bring each row of S to base 2. `weights` are set: factors of this tile's
    part of O. True if O must be multiplied by `factors` before that is added. `rows` are four
    arrays over the two rows of a thread: row_max; row_sum, this lane's share until the end; and
    two values of row_max, kept from tile to tile: limits and units, as `limit_of_row` and
    `unit_of_row` give them. With `key_scales` row_sum adds up P times the factors at `position`,
    which is that of this thread's first column.
    """
    largest_of_rows = make_largest_of_rows(n_tiles)
    subtract_from_rows = make_subtract_from_rows(1, n_tiles)

    @device_function
    def tile_softmax(s_acc, rows, factors, scales, weights, smem, position):
        row_max, row_sum, limits, units = rows
        subtrahends = cuda.local.array(2, f32)
        four = cuda.local.array(4, f32)
        above, below = largest_of_rows(s_acc)
        top_above = top_of_row(above, scales[0], row_max[0])
        top_below = top_of_row(below, scales[1], row_max[1])
        has_grown = (top_above > limits[0]) | (top_below > limits[1])
        has_grown = cuda.any_sync(FULL_WARP, has_grown)
        if has_grown:
            subtrahends[0] = follow_top(0, top_above, above, row_max, row_sum, factors)
            subtrahends[1] = follow_top(1, top_below, below, row_max, row_sum, factors)
            for r in range(2):
                limits[r], units[r] = limit_of_row(row_max[r]), unit_of_row(row_max[r])
            is_huge = (subtrahends[0] != f32(0)) | (subtrahends[1] != f32(0))
            if cuda.any_sync(FULL_WARP, is_huge):
                subtract_from_rows(s_acc, subtrahends)
        weights[0] = ex2_approx_ftz_f32(top_above - units[0])
        weights[1] = ex2_approx_ftz_f32(top_below - units[1])
        above, below = shift_of_row(top_above, row_max[0]), shift_of_row(top_below, row_max[1])
        sum_above, sum_below = f32(0), f32(0)
        for tile in range(n_tiles):
            i = 4 * tile
            p0 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scales[0], -above))
            p1 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 1], scales[0], -above))
            p2 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 2], scales[1], -below))
            p3 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 3], scales[1], -below))
            if key_scales:
                if tile % 2 == 0:
                    ld_shared_v4_f32(four, smem, position + MMA_COLUMNS * tile)
                a, b = four[tile % 2 * 2], four[tile % 2 * 2 + 1]
                sum_above = fma_rn_f32(p1, b, fma_rn_f32(p0, a, sum_above))
                sum_below = fma_rn_f32(p3, b, fma_rn_f32(p2, a, sum_below))
            else:
                sum_above += p0 + p1
                sum_below += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        row_sum[0] = fma_rn_f32(sum_above, weights[0], row_sum[0])
        row_sum[1] = fma_rn_f32(sum_below, weights[1], row_sum[1])
        return has_grown

    return tile_softmax


@device_function
def begin_rows(limits, units):
    """Rows that have seen no key: the values kept of them beside row_max and row_sum."""
    for r in range(2):
        limits[r], units[r] = NEG_INF, P_SCALE_LOG2


@cache
def make_pack(n_tiles):
    """pack(p_frag, s_acc): probabilities as an operand A of e4m3.

    Of each 16 keys a thread has two in either of two products: the order of V's tokens.
    """
    encode_four = make_encode("e4m3", "sm89")

    @device_function
    def pack(p_frag, s_acc):
        for half in range(n_tiles // 2):
            i = 8 * half
            p_frag[2 * half] = encode_four(s_acc[i], s_acc[i + 1], s_acc[i + 4], s_acc[i + 5])
            p_frag[2 * half + 1] = encode_four(
                s_acc[i + 2], s_acc[i + 3], s_acc[i + 6], s_acc[i + 7]
            )

    return pack


@cache
def make_add_part(n_tiles):
    """add_part(acc, first, part, weights): acc[first:] += weights * part, row by row."""

    @device_function
    def add_part(acc, first, part, weights):
        for tile in range(n_tiles):
            i = 4 * tile
            acc[first + i] = fma_rn_f32(part[i], weights[0], acc[first + i])
            acc[first + i + 1] = fma_rn_f32(part[i + 1], weights[0], acc[first + i + 1])
            acc[first + i + 2] = fma_rn_f32(part[i + 2], weights[1], acc[first + i + 2])
            acc[first + i + 3] = fma_rn_f32(part[i + 3], weights[1], acc[first + i + 3])

    return add_part
