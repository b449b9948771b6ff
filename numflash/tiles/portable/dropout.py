"""Dropout on a tile in registers: a bit for each score of a thread, 1 if it is kept.

Eight scores share random bits (`runtime.philox`). Of a thread's those share them whose rows are 8
apart, and those whose columns are: two or four are drawn at once where the tile's sides are
multiples of 16, so that the first of them is known when the kernel is compiled.
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, u32
from numflash.tiles.features import make_weigh
from numflash.tiles.philox import counters_of
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES
from numflash.tiles.unrolled import make_unrolled


def words_of_bits(n_scores: int) -> int:
    """Numbers of 32 bits that hold a bit for each score."""
    return -(-n_scores // 32)


@cache
def make_draw_kept(rows, columns, features, by_row):
    """draw_kept(kept, row, column, args): bit i % 32 of kept[i // 32] is that of score i.

    Row and column are this thread's first; rows are queries, or without by_row keys. `args` are
    those of `tiles.features.make_weigh`.
    """
    weigh, _, draws = make_weigh(features)
    rows_at_once, columns_at_once = 1 + (rows % 4 == 0), 1 + (columns % 2 == 0)
    # The next row of a thread that is 8 further on.
    step = 8 // ROW_LANES
    columns_drawn, n_words = columns // columns_at_once, words_of_bits(rows * columns)

    @device_function
    def note(kept, i, words, query, key, limit):
        left, right = (words[1], words[3]) if key & 1 else (words[0], words[2])
        word = right if key & 8 else left
        is_kept = (word if query & 8 else u32(word << u32(16))) >= limit
        kept[i // 32] = u32(kept[i // 32] | (u32(1 << i % 32) if is_kept else u32(0)))

    @device_function
    def draw(n, kept, row, column, args):
        words = cuda.local.array(4, u32)
        r, c = n // columns_drawn, n % columns_drawn * columns_at_once
        if rows_at_once > 1:
            r = r // step * 2 * step + r % step
        for i in range(rows_at_once * columns_at_once):
            s, d = r + i // columns_at_once * step, c + i % columns_at_once
            y, x = row + ROW_LANES * s, column + COLUMN_LANES * d
            query, key = (y, x) if by_row else (x, y)
            if i == 0:
                query_counter, key_counter = counters_of(query, key, args)
                words[0], words[1], words[2], words[3] = weigh(query_counter, key_counter, args)
            note(kept, columns * s + d, words, query, key, args.limit)

    loop = make_unrolled(draw, rows * columns // rows_at_once // columns_at_once)

    @device_function
    def draw_kept(kept, row, column, args):
        if draws:
            for i in range(n_words):
                kept[i] = u32(0)
            loop(0, kept, row, column, args)

    return draw_kept


@cache
def make_weight(features):
    """weight(kept, i, x): x, or with features that weigh P 0 if score i is dropped."""
    _, _, draws = make_weigh(features)

    @device_function
    def weight(kept, i, x):
        if draws:
            return x if kept[i // 32] & u32(1 << i % 32) else f32(0)
        return x

    return weight
