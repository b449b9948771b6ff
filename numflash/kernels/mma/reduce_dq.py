"""dQ = the sum of the parts that `sm80.backward` left, always in one order.

A block adds up one tile of tile_m rows, its threads in the places of those that wrote the parts.
"""

from numflash.configs import MmaBackwardConfig, Traits
from numflash.kernels.arguments import Mask, Pointer, Shape, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64, ld_global_v4_f32
from numflash.tiles.blocks import first_of_head
from numflash.tiles.mma.copies import make_store_rows
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import MMA_ROWS
from numflash.tiles.scores import band_block_begin, band_block_end


def make_reduce_dq_kernel(config: MmaBackwardConfig, traits: Traits) -> Kernel:
    """The kernel that goes with `make_backward_kernel(config, traits)`; see the docstring."""
    element = MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n = config.tile_m, config.tile_n
    m_warps = tile_m // MMA_ROWS
    dq_tiles = traits.head_dim // 8 // (config.num_warps // m_warps)
    n_dq, dq_words = 4 * dq_tiles, tile_m * traits.head_dim
    store_dq = make_store_rows(element, 1, dq_tiles, traits.vectorized, False)
    storage = element.storage

    def reduce_dq(
        dq_parts: Pointer(f32),
        dq: Tensor[storage],
        mask: Mask,
        shape: Shape,
        num_splits: i32,
    ):
        part_acc = cuda.local.array(4, f32)
        dq_acc = cuda.local.array(n_dq, f32)
        for i in range(n_dq):
            dq_acc[i] = f32(0)

        num_m_blocks = (shape.seqlen_q + tile_m - 1) // tile_m
        m_block = cuda.blockIdx.x % num_m_blocks
        head_of_batch = cuda.blockIdx.x // num_m_blocks
        m_start = i32(m_block * tile_m)
        last_row = min(m_start + tile_m, shape.seqlen_q) - 1
        n_begin = i32(band_block_begin(m_start, mask.lo, tile_n))
        n_end = i32(band_block_end(last_row, mask.hi, shape.seqlen_k, tile_n))
        # Queries past the last key's window see the rest of its block, which does not exist.
        if m_start + mask.lo >= shape.seqlen_k:
            n_end = n_begin
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        dq_mine = i64(warp * dq_tiles * 32 + lane) * 4
        # The splits whose keys these queries see: n_block belongs to split n_block % num_splits.
        for n_block in range(n_begin, min(n_end, n_begin + num_splits)):
            part = i64(n_block % num_splits) * shape.batch_size * shape.num_heads_q + head_of_batch
            place = (part * num_m_blocks + m_block) * dq_words + dq_mine
            for i in range(dq_tiles):
                ld_global_v4_f32(part_acc, dq_parts, place + 128 * i)
                dq_acc[4 * i] += part_acc[0]
                dq_acc[4 * i + 1] += part_acc[1]
                dq_acc[4 * i + 2] += part_acc[2]
                dq_acc[4 * i + 3] += part_acc[3]

        head, batch = head_of_batch % shape.num_heads_q, head_of_batch // shape.num_heads_q
        row = i32(m_start + warp % m_warps * MMA_ROWS + lane // 4)
        column = warp // m_warps * dq_tiles * 8
        dq_base = first_of_head(dq, batch, head) + column
        store_dq(dq_acc, dq, dq_base, row, shape.seqlen_q, shape.head_dim - column)

    return Kernel("reduce-dq", reduce_dq, config.num_threads, 0)
