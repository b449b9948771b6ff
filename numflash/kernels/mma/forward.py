"""Forward on the tensor cores: O = softmax(softmax_scale Q K^T) V and lse.

A block owns tile_m rows of Q and walks over K and V in tiles of tile_n. A warp owns whole rows:
its scores S, their softmax P and its part of O stay in registers, and P goes from accumulator to
operand without leaving them. K and V of `num_stages` blocks are in shared memory or on their way:
V of a block is fetched while S is computed, K of the next while V is used.

Rows may be packed: where few queries share a key-value head with others, `pack` query heads of one
token are neighbouring rows, so that K and V are read once for all of them. Row r then is token
r // pack of head r % pack.

The keys may be split over `num_splits` blocks, which write float32 parts of O, each normalised by
itself, and their lse; `shared.combine` puts the parts together.

The main loop in machine code, a warp and a tile (bfloat16, head_dim 128, tile 128 x 64, sm_90a):

    256 HMMA          S = Q K^T and O += P V, two rows of products a warp
     80 LDSM          operands from shared memory: 16 of Q, 32 of K, 32 of V
     64 MUFU, FFMA    one exponential and one multiply-add a score; 4 FFMA: does a row grow?
     64 FMNMX, FADD   the row's maximum and sum; 8 SHFL and FMNMX across its four lanes
     32 F2FP          P to bfloat16
     16 LDGSTS        K and V, each with about 5 instructions for address and bounds; 2 BAR
    128 FMUL          O rescaled, only when a maximum has grown by 2 ** 8
    192 ISETP, FSEL   the mask, only on tiles that an edge crosses, with 2 divisions for the tokens

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1; Flash-Decoding for the splits.
"""

from numflash.configs import MmaForwardConfig, Traits
from numflash.kernels.arguments import Layout, Mask, Part, Pointer, Scores, Shape, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import (
    CP_ASYNC_WAIT_GROUP,
    cp_async_commit_group,
    cuda,
    f32,
    i32,
    i64,
    u32,
)
from numflash.tiles.blocks import first_of_head, token_of_row
from numflash.tiles.features import make_args_of_head
from numflash.tiles.mma.copies import make_copy_tile, make_store_rows
from numflash.tiles.mma.elements import MMA_ELEMENTS, make_transposed_operand
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    column_operand_chunk,
    column_operand_row,
    first_row_of_warp,
    row_operand_chunk,
    row_operand_row,
)
from numflash.tiles.mma.layouts import TileLayout, make_word
from numflash.tiles.mma.products import make_product_nt, make_product_pn
from numflash.tiles.mma.scores import make_mask_scores, make_scale_scores
from numflash.tiles.mma.softmax import (
    make_online_softmax,
    make_scale_rows,
    row_sum_of_quad,
)
from numflash.tiles.portable.softmax import LN_2, LOG2_E
from numflash.tiles.rows import make_end_of_row
from numflash.tiles.scores import (
    NEG_INF,
    band_block_begin,
    band_block_end,
    band_is_partial,
)


