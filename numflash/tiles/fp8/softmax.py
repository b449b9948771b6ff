"""Online softmax whose P is 8 bits wide, on accumulators; see `tiles.mma.softmax`.

P of a tile is in units of its own largest score of the row, so that what goes to 8 bits is as
exact as it can be wherever the row's maximum turns up:

    P = 2 ** (scales S - top + 8),   weights = 2 ** (top - row_max - 8)

with top = scales max S. O and row_sum are in units of 2 ** row_max, a maximum that may lag behind
by a factor of 2 ** LAG: they are float32.

Where keys of a tile have scales of their own, T = scales S + log2 v_descale takes the place of
scales S, so that P holds the scale of V, and row_sum adds up P / v_descale.
"""

from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, ld_shared_v2_f32, max_f32
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.mma.fragments import MMA_COLUMNS
from numflash.tiles.mma.softmax import LAG, make_scale_rows, row_max_of_quad
from numflash.tiles.scores import NEG_INF

P_SCALE_LOG2 = f32(8)
"""The largest P of a row and tile is 2 ** 8: e4m3 ends at 448."""


class KeyScales:
    """Where the scales of a tile's keys lie in shared memory, in words: three rows of tile_n.

    k_descale, log2 v_descale and 1 / v_descale. Threads below tile_n put them there; a barrier
    makes them visible.
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
        pair = cuda.local.array(2, f32)
        for j in range(n_tiles):
            ld_shared_v2_f32(pair, smem, position + MMA_COLUMNS * j)
            for m in range(m_tiles):
                i = 4 * (n_tiles * m + j)
                s_acc[i] *= pair[0]
                s_acc[i + 1] *= pair[1]
                s_acc[i + 2] *= pair[0]
                s_acc[i + 3] *= pair[1]

    return scale_keys


@cache
def make_add_v_scales(m_tiles, n_tiles):
    """add_v_scales(s_acc, scales, smem, position): S -> T = scales S + log2 v_descale."""

    @device_function
    def add_v_scales(s_acc, scales, smem, position):
        pair = cuda.local.array(2, f32)
        for j in range(n_tiles):
            ld_shared_v2_f32(pair, smem, position + MMA_COLUMNS * j)
            for m in range(m_tiles):
                i, r = 4 * (n_tiles * m + j), 2 * m
                s_acc[i] = s_acc[i] * scales[r] + pair[0]
                s_acc[i + 1] = s_acc[i + 1] * scales[r] + pair[1]
                s_acc[i + 2] = s_acc[i + 2] * scales[r + 1] + pair[0]
                s_acc[i + 3] = s_acc[i + 3] * scales[r + 1] + pair[1]

    return add_v_scales


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

    @device_function
    def tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights, smem, position):
        shifts = cuda.local.array(rows, f32)
        sums = cuda.local.array(rows, f32)
        pair = cuda.local.array(2, f32)
        lags = False
        for r in range(rows):
            largest = NEG_INF
            for c in range(n_columns):
                largest = max_f32(
                    largest, s_acc[4 * (n_tiles * (r // 2) + c // 2) + r % 2 * 2 + c % 2]
                )
            shifts[r] = row_max_of_quad(largest) * scales[r]
            lags |= shifts[r] - row_max[r] > LAG
        if cuda.any_sync(FULL_WARP, lags):
            for r in range(rows):
                new_max = max_f32(row_max[r], shifts[r])
                # Where a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
                unit = new_max if new_max > NEG_INF else f32(0)
                weights[r] = ex2_approx_ftz_f32(row_max[r] - unit)
                row_max[r] = new_max
                row_sum[r] *= weights[r]
            scale_rows(o_acc, weights)
        for r in range(rows):
            unit = row_max[r] if row_max[r] > NEG_INF else f32(0)
            weights[r] = ex2_approx_ftz_f32(shifts[r] - unit - P_SCALE_LOG2)
            shifts[r] = (shifts[r] if shifts[r] > NEG_INF else f32(0)) - P_SCALE_LOG2
            sums[r] = f32(0)
        for tile in range(m_tiles * n_tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            p0 = ex2_approx_ftz_f32(s_acc[i] * scales[r] - shifts[r])
            p1 = ex2_approx_ftz_f32(s_acc[i + 1] * scales[r] - shifts[r])
            p2 = ex2_approx_ftz_f32(s_acc[i + 2] * scales[r + 1] - shifts[r + 1])
            p3 = ex2_approx_ftz_f32(s_acc[i + 3] * scales[r + 1] - shifts[r + 1])
            if key_scales:
                ld_shared_v2_f32(pair, smem, position + MMA_COLUMNS * (tile % n_tiles))
                sums[r] += p0 * pair[0] + p1 * pair[1]
                sums[r + 1] += p2 * pair[0] + p3 * pair[1]
            else:
                sums[r] += p0 + p1
                sums[r + 1] += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        for r in range(rows):
            row_sum[r] += sums[r] * weights[r]

    return tile_softmax
