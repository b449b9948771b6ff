"""Online softmax whose P is 8 bits wide, on accumulators; see `tiles.mma.softmax`.

P of a tile is in units of the tile's own largest score of the row, so that 8 bits hold P as
exactly as they can, wherever the row's maximum turns up:

    P = 2 ** (scales S - top + 8),   weights = 2 ** (top - row_max - 8)

with top = scales max S. O and row_sum are in units of 2 ** row_max, a maximum that may lag behind
by a factor of 2 ** LAG: they are float32.

Where keys of a tile have scales of their own, T = scales S + log2 v_descale takes the place of
scales S, so that P holds the scale of V, and row_sum adds up P / v_descale.
"""

from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    ld_shared_v4_f32,
    max_f32,
)
from numflash.tiles.mma.fragments import MMA_COLUMNS
from numflash.tiles.mma.softmax import (
    HUGE,
    LAG,
    make_scale_rows,
    make_subtract_from_rows,
    row_max_of_quad,
)
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.scores import NEG_INF

P_SCALE_LOG2 = f32(8)
"""The largest P of a row and tile is 2 ** 8: e4m3 ends at 448."""
FARTHEST = f32(256)
"""A weight of 2 ** -256 counts as none."""


class KeyScales:
    """The words at which the scales of a tile's keys begin in shared memory: three rows of tile_n.

    k_descale, log2 v_descale and 1 / v_descale, each row as `place_of_column` says, so that a
    thread reads those of 16 keys at once. Who puts them there makes them visible.
    """

    def __init__(self, first: int, tile_n: int):
        self.k, self.v_log2, self.v_inverse = range(first, first + 3 * tile_n, tile_n)


