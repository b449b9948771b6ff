"""Online softmax in base 2 on accumulators, a row spread over four neighbouring lanes.

    P = 2 ** (scale_log2 S - scale_log2 row_max)

is one fused multiply-add and one exponential a score. The maximum that is subtracted may lag
behind: a row's O and sum are rescaled only when it has grown by more than a factor of 2 ** `LAG`,
which after the first few tiles is rare; a warp looks for such rows by one vote. P then is at most
2 ** LAG, well within float16, and the result is the same, because O and row_sum share the factor.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1; the lag: FlashAttention-4, arXiv
2603.05451.
"""

from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    ld_shared_v2_f32,
    max_f32,
    u32,
)
from numflash.tiles.features import make_weigh
from numflash.tiles.mma.dropout import make_draw, make_is_kept
from numflash.tiles.mma.fragments import MMA_COLUMNS
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.scores import NEG_INF
from numflash.tiles.unrolled import make_unrolled

LAG = f32(8)
HUGE = f32(2.0**20)
"""Scores beyond it, in base 2, become differences before they are scaled: `follow_maximum`."""


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


@device_function
def follow_maximum(r, grows, largest, row_max, row_sum, factors, scale_log2):
    """Row r takes in the largest score of a tile; the others of its warp do not matter to it.

    factors[r] becomes the factor for O. Returns the number to subtract from the row's
    scores of this tile: 0, unless the maximum is huge. scale_log2 row_max is rounded, and beyond
    2 ** 20 the error, a factor of all P of the row, would no longer be small; differences of
    scores are exact there. A huge row, and one that has seen no key, `grows` with every tile.
    """
    factors[r] = f32(1)
    subtrahend = f32(0)
    if grows & (largest > NEG_INF):
        new_max = max_f32(largest, row_max[r])
        factors[r] = ex2_approx_ftz_f32((row_max[r] - new_max) * scale_log2)
        row_max[r] = new_max
        row_sum[r] *= factors[r]
        subtrahend = new_max if abs(new_max * scale_log2) > HUGE else f32(0)
    return subtrahend


@device_function
def limit_of_row(row_max, scale_log2):
    """The score above which a row grows: -inf if it is huge or has seen no key."""
    return row_max + LAG / scale_log2 if abs(row_max * scale_log2) <= HUGE else NEG_INF


@device_function
def shift_of_row(row_max, scale_log2):
    """The shift that a row's exponents subtract: 0 where scores are differences, or all -inf."""
    shift = row_max * scale_log2
    return shift if abs(shift) <= HUGE else f32(0)


@cache
def make_subtract_from_rows(m_tiles, n_tiles):
    """subtract_from_rows(s_acc, subtrahends): from each row of an accumulator its own."""

    @device_function
    def subtract_from_rows(s_acc, subtrahends):
        for tile in range(m_tiles * n_tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            s_acc[i] -= subtrahends[r]
            s_acc[i + 1] -= subtrahends[r]
            s_acc[i + 2] -= subtrahends[r + 1]
            s_acc[i + 3] -= subtrahends[r + 1]

    return subtract_from_rows


@cache
def make_exponentials(m_tiles, n_tiles):
    """exponentials(s_acc, scale_log2, shifts, row_sum): S -> P in place, added to row_sum.

    P = 2 ** (scale_log2 S - shift), the exponent rounded once.
    """

    @device_function
    def exponentials(s_acc, scale_log2, shifts, row_sum):
        for tile in range(m_tiles * n_tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            p0 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scale_log2, -shifts[r]))
            p1 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 1], scale_log2, -shifts[r]))
            p2 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 2], scale_log2, -shifts[r + 1]))
            p3 = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 3], scale_log2, -shifts[r + 1]))
            row_sum[r] += p0 + p1
            row_sum[r + 1] += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3

    return exponentials