def make_forward_kernel(config: MmaForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    element = MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages, is_split = config.num_stages, config.num_splits > 1
    m_tiles, n_tiles, o_tiles = config.m_tiles, tile_n // 8, traits.head_dim_v // 8
    rows, rows_per_warp = 2 * m_tiles, MMA_ROWS * m_tiles
    n_scores, n_o = 4 * m_tiles * n_tiles, 4 * m_tiles * o_tiles

    offsets = config.smem_offsets(traits)
    q_smem, k_smem, v_smem = (offsets[name] for name in "qkv")
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    k_words, v_words = tile_n * k_layout.pitch, tile_n * v_layout.pitch

    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_q = make_copy_tile(element, k_layout, tile_m, *copy, packed=True)
    copy_k = make_copy_tile(element, k_layout, tile_n, *copy)
    copy_v = make_copy_tile(element, v_layout, tile_n, *copy)
    word = make_word(k_layout)
    first_of_v, _ = make_transposed_operand(element, v_layout)
    multiply_q_k = make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    multiply_p_v = make_product_pn(element, m_tiles, n_tiles, o_tiles, v_layout)
    scale_scores = make_scale_scores(m_tiles, n_tiles, traits.features)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    online_softmax = make_online_softmax(m_tiles, n_tiles, o_tiles)
    scale_rows = make_scale_rows(m_tiles, o_tiles)
    end_of_row, lse_of_row = make_end_of_row(traits.features, LN_2, is_split)
    store_o = make_store_rows(
        element, m_tiles, o_tiles, traits.vectorized or is_split, is_split, packed=True
    )
    storage, args_of_head = element.storage, make_args_of_head(traits.features)
    bends = traits.shapes_scores
    selected = traits.selected
    out_storage = f32 if is_split else storage
    # Copies that may be on their way while the next tile is used: K and V of all stages but one.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[2 * num_stages - 2]

    def forward(
        q: Tensor[storage],
        k: Tensor[storage],
        v: Tensor[storage],
        out: Part[out_storage],
        lse: Pointer(f32),
        in_fp8: Pointer(i32),
        mask: Mask,
        shape: Shape,
        layout: Layout,
        scores: Scores,
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)

        # Heads go in bundles whose K and V fit the L2 cache; within a bundle the last rows, which
        # in a causal problem see the most keys, start first.
        num_rows = shape.seqlen_q * layout.pack
        num_m_blocks = (num_rows + tile_m - 1) // tile_m
        num_heads = shape.batch_size * (shape.num_heads_q // layout.pack)
        split = cuda.blockIdx.x % layout.num_splits
        block = cuda.blockIdx.x // layout.num_splits
        first_head = block // (layout.heads_in_flight * num_m_blocks) * layout.heads_in_flight
        bundle = min(layout.heads_in_flight, num_heads - first_head)
        in_bundle = block - first_head * num_m_blocks
        m_start = (num_m_blocks - 1 - in_bundle // bundle) * tile_m
        head_of_batch = (first_head + in_bundle % bundle) * layout.pack
        head, batch = head_of_batch % shape.num_heads_q, head_of_batch // shape.num_heads_q
        head_kv = head // shape.group_size
        # Heads that are computed on 8-bit floats are another kernel's.
        if selected and in_fp8[batch * (shape.num_heads_q // shape.group_size) + head_kv] != 0:
            return

        q_base = first_of_head(q, batch, head)
        k_base = first_of_head(k, batch, head_kv)
        v_base = first_of_head(v, batch, head_kv)
        args = args_of_head(scores.features, batch, head)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E

        # The tokens of this block's rows, the keys they see, and this split's share of those.
        first_token = token_of_row(m_start, layout.pack)
        last_token = token_of_row(min(m_start + tile_m, num_rows) - 1, layout.pack)
        n_begin = i32(band_block_begin(first_token, mask.lo, tile_n))
        n_end = i32(band_block_end(last_token, mask.hi, shape.seqlen_k, tile_n))
        if is_split:
            share = (max(0, n_end - n_begin) + layout.num_splits - 1) // layout.num_splits
            n_begin = i32(n_begin + split * share)
            n_end = i32(min(n_end, n_begin + share))

        # Where this lane reads operands, and where its scores lie in the tile.
        lane = cuda.threadIdx.x % 32
        warp_row = first_row_of_warp(rows_per_warp)
        q_mine = q_smem + word(warp_row + row_operand_row(lane), row_operand_chunk(lane))
        k_mine = k_smem + word(column_operand_row(lane), column_operand_chunk(lane))
        v_mine = v_smem + first_of_v(lane)

        if n_begin < n_end:  # else nobody would wait for it
            copy_q(smem, q_smem, q, q_base, m_start, num_rows, shape.head_dim, layout.pack)
        for stage in range(num_stages):
            n = n_begin + stage
            if n < n_end:
                k_tile = k_smem + k_words * stage
                copy_k(smem, k_tile, k, k_base, i32(n * tile_n), shape.seqlen_k, shape.head_dim)
            if asynchronous:
                cp_async_commit_group()
            if stage < num_stages - 1:
                if n < n_end:
                    v_tile = v_smem + v_words * stage
                    copy_v(
                        smem, v_tile, v, v_base, i32(n * tile_n), shape.seqlen_k, shape.head_dim_v
                    )
                if asynchronous:
                    cp_async_commit_group()
        for i in range(n_o):
            o_acc[i] = f32(0)
        for r in range(rows):
            row_max[r] = NEG_INF
            row_sum[r] = f32(0)

        stage = 0
        last_stage = num_stages - 1
        for n_block in range(n_begin, n_end):
            # K of this block has arrived; V of the previous block has been read by all.
            if asynchronous:
                wait_for_tile()
            cuda.syncthreads()
            n = n_block + num_stages - 1
            if n < n_end:
                v_tile = v_smem + v_words * last_stage
                copy_v(smem, v_tile, v, v_base, i32(n * tile_n), shape.seqlen_k, shape.head_dim_v)
            if asynchronous:
                cp_async_commit_group()

            # S = Q K^T
            multiply_q_k(s_acc, smem, q_mine, k_mine + k_words * stage)

            # V of this block has arrived; K has been read by all.
            if asynchronous:
                wait_for_tile()
            cuda.syncthreads()
            n = n_block + num_stages
            if n < n_end:
                k_tile = k_smem + k_words * stage
                copy_k(smem, k_tile, k, k_base, i32(n * tile_n), shape.seqlen_k, shape.head_dim)
            if asynchronous:
                cp_async_commit_group()

            n_start = i32(n_block * tile_n)
            if bends:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                scale_scores(s_acc, i, j, scores.scale, scores.shift, args)
            tokens = last_token + 1 - first_token
            if band_is_partial(first_token, tokens, n_start, tile_n, shape.seqlen_k, mask):
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                mask_scores(s_acc, i, j, shape.seqlen_k, mask, layout.pack)

            # P = softmax(S), O += P V
            online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2)
            multiply_p_v(o_acc, s_acc, smem, v_mine + v_words * stage)
            last_stage = stage
            stage = stage + 1 if stage + 1 < num_stages else 0

        row = i32(m_start + accumulator_row(rows_per_warp))
        num_parts = shape.batch_size * shape.num_heads_q
        for r in range(rows):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            token = token_of_row(i, layout.pack)
            packed, top = i - token * layout.pack, row_max[r] * scale_log2
            row_sum[r], top, total = end_of_row(top, total, scores.features, batch, head + packed)
            if accumulator_column() == 0 and i < num_rows:
                part = i64(split) * num_parts + head_of_batch + packed
                lse[part * shape.seqlen_q + token] = lse_of_row(top, total)
        scale_rows(o_acc, row_sum)
        out_base = split * out.split + first_of_head(out, batch, head)
        store_o(o_acc, out, out_base, row, num_rows, shape.head_dim_v, layout.pack)

    return Kernel(config.family, forward, num_threads, config.smem_bytes(traits))
