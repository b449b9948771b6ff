"""Scale, features and masks on a thread's scores; see `tiles.scores` for their meaning.

Score i of a thread is in its row i // columns and its column i % columns. The loops over scores
are flat because the compiler for Blackwell does not unroll nested ones, and a tile that is indexed
by a loop's variable lies in local memory, not in registers.
"""

from functools import cache

from numflash.ptx import device_function, f32, i32
from numflash.tiles.features import At, make_keep, make_score
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES
from numflash.tiles.scores import NEG_INF, make_distance, make_place, make_place_of_score


@cache
def make_apply_functions(rows, columns, traits, by_row, keeps_slopes, after_features=False):
    """apply_functions(s_acc, slopes, corner, scores, args)

    Turns products Q K^T into scores, in place: s = scores.scale s, and what the functions of
    `traits` make of it; `args` are theirs. With keeps_slopes `slopes` receives the derivative
    of each score by the scaled product, or with after_features by what features made of that.
    Queries are the rows of the tile, or its columns.
    """
    n_scores, score = rows * columns, make_score(traits, after_features)
    stopped = traits.program_indexes
    place, place_of_score = (
        make_place(by_row, stopped),
        make_place_of_score(traits, by_row, stopped),
    )
    has_keep, keep = traits.keeps_scores, make_keep(traits)
    distance = make_distance(traits, by_row)

    @device_function
    def apply_functions(s_acc, slopes, corner, scores, args):
        row, column = corner.row, corner.column
        shift = i32(scores.shift + corner.sequence.shift)
        first = f32(i32(row + shift - column if by_row else column + shift - row))
        far = distance(corner, scores)
        for n in range(n_scores):
            r, c = ROW_LANES * (n // columns), COLUMN_LANES * (n % columns)
            step = f32(c - r if by_row else r - c)
            i, j = place_of_score(corner, r, c, scores)
            s, slope = score(s_acc[n] * scores.scale, At(first, far, step, i, j), args)
            if keeps_slopes:
                slopes[n] = slope
            s_acc[n] = s
        if has_keep and not corner.is_full:
            for n in range(n_scores):
                r, c = ROW_LANES * (n // columns), COLUMN_LANES * (n % columns)
                step = f32(c - r if by_row else r - c)
                i, j = place(corner, r, c, scores)
                is_kept = keep(At(f32(0), far, step, i, j), args)
                s_acc[n] = s_acc[n] if is_kept else NEG_INF

    return apply_functions


@cache
def make_mask_scores(rows, columns):
    """mask_scores(s_acc, row, column, end, mask)

    Sets scores to -inf where column - row is not between mask.lo and mask.hi, or column is not
    below `end`.
    """
    n_scores = rows * columns

    @device_function
    def mask_scores(s_acc, row, column, end, mask):
        for i in range(n_scores):
            j = column + COLUMN_LANES * (i % columns)
            distance = j - row - ROW_LANES * (i // columns)
            if j >= end or distance < mask.lo or distance > mask.hi:
                s_acc[i] = NEG_INF

    return mask_scores
