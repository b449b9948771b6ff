"""Online softmax in base 2 on accumulators, a row spread over four neighbouring lanes.

    P = 2 ** (scale_log2 S - scale_log2 row_max)

is one fused multiply-add and one exponential a score. The maximum that is subtracted may lag
behind: O and the sums are rescaled only when some row of the warp has grown by more than a factor
of 2 ** `LAG`, which after the first few tiles is rare. P then is at most 2 ** LAG, well within
float16, and the result is the same, because O and row_sum share the factor.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1; the lag: FlashAttention-4, arXiv
2603.05451.
"""

from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, ld_shared_v2_f32, max_f32
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.mma.fragments import MMA_COLUMNS
from numflash.tiles.scores import NEG_INF

LAG = f32(8)


@device_function
def row_max_of_quad(x):
    """The maximum over the 4 lanes that share a row, in all of them."""
    x = max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, 1))
    return max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, 2))


@device_function
def row_sum_of_quad(x):
    """The sum over the 4 lanes that share a row, in all of them."""
    x += cuda.shfl_xor_sync(FULL_WARP, x, 1)
    return x + cuda.shfl_xor_sync(FULL_WARP, x, 2)


@cache
def make_scale_rows(m_tiles, n_tiles):
    """scale_rows(acc, factors): multiply each row of an accumulator by its factor."""
    tiles = m_tiles * n_tiles

    @device_function
    def scale_rows(acc, factors):
        for tile in range(tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            acc[i] *= factors[r]
            acc[i + 1] *= factors[r]
            acc[i + 2] *= factors[r + 1]
            acc[i + 3] *= factors[r + 1]

    return scale_rows


@cache
def make_online_softmax(m_tiles, n_tiles, o_tiles):
    """online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2): S -> P in place.

    scale_log2 is positive. row_sum stays this lane's share until the end.
    """
    rows = 2 * m_tiles
    n_columns, scale_rows = 2 * n_tiles, make_scale_rows(m_tiles, o_tiles)

    @device_function
    def online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2):
        factors = cuda.local.array(rows, f32)
        new_max = cuda.local.array(rows, f32)
        lags = False
        for r in range(rows):
            largest = row_max[r]
            for c in range(n_columns):
                largest = max_f32(
                    largest, s_acc[4 * (n_tiles * (r // 2) + c // 2) + r % 2 * 2 + c % 2]
                )
            new_max[r] = row_max_of_quad(largest)
            lags |= (new_max[r] - row_max[r]) * scale_log2 > LAG
        if cuda.any_sync(FULL_WARP, lags):
            for r in range(rows):
                # Where a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
                shift = new_max[r] if new_max[r] > NEG_INF else f32(0)
                factors[r] = ex2_approx_ftz_f32((row_max[r] - shift) * scale_log2)
                row_max[r] = new_max[r]
                row_sum[r] *= factors[r]
            scale_rows(o_acc, factors)
        for r in range(rows):
            factors[r] = (row_max[r] if row_max[r] > NEG_INF else f32(0)) * scale_log2
        for tile in range(m_tiles * n_tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            p0 = ex2_approx_ftz_f32(s_acc[i] * scale_log2 - factors[r])
            p1 = ex2_approx_ftz_f32(s_acc[i + 1] * scale_log2 - factors[r])
            p2 = ex2_approx_ftz_f32(s_acc[i + 2] * scale_log2 - factors[r + 1])
            p3 = ex2_approx_ftz_f32(s_acc[i + 3] * scale_log2 - factors[r + 1])
            row_sum[r] += p0 + p1
            row_sum[r + 1] += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3

    return online_softmax


@cache
def make_softmax_backward_by_row(m_tiles, n_tiles, softcap):
    """softmax_backward(s_acc, dp_acc, cap_slopes, lses, deltas, scale_log2): S -> P, dP -> dS.

        P  = 2 ** (scale_log2 S - lse log2 e)
        dS = P * (dP - delta), times the cap's slope with softcap

    The rows are queries: lses (in base 2, +inf for a query without keys) and deltas are a
    thread's.
    """
    tiles, gradient_of_score = m_tiles * n_tiles, _make_gradient_of_score(softcap)

    @device_function
    def softmax_backward(s_acc, dp_acc, cap_slopes, lses, deltas, scale_log2):
        for tile in range(tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            lse, delta = lses[r], deltas[r]
            gradient_of_score(s_acc, dp_acc, cap_slopes, i, lse, delta, scale_log2)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 1, lse, delta, scale_log2)
            lse, delta = lses[r + 1], deltas[r + 1]
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 2, lse, delta, scale_log2)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 3, lse, delta, scale_log2)

    return softmax_backward


@cache
def make_softmax_backward_by_column(m_tiles, n_tiles, softcap):
    """softmax_backward(s_acc, dp_acc, cap_slopes, smem, lse, delta, scale_log2): S -> P, dP -> dS.

    As `make_softmax_backward_by_row` where the columns are queries. `lse` and `delta` are the
    positions in smem of the values of this thread's first column.
    """
    tiles, gradient_of_score = m_tiles * n_tiles, _make_gradient_of_score(softcap)

    @device_function
    def softmax_backward(s_acc, dp_acc, cap_slopes, smem, lse, delta, scale_log2):
        lses = cuda.local.array(2, f32)
        deltas = cuda.local.array(2, f32)
        for tile in range(tiles):
            i, first = 4 * tile, tile % n_tiles * MMA_COLUMNS
            ld_shared_v2_f32(lses, smem, lse + first)
            ld_shared_v2_f32(deltas, smem, delta + first)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i, lses[0], deltas[0], scale_log2)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 1, lses[1], deltas[1], scale_log2)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 2, lses[0], deltas[0], scale_log2)
            gradient_of_score(s_acc, dp_acc, cap_slopes, i + 3, lses[1], deltas[1], scale_log2)

    return softmax_backward


@cache
def _make_gradient_of_score(softcap):
    """gradient_of_score(s_acc, dp_acc, cap_slopes, i, lse, delta, scale_log2) for one score."""

    @device_function
    def gradient_of_score(s_acc, dp_acc, cap_slopes, i, lse, delta, scale_log2):
        probability = ex2_approx_ftz_f32(s_acc[i] * scale_log2 - lse)
        gradient = probability * (dp_acc[i] - delta)
        if softcap:
            gradient *= cap_slopes[i]
        s_acc[i] = probability
        dp_acc[i] = gradient

    return gradient_of_score
