"""dQ = the sum of the parts that `mma.backward` left, always in one order.

A block adds up one tile of tile_m rows, its threads in the places of those that wrote the parts.
"""

from numflash.configs import MmaBackwardConfig, Traits
from numflash.kernels.arguments import Mask, Pointer, Shape, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64, ld_global_v4_f32, mov_ctaid_x
from numflash.tiles import addresses, blocks
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import divide, quotient, tiles_of
from numflash.tiles.mma import copies, elements
from numflash.tiles.mma.fragments import MMA_ROWS
from numflash.tiles.sequences import last_of, sequence_of_all, tiles_seen


def make_reduce_dq_kernel(config: MmaBackwardConfig, traits: Traits) -> Kernel:
    """The kernel that goes with `make_backward_kernel(config, traits)`; see the docstring."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n = config.tile_m, config.tile_n
    m_warps = tile_m // MMA_ROWS
    dq_tiles = traits.head_dim // 8 // (config.num_warps // m_warps)
    n_dq, dq_words = 4 * dq_tiles, tile_m * traits.head_dim
    store_as = traits.float32_out, addresses.row_of_head, traits.float32_out
    store_dq = copies.make_store_rows(element, 1, dq_tiles, traits.vectorized, *store_as)
    out_storage = f32 if traits.float32_out else element.storage
    place_of_queries = blocks.make_place_of_queries(tile_m, traits)

    def reduce_dq(
        dq_parts: Pointer(f32),  # (split, batch, num_heads_q, tiles of queries, tile_m * head_dim)
        dq: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        mask: Mask,
        shape: Shape,
        num_splits: i32,
    ):
        part_acc = cuda.local.array(4, f32)
        dq_acc = cuda.local.array(n_dq, f32)
        for i in range(n_dq):
            dq_acc[i] = f32(0)

        m_start, head, _, batch, _ = place_of_queries(mov_ctaid_x(), shape, mask)
        sequence = sequence_of_all(shape, mask)
        num_m_blocks, m_block = tiles_of(shape.seqlen_q, tile_m), quotient(m_start, tile_m)
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        n_begin, n_end = tiles_seen(m_start, last_query, tile_n, sequence)
        # Queries past the last key's window see the rest of its block, which does not exist.
        if m_start + sequence.lo >= sequence.seqlen_k:
            n_end = n_begin
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        dq_mine = i64(warp * dq_tiles * 32 + lane) * 4
        # The splits whose keys these queries see: n_block belongs to split n_block % num_splits.
        for n_block in range(n_begin, min(n_end, n_begin + num_splits)):
            _, split = divide(n_block, num_splits)
            part = i64((split * shape.batch_size + batch) * shape.num_heads_q + head)
            place = (part * num_m_blocks + m_block) * dq_words + dq_mine
            for i in range(dq_tiles):
                ld_global_v4_f32(part_acc, dq_parts, place + 128 * i)
                dq_acc[4 * i] += part_acc[0]
                dq_acc[4 * i + 1] += part_acc[1]
                dq_acc[4 * i + 2] += part_acc[2]
                dq_acc[4 * i + 3] += part_acc[3]

        row = i32(m_start + warp % m_warps * MMA_ROWS + lane // 4)
        column = warp // m_warps * dq_tiles * 8
        dq_base = first_of_rows(dq, batch, head, sequence.first_q) + column
        store_dq(dq_acc, dq, dq_base, row, sequence.seqlen_q, shape.head_dim - column)

    return Kernel("reduce-dq", reduce_dq, config.num_threads, 0)
