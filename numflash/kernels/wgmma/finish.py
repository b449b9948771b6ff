"""The end of a tile of rows: sums become results, and results go to their tensors."""

from functools import cache

from numflash.configs.traits import Traits
from numflash.configs.wgmma import WARPGROUP_ROWS, Sm90ForwardConfig
from numflash.kernels.wgmma.ring import make_ring
from numflash.ptx import device_function, i32, i64
from numflash.tiles.blocks import first_of_head, make_block_place, token_of_row
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.softmax import make_scale_rows, row_sum_of_quad
from numflash.tiles.portable.softmax import LN_2
from numflash.tiles.rows import make_end_of_row
from numflash.tiles.wgmma.results import make_store_part, make_store_slabs
from numflash.tiles.wgmma.turns import group_of_thread


@cache
def make_finish(config: Sm90ForwardConfig, traits: Traits):
    """finish(sums, max_scale, smem, results, number, grid, shape)

    O divided by its sums and lse, of the rows of this warpgroup; `number` is the block's place.
    `sums` are its `Sums` (`skeleton`); max_scale brings row_max to base 2. `results` are out, a
    `Part`, lse, the map of out and the record `Features`; `grid` is a `Grid`, `shape` a `Shape`. O
    is on its way through shared memory afterwards (`make_store_slabs`), or in `out` where that is
    float32: with splits, or because the caller wants it.
    """
    o, is_split, o_tiles = (
        make_ring(config, traits).o,
        config.num_splits > 1,
        traits.head_dim_v // 8,
    )
    block_place, scale_rows = make_block_place(config.tile_m), make_scale_rows(1, o_tiles)
    end_of_row, lse_of_row = make_end_of_row(traits.features, LN_2, is_split)
    store_slabs, store_part = make_store_slabs(traits.dtype, o_tiles), make_store_part(o_tiles)
    in_float32, store_rows = traits.float32_out, make_store_part(o_tiles, is_padded=False)

    @device_function
    def finish(sums, max_scale, smem, results, number, grid, shape):
        o_acc, row_max, row_sum = sums
        out, lse, out_map, features = results
        num_rows, num_heads, pack, _, _ = grid
        m_start, head_of_batch, split = block_place(number, grid)
        batch = token_of_row(head_of_batch, shape.num_heads_q)
        head = i32(head_of_batch - batch * shape.num_heads_q)
        row = i32(m_start + accumulator_row(MMA_ROWS))
        for r in range(2):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            token = token_of_row(i, pack)
            packed, top = i - token * pack, row_max[r] * max_scale
            row_sum[r], top, total = end_of_row(top, total, features, batch, head + packed)
            if accumulator_column() == 0 and i < num_rows:
                part = i64(split) * num_heads + head_of_batch + packed
                lse[part * shape.seqlen_q + token] = lse_of_row(top, total)
        scale_rows(o_acc, row_sum)
        if is_split:
            base = split * out.split + first_of_head(out, batch, head)
            store_part(o_acc, out, base, row, num_rows, pack, shape.head_dim_v)
        elif in_float32:
            base = first_of_head(out, batch, head)
            store_rows(o_acc, out, base, row, num_rows, pack, shape.head_dim_v)
        else:
            group = group_of_thread()
            target = i32(o.first + o.words * group)
            token = token_of_row(m_start + WARPGROUP_ROWS * group, pack)
            packed_head = token_of_row(head, pack)
            store_slabs(o_acc, smem, target, group, out_map, token, packed_head, batch)

    return finish
