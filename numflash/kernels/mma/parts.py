"""The end of a tile whose keys are split, where sequences have lengths of their own.

A part of O, in float32, is normalised by itself and has an lse; `shared.combine` puts the parts of
a tile together. All threads of a block call `finish_part` together.
"""

from functools import cache

from numflash.configs import MmaForwardConfig, Traits
from numflash.kernels.arguments import Tensor
from numflash.ptx import device_function, i32, i64
from numflash.tiles.addresses import row_of_head
from numflash.tiles.division import quotient
from numflash.tiles.mma import copies, elements, softmax
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.softmax import row_sum_of_quad
from numflash.tiles.portable.softmax import LN_2
from numflash.tiles.rows import make_end_of_row


@cache
def make_finish_part(config: MmaForwardConfig, traits: Traits):
    """finish_part(sums, scales, place, num_rows, shape, pack)

    `sums` are O, row_max and row_sum of this thread; the first of `scales` brings row_max to base
    2, the other is a factor of O. `place` is a `RaggedPlace` with a slot, num_rows the rows of its
    sequence with those of packed heads, and `shape` a `RaggedShape`. The part is (packed head, row
    of the tile, padded head_dim_v).
    """
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, m_tiles, o_tiles = config.tile_m, config.m_tiles, traits.head_dim_v // 8
    rows, rows_per_warp, pitch = 2 * m_tiles, MMA_ROWS * m_tiles, traits.head_dim_v
    end_of_row, lse_of_row = make_end_of_row(traits.features, LN_2, is_part=True)
    scale_rows = softmax.make_scale_rows(m_tiles, o_tiles)
    # Behind a branch the compiler does not unroll it, and O would lie in memory.
    store_part = copies.make_store_rows(element, m_tiles, o_tiles, True, True, row_of_head, True)

    @device_function
    def finish_part(sums, scales, place, num_rows, shape, pack):
        o_acc, row_max, row_sum = sums
        max_scale, of_values = scales
        packed_heads = quotient(shape.num_heads_q, pack)
        part = i64(place.slot) * packed_heads + quotient(place.head, pack)
        first = part * tile_m
        row, end = i32(accumulator_row(rows_per_warp)), i32(num_rows - place.start)
        for r in range(rows):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            top = row_max[r] * max_scale
            row_sum[r], top, total = end_of_row(top, total, 0, place.batch, place.head)
            if accumulator_column() == 0 and i < min(end, tile_m):
                shape.part_lses[first + i] = lse_of_row(top, total)
            row_sum[r] *= of_values
        scale_rows(o_acc, row_sum)
        target = Tensor(shape.parts, i64(0), i64(pitch), i64(0))
        store_part(o_acc, target, first * pitch, row, min(end, tile_m), pitch)

    return finish_part
