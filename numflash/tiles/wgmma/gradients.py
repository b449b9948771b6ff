"""P and dS of a warpgroup, in two passes, each beside a product that is under way.

As `tiles.mma.softmax`, where P is asked for before dP is there:

    P  = 2 ** (scale_log2 S - lse)              lse in base 2, +inf for a query without keys
    dS = P * (softmax_scale dP - delta)         delta holds softmax_scale

Where scores have slopes, P times its slope takes the place of P in between. Rows are queries, or
keys; then the statistics lie in shared memory, those of 16 queries as `place_of_column` says.

With dropout a score that is dropped adds nothing to dV, and its dP counts as 0; its P stays as it
is, for dS. Whether a score is kept is a bit, drawn before:

    draw_kept(kept, row, column, drawn)      the bits of a thread's scores
    pack_kept(p_frag, p_acc, kept)           P for dV
    drop(dp_acc, kept)                       dP for dS
"""

from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    ld_shared_v2_f32,
    ld_shared_v4_f32,
    u32,
)
from numflash.tiles.features import make_weigh
from numflash.tiles.mma.dropout import make_draw, make_is_kept
from numflash.tiles.unrolled import make_unrolled
from numflash.tiles.wgmma.products import PACK_TWO, make_pack


@cache
def make_probabilities_by_row(n_tiles):
    """probabilities(s_acc, lses, scale_log2): S -> P; lses are of this thread's two rows."""

    @device_function
    def probabilities(s_acc, lses, scale_log2):
        for tile in range(n_tiles):
            i = 4 * tile
            s_acc[i] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scale_log2, -lses[0]))
            s_acc[i + 1] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 1], scale_log2, -lses[0]))
            s_acc[i + 2] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 2], scale_log2, -lses[1]))
            s_acc[i + 3] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 3], scale_log2, -lses[1]))

    return probabilities


@cache
def make_sums_of_rows(n_tiles):
    """sums_of_rows(p_acc): (above, below), this thread's sums of its two rows.

    Nobody reads them; they keep P above a wait (`tiles.wgmma.turns.softmax_before_wait`).
    """

    @device_function
    def sums_of_rows(p_acc):
        above, below = f32(0), f32(0)
        for tile in range(n_tiles):
            above += p_acc[4 * tile] + p_acc[4 * tile + 1]
            below += p_acc[4 * tile + 2] + p_acc[4 * tile + 3]
        return above, below

    return sums_of_rows


@cache
def make_gradients_by_row(n_tiles):
    """gradients(p_acc, dp_acc, deltas, softmax_scale): dP -> dS."""

    @device_function
    def gradients(p_acc, dp_acc, deltas, softmax_scale):
        for tile in range(n_tiles):
            i = 4 * tile
            dp_acc[i] = p_acc[i] * fma_rn_f32(dp_acc[i], softmax_scale, -deltas[0])
            dp_acc[i + 1] = p_acc[i + 1] * fma_rn_f32(dp_acc[i + 1], softmax_scale, -deltas[0])
            dp_acc[i + 2] = p_acc[i + 2] * fma_rn_f32(dp_acc[i + 2], softmax_scale, -deltas[1])
            dp_acc[i + 3] = p_acc[i + 3] * fma_rn_f32(dp_acc[i + 3], softmax_scale, -deltas[1])

    return gradients


@cache
def _make_load_statistics(halves):
    """load_statistics(numbers, smem, first, half): lse or delta of 16 queries, or of 8."""

    @device_function
    def load_statistics(numbers, smem, first, half):
        if halves:
            ld_shared_v2_f32(numbers[2 * half : 2 * half + 2], smem, first + 2 * half)
        elif half == 0:
            ld_shared_v4_f32(numbers, smem, first)

    return load_statistics


@cache
def make_probabilities_by_column(n_tiles, halves=False):
    """probabilities(s_acc, smem, lse, scale_log2): S -> P.

    `lse` is the word of this thread's first four statistics: 4 (thread % 4) into the tile's. They
    are read four by four, or with `halves` two by two.
    """
    load_statistics = _make_load_statistics(halves)

    @device_function
    def probabilities(s_acc, smem, lse, scale_log2):
        lses = cuda.local.array(4, f32)
        for pair in range(n_tiles // 2):
            for half in range(2):
                load_statistics(lses, smem, lse + 16 * pair, half)
                i, a, b = 8 * pair + 4 * half, lses[2 * half], lses[2 * half + 1]
                s_acc[i] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i], scale_log2, -a))
                s_acc[i + 1] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 1], scale_log2, -b))
                s_acc[i + 2] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 2], scale_log2, -a))
                s_acc[i + 3] = ex2_approx_ftz_f32(fma_rn_f32(s_acc[i + 3], scale_log2, -b))

    return probabilities


