"""Dropout on accumulators: which scores of a thread are kept.

A thread has eight scores of two neighbouring products of 16 x 8. Where the rows are queries, they
are the eight that share random bits (`runtime.philox`). Where they are keys, neighbouring rows
share bits and neighbouring columns do not: the lanes of two neighbouring rows each draw the bits
of one of two neighbouring columns, and exchange halves.

    random word and half of score n = 4 (product) + 2 (row + 8) + (column + 1)
        by row      word n % 2 + 2 (n // 4),   half n // 2 % 2
        by column   word n % 4,                half n // 4
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, i32, mov_tid_x, u32
from numflash.tiles.features import make_weigh
from numflash.tiles.philox import COLUMNS, ROWS, counters_of
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.unrolled import make_unrolled

_NEXT_ROW = 4  # lanes from a row of an accumulator to the next


@cache
def make_draw(n_tiles, features, by_row):
    """draw(words, pair, row, column, args): the four random words of a pair of products.

    `pair` counts along the rows of products, of n_tiles each; row and column are this thread's
    first in all of them, `args` those of `make_weigh`. All lanes of a warp call it together.
    """
    weigh, _, _ = make_weigh(features)
    pairs = n_tiles // 2

    @device_function
    def draw_by_row(words, pair, row, column, args):
        i, j = counters_of(row, column, args)
        i, j = i + pair // pairs * ROWS, j + pair % pairs * COLUMNS
        words[0], words[1], words[2], words[3] = weigh(i, j, args)

    @device_function
    def draw_by_column(words, pair, row, column, args):
        i, j = counters_of(column, row, args)
        # Keys in even rows draw for the first of two queries, those in odd rows for the second.
        odd = mov_tid_x() // u32(_NEXT_ROW) % u32(2) != u32(0)
        i, j = i + pair % pairs * ROWS + (1 if odd else 0), j + pair // pairs * COLUMNS
        w0, w1, w2, w3 = weigh(i, j, args)
        mine, mine_below = w1 if odd else w0, w3 if odd else w2
        # Of a drawn query the words of the other lane's key.
        given, given_below = w0 if odd else w1, w2 if odd else w3
        got = u32(cuda.shfl_xor_sync(FULL_WARP, i32(given), _NEXT_ROW))
        got_below = u32(cuda.shfl_xor_sync(FULL_WARP, i32(given_below), _NEXT_ROW))
        words[0], words[1] = got if odd else mine, mine if odd else got
        words[2], words[3] = (
            got_below if odd else mine_below,
            mine_below if odd else got_below,
        )

    return draw_by_row if by_row else draw_by_column


@cache
def make_is_kept(by_row):
    """is_kept(words, n, limit): whether score n of a pair of products is kept; n is a constant."""

    @device_function
    def is_kept_by_row(words, n, limit):
        word = words[n % 2 + 2 * (n // 4)]
        return (word if n // 2 % 2 == 1 else u32(word << u32(16))) >= limit

    @device_function
    def is_kept_by_column(words, n, limit):
        word = words[n % 4]
        return (word if n // 4 == 1 else u32(word << u32(16))) >= limit

    return is_kept_by_row if by_row else is_kept_by_column


@cache
def make_weigh_scores(m_tiles, n_tiles, features):
    """weigh_scores(p_acc, row, column, args): P of scores that are dropped becomes 0."""
    draw, is_kept = make_draw(n_tiles, features, True), make_is_kept(True)

    @device_function
    def weigh_pair(pair, p_acc, row, column, args):
        words = cuda.local.array(4, u32)
        draw(words, pair, row, column, args)
        p_acc[0] = p_acc[0] if is_kept(words, 0, args.limit) else f32(0)
        p_acc[1] = p_acc[1] if is_kept(words, 1, args.limit) else f32(0)
        p_acc[2] = p_acc[2] if is_kept(words, 2, args.limit) else f32(0)
        p_acc[3] = p_acc[3] if is_kept(words, 3, args.limit) else f32(0)
        p_acc[4] = p_acc[4] if is_kept(words, 4, args.limit) else f32(0)
        p_acc[5] = p_acc[5] if is_kept(words, 5, args.limit) else f32(0)
        p_acc[6] = p_acc[6] if is_kept(words, 6, args.limit) else f32(0)
        p_acc[7] = p_acc[7] if is_kept(words, 7, args.limit) else f32(0)

    loop = make_unrolled(weigh_pair, m_tiles * n_tiles // 2, 8)

    @device_function
    def weigh_scores(p_acc, row, column, args):
        loop(0, p_acc, row, column, args)

    return weigh_scores
