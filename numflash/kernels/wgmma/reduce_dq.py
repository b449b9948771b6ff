"""dQ from the float32 sums that `wgmma.backward` leaves in the order of its registers.

A block of 128 threads converts one tile of tile_m rows: each thread takes what the thread of its
number in a warpgroup held. Tiles that see no key have no sums: their dQ is zero.
"""

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90ReduceDqConfig
from numflash.kernels.arguments import Pointer, Shape, Tensor, TurnsShape, mask_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64, ld_global_v4_f32, mov_ctaid_x
from numflash.tiles import addresses, blocks, sequences
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import quotient
from numflash.tiles.mma import copies
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import MMA_ROWS
from numflash.tiles.wgmma.turns import WARPGROUP
from numflash.tiles.wgmma.turns_of_blocks import (
    make_has_place,
    make_has_sums,
    make_places_of,
)


def make_reduce_dq_kernel(config: Sm90ReduceDqConfig, traits: Traits) -> Kernel:
    """The kernel after `make_backward_kernel(config, traits)`; see the module's docstring."""
    element, tile_m = MMA_ELEMENTS["sm80", traits.dtype], config.tile_m
    parts, columns = config.dq_groups(traits), config.dq_columns(traits)
    dq_tiles = columns // 8
    n_dq, part_words, words = 4 * dq_tiles, WARPGROUP * columns // 2, tile_m * traits.head_dim
    # Each warpgroup's part has other queries than the rest, or other columns.
    row_step, column_step = (WARPGROUP_ROWS, 0) if tile_m > WARPGROUP_ROWS else (0, columns)
    store_as = traits.float32_out, addresses.row_of_head, traits.float32_out
    store_dq = copies.make_store_rows(element, 1, dq_tiles, traits.vectorized, *store_as)
    out_storage = f32 if traits.float32_out else element.storage
    place_of_queries = blocks.make_place_of_queries(tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    any_adds = make_has_sums(tile_m, config.tile_n, traits)
    places_of, has_place = make_places_of(tile_m, traits), make_has_place(traits)

    def reduce_dq(
        dq_sums: Pointer(f32),  # (batch, num_heads_q, tiles of queries, tile_m * head_dim)
        dq: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        mask: mask_of(traits),
        shape: TurnsShape if traits.ragged else Shape,
    ):
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        dq_acc = cuda.local.array(n_dq, f32)
        place = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, _, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        tile = quotient(m_start, tile_m)
        places = places_of(batch, shape)
        first_tile = (places.first_head + head) * places.num_tiles + places.first_tile
        number = first_tile + tile
        has_sums = has_place(tile, places) and any_adds(tile, head, batch, sequence, mask)
        thread = i32(cuda.threadIdx.x)
        row = i32(m_start + thread // 32 * MMA_ROWS + thread % 32 // 4)
        dq_base = first_of_rows(dq, batch, head, sequence.first_q)
        for part in range(parts):
            first_sum = i64(number) * words + part * part_words + 4 * thread
            for i in range(n_dq):
                dq_acc[i] = f32(0)
            if has_sums:
                for i in range(dq_tiles):
                    frag = dq_acc[4 * i : 4 * i + 4]
                    ld_global_v4_f32(frag, dq_sums, first_sum + 4 * WARPGROUP * i)
            column, first = column_step * part, i32(row + row_step * part)
            end, width = sequence.seqlen_q, i32(shape.head_dim - column)
            store_dq(dq_acc, dq, dq_base + column, first, end, width)

    return Kernel(config.family, reduce_dq, config.num_threads, 0)
