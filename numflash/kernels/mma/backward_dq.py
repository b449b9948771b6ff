"""Backward for Q on the tensor cores: dQ = dS K, with P computed again from lse.

A block owns tile_m rows of Q and dO and walks over K and V in tiles of tile_n, as the forward
does. S, dP and dS stay in registers; K serves twice, by rows for S and transposed for dQ.

The main loop in machine code, a warp and a tile (bfloat16, head_dim 128, tile 128 x 32, sm_90a):

    192 HMMA             S = Q K^T, dP = dO V^T and dQ += dS K
     80 LDSM             operands: 16 each of Q, K, dO and V, 16 of K transposed
     32 MUFU, FFMA       P from S and lse
     32 FADD, FMUL       dS from P, dP and delta; 16 F2FP to bfloat16
      8 LDGSTS           K and V, with addresses and bounds; 1 BAR
     96 ISETP, FSEL      the mask, only on tiles that an edge crosses

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2, with the loop order that gives each block
its own rows of dQ.
"""

import math

from numflash.configs import MmaBackwardDqConfig, Traits
from numflash.kernels.arguments import Statistics, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.tiles import addresses, blocks, features, sequences, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.mma import copies, elements, fragments, products, softmax
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    first_row_of_warp,
)
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, tiles_seen, tiles_seen_whole


