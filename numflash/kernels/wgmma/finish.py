"""The end of a tile of rows: sums become results, and results go to their tensors."""

from functools import cache

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits
from numflash.kernels.wgmma.origins import make_origins
from numflash.kernels.wgmma.ring import make_ring
from numflash.ptx import device_function, i32
from numflash.tiles import addresses, blocks, rows, sequences
from numflash.tiles.addresses import first_of_rows, token_of_row
from numflash.tiles.mma import softmax
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.softmax import row_sum_of_quad
from numflash.tiles.portable.softmax import LN_2
from numflash.tiles.wgmma import clusters
from numflash.tiles.wgmma.results import make_store_part, make_store_slabs
from numflash.tiles.wgmma.turns import group_of_thread


@cache
def make_finish(config: Sm90ForwardConfig, traits: Traits):
    """finish(sums, max_scale, smem, results, number, grid, shape, layout, mask)

    O divided by its sums and lse, of the rows of this warpgroup; `number` is the place of the
    block, or of its cluster. `sums` are its `Sums` (`skeleton`); max_scale brings row_max to base
    2. `results` are out, a `Part`, lse, the map of out and the record `Features`; `grid` is a
    `Grid`, `shape` a `Shape`. O is on its way through shared memory afterwards
    (`make_store_slabs`), or in `out` where that is float32: with splits, or because the caller
    wants it.
    """
    o = make_ring(config, traits).o
    is_split = config.num_splits > 1
    o_tiles = traits.head_dim_v // 8
    place_of = blocks.make_place_of(config.block_rows, traits)
    own_rows = clusters.make_own_rows(config.cluster, config.tile_m, traits)
    sequence_of = sequences.make_sequence_of(traits)
    _, origin_of_out = make_origins(traits)
    first_of_lse = addresses.make_first_of_lse(traits)
    scale_rows = softmax.make_scale_rows(1, o_tiles)
    end_of_row, lse_of_row = rows.make_end_of_row(traits.features, LN_2, is_split)
    store_slabs, store_part = make_store_slabs(traits.dtype, o_tiles), make_store_part(o_tiles)
    in_float32, store_rows = traits.float32_out, make_store_part(o_tiles, is_padded=False)

    @device_function
    def finish(sums, max_scale, smem, results, number, grid, shape, layout, mask):
        o_acc, row_max, row_sum = sums
        out, lse, out_map, features = results
        pack, place = grid.pack, own_rows(place_of(number, grid, shape, mask))
        m_start, head, _, batch, split = place[:5]
        sequence = sequence_of(place, shape, mask)
        num_rows = i32(sequence.seqlen_q * pack)
        row = i32(m_start + accumulator_row(MMA_ROWS))
        for r in range(2):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            token = token_of_row(i, pack)
            packed, top = i - token * pack, row_max[r] * max_scale
            row_sum[r], top, total = end_of_row(top, total, features, batch, head + packed)
            if accumulator_column() == 0 and i < num_rows:
                first = first_of_lse(place, packed, sequence, grid, shape)
                lse[first + token] = lse_of_row(top, total)
        scale_rows(o_acc, row_sum)
        if is_split:
            base = split * out.split + first_of_rows(out, batch, head, sequence.first_q)
            store_part(o_acc, out, base, row, num_rows, pack, shape.head_dim_v)
        elif in_float32:
            base = first_of_rows(out, batch, head, sequence.first_q)
            store_rows(o_acc, out, base, row, num_rows, pack, shape.head_dim_v)
        else:
            group = group_of_thread()
            target = i32(o.first + o.words * group)
            in_out = origin_of_out(place, sequence, shape, layout)
            token = i32(token_of_row(m_start + WARPGROUP_ROWS * group, pack) + in_out.row)
            packed_head = token_of_row(head, pack)
            store_slabs(o_acc, smem, target, group, out_map, token, packed_head, in_out.entry)

    return finish