@cache
def make_scale_keys(m_tiles, n_tiles):
    """scale_keys(s_acc, smem, position): each column times its factor.

    `position` is that of the factor of this thread's first column.
    """

    @device_function
    def scale_keys(s_acc, smem, position):
        four = cuda.local.array(4, f32)
        for pair in range(n_tiles // 2):
            ld_shared_v4_f32(four, smem, position + 2 * MMA_COLUMNS * pair)
            for half in range(2):
                a, b = four[2 * half], four[2 * half + 1]
                for m in range(m_tiles):
                    i = 4 * (n_tiles * m + 2 * pair + half)
                    s_acc[i] *= a
                    s_acc[i + 1] *= b
                    s_acc[i + 2] *= a
                    s_acc[i + 3] *= b

    return scale_keys


@cache
def make_add_v_scales(m_tiles, n_tiles):
    """add_v_scales(s_acc, scales, smem, position): S -> T = scales S + log2 v_descale."""

    @device_function
    def add_v_scales(s_acc, scales, smem, position):
        four = cuda.local.array(4, f32)
        for pair in range(n_tiles // 2):
            ld_shared_v4_f32(four, smem, position + 2 * MMA_COLUMNS * pair)
            for half in range(2):
                a, b = four[2 * half], four[2 * half + 1]
                for m in range(m_tiles):
                    i, r = 4 * (n_tiles * m + 2 * pair + half), 2 * m
                    s_acc[i] = fma_rn_f32(s_acc[i], scales[r], a)
                    s_acc[i + 1] = fma_rn_f32(s_acc[i + 1], scales[r], b)
                    s_acc[i + 2] = fma_rn_f32(s_acc[i + 2], scales[r + 1], a)
                    s_acc[i + 3] = fma_rn_f32(s_acc[i + 3], scales[r + 1], b)

    return add_v_scales


@device_function
def top_of_row(largest, scale, row_max):
    """A tile's largest score of a row in base 2, from which its exponents are counted.

    A tile far below row_max weighs nothing, and is counted from row_max - FARTHEST: its own top
    may be so large a number that rounding it makes P infinite.
    """
    return max_f32(largest * scale, row_max - FARTHEST)


@device_function
def limit_of_row(row_max):
    """The top above which a row grows: -inf if it is huge or has seen no key."""
    return row_max + LAG if abs(row_max) <= HUGE else NEG_INF


@device_function
def unit_of_row(row_max):
    """The unit of a row of O: a tile's P V enters O with the weight 2 ** (top - unit)."""
    return (row_max if row_max > NEG_INF else f32(0)) + P_SCALE_LOG2


@device_function
def shift_of_row(top, row_max):
    """The shift that a tile's exponents subtract: P's unit alone where scores are differences.

    Also P's unit alone where a row has seen no key: -inf - -inf would be NaN.
    """
    return (top if abs(row_max) <= HUGE else f32(0)) - P_SCALE_LOG2


@device_function
def follow_top(r, top, largest, row_max, row_sum, factors):
    """Row r takes in the top of a tile; the others of its warp do not matter to it.

    factors[r] becomes the factor for O. Returns the number to subtract from the row's
    scores of this tile before they are scaled: 0, unless the maximum is huge
    (`tiles.mma.softmax.follow_maximum` tells why), else `largest`.
    """
    factors[r] = f32(1)
    subtrahend = f32(0)
    if (top > limit_of_row(row_max[r])) & (largest > NEG_INF):
        new_max = max_f32(top, row_max[r])
        factors[r] = ex2_approx_ftz_f32(row_max[r] - new_max)
        row_max[r] = new_max
        row_sum[r] *= factors[r]
        subtrahend = largest if abs(new_max) > HUGE else f32(0)
    return subtrahend


@cache
def make_tile_softmax(m_tiles, n_tiles, o_tiles, key_scales):
    """tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights, smem, position): S -> P.

    `scales`, positive, bring each row of S to base 2. `weights` are set: factors of this tile's
    part of O. row_sum stays this lane's share until the end. With `key_scales` the probabilities
    that it adds up are P times the factors at `position`, the first that of this thread's first
    column.
    """
    rows, n_columns = 2 * m_tiles, 2 * n_tiles
    scale_rows = make_scale_rows(m_tiles, o_tiles)
    subtract_from_rows = make_subtract_from_rows(m_tiles, n_tiles)

    @device_function
    def tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights, smem, position):
        largest = cuda.local.array(rows, f32)
        subtrahends = cuda.local.array(rows, f32)
        tops = cuda.local.array(rows, f32)
        shifts = cuda.local.array(rows, f32)
        factors = cuda.local.array(rows, f32)
        sums = cuda.local.array(rows, f32)
        four = cuda.local.array(4, f32)
        has_grown = False
        for r in range(rows):
            x = NEG_INF
            for c in range(n_columns):
                x = max_f32(x, s_acc[4 * (n_tiles * (r // 2) + c // 2) + r % 2 * 2 + c % 2])
            largest[r] = row_max_of_quad(x)
            tops[r] = top_of_row(largest[r], scales[r], row_max[r])
            has_grown |= tops[r] > limit_of_row(row_max[r])
        if cuda.any_sync(FULL_WARP, has_grown):
            is_huge = False
            for r in range(rows):
                subtrahends[r] = follow_top(r, tops[r], largest[r], row_max, row_sum, factors)
                is_huge |= subtrahends[r] != f32(0)
            if cuda.any_sync(FULL_WARP, is_huge):
                subtract_from_rows(s_acc, subtrahends)
            scale_rows(o_acc, factors)
        for r in range(rows):
            weights[r] = ex2_approx_ftz_f32(tops[r] - unit_of_row(row_max[r]))
            shifts[r] = shift_of_row(tops[r], row_max[r])
            sums[r] = f32(0)
        for tile in range(m_tiles * n_tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            p0 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scales[r], -shifts[r]))
            p1 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 1], scales[r], -shifts[r]))
            p2 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 2], scales[r + 1], -shifts[r + 1]))
            p3 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 3], scales[r + 1], -shifts[r + 1]))
            if key_scales:
                if tile % 2 == 0:
                    ld_shared_v4_f32(four, smem, position + MMA_COLUMNS * (tile % n_tiles))
                a, b = four[tile % 2 * 2], four[tile % 2 * 2 + 1]
                sums[r] = fma_rn_f32(p1, b, fma_rn_f32(p0, a, sums[r]))
                sums[r + 1] = fma_rn_f32(p3, b, fma_rn_f32(p2, a, sums[r + 1]))
            else:
                sums[r] += p0 + p1
                sums[r + 1] += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        for r in range(rows):
            row_sum[r] = fma_rn_f32(sums[r], weights[r], row_sum[r])

    return tile_softmax