@cache
def make_gradients_by_column(n_tiles, halves=False):
    """gradients(p_acc, dp_acc, smem, delta, softmax_scale): dP -> dS; `delta` is as lse above."""
    load_statistics = _make_load_statistics(halves)

    @device_function
    def gradients(p_acc, dp_acc, smem, delta, softmax_scale):
        deltas = cuda.local.array(4, f32)
        for pair in range(n_tiles // 2):
            for half in range(2):
                load_statistics(deltas, smem, delta + 16 * pair, half)
                i, a, b = 8 * pair + 4 * half, deltas[2 * half], deltas[2 * half + 1]
                dp_acc[i] = p_acc[i] * fma_rn_f32(dp_acc[i], softmax_scale, -a)
                dp_acc[i + 1] = p_acc[i + 1] * fma_rn_f32(dp_acc[i + 1], softmax_scale, -b)
                dp_acc[i + 2] = p_acc[i + 2] * fma_rn_f32(dp_acc[i + 2], softmax_scale, -a)
                dp_acc[i + 3] = p_acc[i + 3] * fma_rn_f32(dp_acc[i + 3], softmax_scale, -b)

    return gradients


@cache
def make_bend(n_tiles, traits):
    """bend(p_acc, slopes): P times the slope of its score, where scores have slopes."""
    bends, slopes_are_finite = traits.bends_scores, not traits.program_bends

    @device_function
    def bend(p_acc, slopes):
        if bends:
            for i in range(4 * n_tiles):
                bent = p_acc[i] * slopes[i]
                if not slopes_are_finite:
                    # A function may bend without bound where P is 0, as the logarithm at 0.
                    bent = bent if p_acc[i] > f32(0) else f32(0)
                p_acc[i] = bent

    return bend


# Dropout


def words_of_kept(n_tiles, traits) -> int:
    """32-bit words that hold a bit for each score of a thread; 1 where no feature drops any."""
    return -(-n_tiles // 8) if traits.drops_weights else 1


@cache
def make_draw_kept(n_tiles, traits, by_row):
    """draw_kept(kept, row, column, drawn): bit i % 32 of kept[i // 32] is that of score i.

    Row and column are this thread's first; rows are queries, or without by_row keys. `drawn` are
    the `args` of `tiles.features.make_weigh`. All lanes of a warp call it together.
    """
    draw, is_kept = make_draw(n_tiles, traits.features, by_row), make_is_kept(by_row)
    n_words, (_, _, drops) = words_of_kept(n_tiles, traits), make_weigh(traits.features)

    @device_function
    def draw_pair(pair, kept, row, column, drawn):
        words = cuda.local.array(4, u32)
        draw(words, pair, row, column, drawn)
        bits = u32(0)
        for n in range(8):
            bits = u32(bits | (u32(1 << n) if is_kept(words, n, drawn.limit) else u32(0)))
        kept[pair // 4] = u32(kept[pair // 4] | u32(bits << u32(pair % 4 * 8)))

    loop = make_unrolled(draw_pair, n_tiles // 2) if drops else None

    @device_function
    def draw_kept(kept, row, column, drawn):
        if drops:
            for word in range(n_words):
                kept[word] = u32(0)
            loop(0, kept, row, column, drawn)

    return draw_kept


@device_function
def _is_kept(kept, i):
    return u32(kept[i // 32] & u32(1 << i % 32)) != u32(0)


@cache
def make_drop(n_tiles, traits):
    """drop(acc, kept): acc becomes 0 where a score is dropped; see `make_draw_kept`."""
    drops = traits.drops_weights

    @device_function
    def drop(acc, kept):
        if drops:
            for i in range(4 * n_tiles):
                acc[i] = acc[i] if _is_kept(kept, i) else f32(0)

    return drop


@cache
def make_pack_kept(dtype, n_tiles, traits):
    """pack_kept(p_frag, p_acc, kept): as `make_pack`, with 0 where a score is dropped."""
    if not traits.drops_weights:
        pack = make_pack(dtype, n_tiles)

        @device_function
        def pack_all(p_frag, p_acc, kept):
            pack(p_frag, p_acc)

        return pack_all
    pack_two = PACK_TWO[dtype]

    @device_function
    def pack_kept(p_frag, p_acc, kept):
        for pair in range(2 * n_tiles):
            i = 2 * pair
            left = p_acc[i] if _is_kept(kept, i) else f32(0)
            right = p_acc[i + 1] if _is_kept(kept, i + 1) else f32(0)
            p_frag[pair] = pack_two(left, right)

    return pack_kept
