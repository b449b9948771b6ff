"""Scores of a warpgroup's rows: features, and the mask where an edge crosses a tile."""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, i32
from numflash.tiles.features import make_weigh
from numflash.tiles.mma import dropout
from numflash.tiles.mma.fragments import MMA_ROWS, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.scores import Corner


class Rows(NamedTuple):
    """The rows of a warpgroup, and the keys that they see.

    Attributes:
        group: the warpgroup.
        place: the `Place` of the block's tile, of whose rows a warpgroup has 64.
        whole: the tiles of keys that no edge crosses, `Whole`.
        sequence: the `Sequence` of the rows.
        pack: heads whose rows of a token are neighbours.
        mask: the kernel's.
    """

    group: object
    place: object
    whole: object
    sequence: object
    pack: object
    mask: object


@cache
def make_shape_scores(tile_n, traits):
    """shape_scores(s_acc, rows, n_start, is_full, scale, scores, args)

    Products S -> scores, in place, of the tile of keys from n_start on; is_full is as in
    `tiles.scores.Corner`, the last three are as in `tiles.mma.scores`. S is not scaled where no
    feature shapes scores.
    """
    n_tiles, has_functions = tile_n // 8, traits.has_functions
    apply_functions = make_apply_functions(1, n_tiles, traits, True, False)
    mask_scores = make_mask_scores(1, n_tiles)

    @device_function
    def shape_scores(s_acc, rows, n_start, is_full, scale, scores, args):
        if has_functions:
            i = i32(rows.place.start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            corner = Corner(i, j, rows.sequence, is_full)
            apply_functions(s_acc, s_acc, corner, scale, scores, args)
        if n_start < rows.whole.first or n_start > rows.whole.last:
            i = i32(rows.place.start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            mask_scores(s_acc, i, j, rows.sequence.seqlen_k, rows.sequence, rows.pack)

    return shape_scores


@cache
def make_weigh_scores(tile_n, traits):
    """weigh_scores(p_acc, rows, n_start, drawn): P of scores that features drop becomes 0.

    Of the tile of keys from n_start on; `drawn` are the `args` of `tiles.features.make_weigh`.
    """
    _, _, drops = make_weigh(traits.features)
    weigh = dropout.make_weigh_scores(1, tile_n // 8, traits.features)

    @device_function
    def weigh_scores(p_acc, rows, n_start, drawn):
        if drops:
            i = i32(rows.place.start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            weigh(p_acc, i, j, drawn)

    return weigh_scores