@cache
def make_online_softmax(m_tiles, n_tiles, o_tiles):
    """online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2): S -> P in place.

    scale_log2 is positive. row_sum stays this lane's share until the end.
    """
    rows, n_columns = 2 * m_tiles, 2 * n_tiles
    scale_rows = make_scale_rows(m_tiles, o_tiles)
    subtract_from_rows = make_subtract_from_rows(m_tiles, n_tiles)
    exponentials = make_exponentials(m_tiles, n_tiles)

    @device_function
    def grows(largest, row_max, scale_log2):
        # As `largest > limit_of_row(...)`, which would take a register to keep.
        shift = row_max * scale_log2
        return (fma_rn_f32(largest, scale_log2, -shift) > LAG) | (abs(shift) > HUGE)

    @device_function
    def online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2):
        largest = cuda.local.array(rows, f32)
        subtrahends = cuda.local.array(rows, f32)
        factors = cuda.local.array(rows, f32)
        shifts = cuda.local.array(rows, f32)
        has_grown = False
        for r in range(rows):
            x = NEG_INF
            for c in range(n_columns):
                x = max_f32(x, s_acc[4 * (n_tiles * (r // 2) + c // 2) + r % 2 * 2 + c % 2])
            largest[r] = row_max_of_quad(x)
            has_grown |= grows(largest[r], row_max[r], scale_log2)
        if cuda.any_sync(FULL_WARP, has_grown):
            is_huge = False
            for r in range(rows):
                row_grows = grows(largest[r], row_max[r], scale_log2)
                subtrahends[r] = follow_maximum(
                    r, row_grows, largest[r], row_max, row_sum, factors, scale_log2
                )
                is_huge |= subtrahends[r] != f32(0)
            if cuda.any_sync(FULL_WARP, is_huge):
                subtract_from_rows(s_acc, subtrahends)
            scale_rows(o_acc, factors)
        for r in range(rows):
            shifts[r] = shift_of_row(row_max[r], scale_log2)
        exponentials(s_acc, scale_log2, shifts, row_sum)

    return online_softmax


@cache
def make_softmax_backward_by_row(m_tiles, n_tiles, traits):
    """softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, *drawn): S -> P, dP -> dS.

        P  = 2 ** (scale_log2 S - lse log2 e)
        dS = P * (softmax_scale dP - delta), times the slope of the score

    `scales` are scale_log2 and softmax_scale; delta holds the latter, see
    `tiles.portable.gradients`. The rows are queries: lses (in base 2, +inf for a query without
    keys) and deltas are a thread's.

    With features that weigh P, `drawn` are this thread's first row and column and the `args` of
    these: of scores that are dropped P becomes 0, and their dP counts as 0.
    """
    tiles, gradient_of_score = m_tiles * n_tiles, _make_gradient_of_score(traits)
    weighed = _make_weighed_by_row(m_tiles, n_tiles, traits.features, gradient_of_score)

    @device_function
    def softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales):
        for tile in range(tiles):
            i, r = 4 * tile, tile // n_tiles * 2
            lse, delta = lses[r], deltas[r]
            gradient_of_score(s_acc, dp_acc, slopes, i, lse, delta, scales, True)
            gradient_of_score(s_acc, dp_acc, slopes, i + 1, lse, delta, scales, True)
            lse, delta = lses[r + 1], deltas[r + 1]
            gradient_of_score(s_acc, dp_acc, slopes, i + 2, lse, delta, scales, True)
            gradient_of_score(s_acc, dp_acc, slopes, i + 3, lse, delta, scales, True)

    return softmax_backward if weighed is None else weighed


def _make_weighed_by_row(m_tiles, n_tiles, features, gradient_of_score):
    """The `softmax_backward` with `drawn`; None if no feature weighs P."""
    _, _, weighs = make_weigh(features)
    if not weighs:
        return None
    draw, is_kept, pairs = make_draw(n_tiles, features, True), make_is_kept(True), n_tiles // 2

    @device_function
    def backward_of_pair(pair, s_acc, dp_acc, slopes, lses, deltas, scales, row, column, args):
        words = cuda.local.array(4, u32)
        draw(words, pair, row, column, args)
        r, i = pair // pairs * 2, 8 * pair
        for n in range(8):
            q = r + n // 2 % 2
            kept = is_kept(words, n, args.limit)
            gradient_of_score(s_acc, dp_acc, slopes, i + n, lses[q], deltas[q], scales, kept)

    loop = make_unrolled(backward_of_pair, m_tiles * pairs)

    @device_function
    def softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, row, column, args):
        loop(0, s_acc, dp_acc, slopes, lses, deltas, scales, row, column, args)

    return softmax_backward


@cache
def make_softmax_backward_by_column(m_tiles, n_tiles, traits):
    """softmax_backward(s_acc, dp_acc, slopes, smem, lse, delta, scales, *drawn): S -> P, dP -> dS.

    As `make_softmax_backward_by_row` where the columns are queries. `lse` and `delta` are the
    positions in smem of the values of this thread's first column.
    """
    tiles, gradient_of_score = m_tiles * n_tiles, _make_gradient_of_score(traits)
    weighed = _make_weighed_by_column(m_tiles, n_tiles, traits.features, gradient_of_score)

    @device_function
    def softmax_backward(s_acc, dp_acc, slopes, smem, lse, delta, scales):
        lses = cuda.local.array(2, f32)
        deltas = cuda.local.array(2, f32)
        for tile in range(tiles):
            i, first = 4 * tile, tile % n_tiles * MMA_COLUMNS
            ld_shared_v2_f32(lses, smem, lse + first)
            ld_shared_v2_f32(deltas, smem, delta + first)
            gradient_of_score(s_acc, dp_acc, slopes, i, lses[0], deltas[0], scales, True)
            gradient_of_score(s_acc, dp_acc, slopes, i + 1, lses[1], deltas[1], scales, True)
            gradient_of_score(s_acc, dp_acc, slopes, i + 2, lses[0], deltas[0], scales, True)
            gradient_of_score(s_acc, dp_acc, slopes, i + 3, lses[1], deltas[1], scales, True)

    return softmax_backward if weighed is None else weighed


def _make_weighed_by_column(m_tiles, n_tiles, features, gradient_of_score):
    """The `softmax_backward` with `drawn`; None if no feature weighs P."""
    _, _, weighs = make_weigh(features)
    if not weighs:
        return None
    draw, is_kept, pairs = make_draw(n_tiles, features, False), make_is_kept(False), n_tiles // 2

    @device_function
    def backward_of_pair(pair, s_acc, dp_acc, slopes, smem, lse, delta, scales, row, column, args):
        words = cuda.local.array(4, u32)
        lses = cuda.local.array(4, f32)
        deltas = cuda.local.array(4, f32)
        first, i = pair % pairs * (2 * MMA_COLUMNS), 8 * pair
        ld_shared_v2_f32(lses[0:2], smem, lse + first)
        ld_shared_v2_f32(lses[2:4], smem, lse + first + MMA_COLUMNS)
        ld_shared_v2_f32(deltas[0:2], smem, delta + first)
        ld_shared_v2_f32(deltas[2:4], smem, delta + first + MMA_COLUMNS)
        draw(words, pair, row, column, args)
        for n in range(8):
            q = n // 4 * 2 + n % 2
            kept = is_kept(words, n, args.limit)
            gradient_of_score(s_acc, dp_acc, slopes, i + n, lses[q], deltas[q], scales, kept)

    loop = make_unrolled(backward_of_pair, m_tiles * pairs)

    @device_function
    def softmax_backward(s_acc, dp_acc, slopes, smem, lse, delta, scales, row, column, args):
        loop(0, s_acc, dp_acc, slopes, smem, lse, delta, scales, row, column, args)

    return softmax_backward


@cache
def _make_gradient_of_score(traits):
    """gradient_of_score(s_acc, dp_acc, slopes, i, lse, delta, scales, kept) for one score."""
    has_slopes, slopes_are_finite = traits.bends_scores, not traits.program_bends

    @device_function
    def gradient_of_score(s_acc, dp_acc, slopes, i, lse, delta, scales, kept):
        scale_log2, softmax_scale = scales
        probability = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scale_log2, -lse))
        gradient = dp_acc[i] if kept else f32(0)
        gradient = probability * fma_rn_f32(gradient, softmax_scale, -delta)
        if has_slopes:
            gradient *= slopes[i]
            if not slopes_are_finite:
                # A function may bend without bound where P is 0, as the logarithm at 0.
                gradient = gradient if probability > f32(0) else f32(0)
        s_acc[i] = probability if kept else f32(0)
        dp_acc[i] = gradient

    return gradient_of_score