def make_backward_dq_kernel(config: MmaBackwardDqConfig, traits: Traits) -> Kernel:
    """The dQ kernel for one config; see the module's docstring."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages = config.num_stages
    m_tiles, n_tiles, dq_tiles = config.m_tiles, tile_n // 8, traits.head_dim // 8
    rows, rows_per_warp = 2 * m_tiles, MMA_ROWS * m_tiles
    n_scores, n_dq = 4 * m_tiles * n_tiles, 4 * m_tiles * dq_tiles

    offsets = config.smem_offsets(traits)
    q_smem, do_smem, k_smem, v_smem = (offsets[name] for name in ("q", "do", "k", "v"))
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    k_words, v_words = tile_n * k_layout.pitch, tile_n * v_layout.pitch

    place_of_queries = blocks.make_place_of_queries(tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    steps_of, tile_at = steps.make_steps_of(traits, tile_n), steps.make_tile_at(traits, tile_n)
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_q = copies.make_copy_tile(element, k_layout, tile_m, *copy)
    copy_do = copies.make_copy_tile(element, v_layout, tile_m, *copy)
    copy_k = copies.make_copy_tile(element, k_layout, tile_n, *copy)
    copy_v = copies.make_copy_tile(element, v_layout, tile_n, *copy)
    fetch_k = copies.make_fetch_tile(copy_k, k_smem, k_words, tile_n)
    fetch_v = copies.make_fetch_tile(copy_v, v_smem, v_words, tile_n)
    k_row_operand, k_column_operand = fragments.make_operands(k_layout)
    v_row_operand, v_column_operand = fragments.make_operands(v_layout)
    first_of_k, _ = elements.make_transposed_operand(element, k_layout)
    multiply_q_k = products.make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    multiply_do_v = products.make_product_nt(element, m_tiles, n_tiles, v_layout, v_layout)
    multiply_ds_k = products.make_product_pn(element, m_tiles, n_tiles, dq_tiles, k_layout)
    apply_functions = make_apply_functions(m_tiles, n_tiles, traits, True, traits.bends_scores)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    softmax_backward = softmax.make_softmax_backward_by_row(m_tiles, n_tiles, traits)
    store_as = traits.float32_out, addresses.row_of_head, traits.float32_out
    store_dq = copies.make_store_rows(element, m_tiles, dq_tiles, traits.vectorized, *store_as)
    out_storage = f32 if traits.float32_out else element.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    bends, has_functions = traits.shapes_scores, traits.has_functions
    drops = traits.drops_weights
    n_slopes = n_scores if traits.bends_scores else 1
    # Tiles that may be on their way while one is used.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[max(0, num_stages - 2)]

    def backward_dq(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dq: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        dq_acc = cuda.local.array(n_dq, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)

        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        place = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, head_kv, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        do_base = first_of_rows(do, batch, head, sequence.first_q)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        args = args_of_head(scores, batch, head)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        # Tiles of keys that some of these rows see, and those that all of them see.
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(m_start, last_query, tile_n, sequence)
        n_begin, n_end = steps_of(mask, batch, head, m_start, tiles)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)

        # This lane's position in the operands, and of its scores in the tile.
        lane = cuda.threadIdx.x % 32
        warp_row = first_row_of_warp(rows_per_warp)
        q_mine = q_smem + k_row_operand(warp_row, 0, lane)
        do_mine = do_smem + v_row_operand(warp_row, 0, lane)
        k_mine = k_smem + k_column_operand(0, 0, lane)
        v_mine = v_smem + v_column_operand(0, 0, lane)
        k_transposed = k_smem + first_of_k(lane)

        # Without keys nothing would wait for Q and dO.
        if n_begin < n_end:
            copy_q(smem, q_smem, q, q_base, m_start, sequence.seqlen_q, shape.head_dim)
            copy_do(smem, do_smem, do, do_base, m_start, sequence.seqlen_q, shape.head_dim_v)
        for stage in range(num_stages - 1):
            n = i32(n_begin + stage)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, k_base, n_block, stage, sequence.seqlen_k, shape.head_dim)
                fetch_v(smem, v, v_base, n_block, stage, sequence.seqlen_k, shape.head_dim_v)
            if asynchronous:
                cp_async_commit_group()
        for i in range(n_dq):
            dq_acc[i] = f32(0)
        row = i32(m_start + accumulator_row(rows_per_warp))
        for r in range(rows):
            i = row + ROW_STEP * r
            # A row past the end is like one that sees no key: its P is zero.
            lses[r] = f32(math.inf)
            deltas[r] = f32(0)
            if i < sequence.seqlen_q:
                lses[r] = statistics_log2.lse[first_query + i]
                deltas[r] = statistics_log2.delta[first_query + i]

        stage = i32(0)
        last_stage = i32(num_stages - 1)
        for step in range(n_begin, n_end):
            # The tile must have arrived, unless there is only one stage. The barrier shows it to
            # all threads, and all have read the tile before it, whose buffer is written again.
            if asynchronous and num_stages > 1:
                wait_for_tile()
            cuda.syncthreads()
            n = i32(step + num_stages - 1)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, k_base, n_block, last_stage, sequence.seqlen_k, shape.head_dim)
                fetch_v(smem, v, v_base, n_block, last_stage, sequence.seqlen_k, shape.head_dim_v)
            if asynchronous:
                cp_async_commit_group()
            if num_stages == 1:
                # The only buffer must have been filled, for all threads.
                if asynchronous:
                    wait_for_tile()
                cuda.syncthreads()

            # S = Q K^T, dP = dO V^T
            multiply_q_k(s_acc, smem, q_mine, k_mine + k_words * stage)
            multiply_do_v(dp_acc, smem, do_mine, v_mine + v_words * stage)
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            if has_functions:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                corner = Corner(i, j, sequence, is_full)
                apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
            if n_start < whole.first or n_start > whole.last:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                mask_scores(s_acc, i, j, sequence.seqlen_k, sequence, 1)

            # dS = P * (softmax_scale dP - delta), dQ += dS K
            scales = scale_log2, scores.softmax_scale
            if drops:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, i, j, args.drawn)
            else:
                softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales)
            multiply_ds_k(dq_acc, dp_acc, smem, k_transposed + k_words * stage)
            last_stage = stage
            stage = i32(stage + 1 if stage + 1 < num_stages else 0)

        row = i32(m_start + accumulator_row(rows_per_warp))
        dq_base = first_of_rows(dq, batch, head, sequence.first_q)
        store_dq(dq_acc, dq, dq_base, row, sequence.seqlen_q, shape.head_dim)

    return Kernel(config.family, backward_dq, num_threads, config.smem_bytes(traits))
