"""Online softmax whose P is 8 bits wide, on accumulators; see `tiles.mma.softmax`.

P of a tile is in units of its own largest score of the row, so that what goes to 8 bits is as
exact as it can be wherever the row's maximum turns up:

    P = 2 ** (scales S - top + 8),   weights = 2 ** (top - row_max - 8)

with top = scales max S. O and row_sum are in units of 2 ** row_max, a maximum that may lag behind
by a factor of 2 ** LAG: they are float32.
"""

from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, i64, max_f32
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.mma.softmax import LAG, make_scale_rows, row_max_of_quad
from numflash.tiles.scores import NEG_INF

P_SCALE_LOG2 = f32(8)
"""The largest P of a row and tile is 2 ** 8: e4m3 ends at 448."""


@cache
def make_tile_softmax(m_tiles, n_tiles, o_tiles):
    """tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights): S -> P in place.

    `scales`, positive, bring each row of S to base 2. `weights` are set: factors of this tile's
    part of O. row_sum stays this lane's share until the end.
    """
    rows, n_columns = 2 * m_tiles, 2 * n_tiles
    scale_rows = make_scale_rows(m_tiles, o_tiles)

    @device_function
    def tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights):
        shifts = cuda.local.array(rows, f32)
        sums = cuda.local.array(rows, f32)
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
            sums[r] += p0 + p1
            sums[r + 1] += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        for r in range(rows):
            row_sum[r] += sums[r] * weights[r]

    return tile_softmax


@cache
def make_load_key_scales(n_tiles):
    """load_key_scales(scales, source, base, shift, first, end): those of this thread's columns.

    Keys of 2 ** shift neighbours share one; beyond `end` it is zero.
    """

    @device_function
    def load_key_scales(scales, source, base, shift, first, end):
        for j in range(n_tiles):
            for e in range(2):
                key = first + 8 * j + e
                scales[2 * j + e] = f32(0)
                if key < end:
                    scales[2 * j + e] = source[base + i64(key >> shift)]

    return load_key_scales


@cache
def make_scale_columns(m_tiles, n_tiles):
    """scale_columns(acc, factors): multiply each column of an accumulator by its factor."""

    @device_function
    def scale_columns(acc, factors):
        for tile in range(m_tiles * n_tiles):
            i, c = 4 * tile, tile % n_tiles * 2
            acc[i] *= factors[c]
            acc[i + 1] *= factors[c + 1]
            acc[i + 2] *= factors[c]
            acc[i + 3] *= factors[c + 1]

    return scale_columns


@cache
def make_share_of_largest(n_tiles):
    """share_of_largest(scales): divide by the largest of the tile's columns, and return that."""
    n_columns = 2 * n_tiles

    @device_function
    def share_of_largest(scales):
        largest = scales[0]
        for c in range(1, n_columns):
            largest = max_f32(largest, scales[c])
        # Lanes of a quad have all columns between them.
        largest = row_max_of_quad(largest)
        factor = f32(1) / largest
        for c in range(n_columns):
            scales[c] *= factor
        return largest

    return share_of_largest
