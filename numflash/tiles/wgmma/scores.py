"""Scores of a warpgroup's rows: features, and the mask where an edge crosses a tile."""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, i32
from numflash.tiles.features import make_weigh
from numflash.tiles.mma import dropout
from numflash.tiles.mma.fragments import MMA_ROWS, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_apply_functions, make_mask_rows, make_mask_scores
from numflash.tiles.scores import Corner
from numflash.tiles.wgmma.gradients import make_draw_kept


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


class OwnedKeys(NamedTuple):
    """The keys of a block whose rows are keys, and the queries that see them.

    Attributes:
        start: the first of them.
        whole: the tiles of queries that no edge crosses, `Whole`.
        sequence: the `Sequence` of the block.
        from_keys: the same, seen from the keys (`tiles.sequences.seen_from_keys`).
    """

    start: object
    whole: object
    sequence: object
    from_keys: object


@cache
def make_shape_scores_by_column(tile_m, traits, masks_keys=False):
    """shape_scores(s_acc, slopes, keys, m_start, is_full, scores, args)

    As `make_shape_scores`, of S^T: its rows are `keys`, an `OwnedKeys`, its columns the tile of
    queries from m_start on. `slopes` are written where traits bend scores. With `masks_keys` keys
    past the end are masked, too: dQ is a sum over keys.
    """
    n_tiles, has_functions = tile_m // 8, traits.has_functions
    apply_functions = make_apply_functions(1, n_tiles, traits, False, traits.bends_scores)
    mask_scores, mask_rows = make_mask_scores(1, n_tiles), make_mask_rows(1, n_tiles)

    @device_function
    def shape_scores(s_acc, slopes, keys, m_start, is_full, scores, args):
        if has_functions:
            j = i32(keys.start + accumulator_row(MMA_ROWS))
            i = i32(m_start + accumulator_column())
            corner = Corner(j, i, keys.sequence, is_full)
            apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
        if m_start < keys.whole.first or m_start > keys.whole.last:
            j = i32(keys.start + accumulator_row(MMA_ROWS))
            i = i32(m_start + accumulator_column())
            mask_scores(s_acc, j, i, keys.sequence.seqlen_q, keys.from_keys, 1)
            if masks_keys:
                mask_rows(s_acc, j, keys.sequence.seqlen_k)

    return shape_scores


@cache
def make_draw_by_column(tile_m, traits):
    """draw(kept, keys, m_start, drawn): which scores are kept (`gradients.make_draw_kept`).

    The scores are those of `make_shape_scores_by_column`. Where no feature drops any, nothing is
    drawn.
    """
    draw_kept = make_draw_kept(tile_m // 8, traits, False)

    @device_function
    def draw(kept, keys, m_start, drawn):
        j = i32(keys.start + accumulator_row(MMA_ROWS))
        draw_kept(kept, j, i32(m_start + accumulator_column()), drawn)

    return draw


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
