"""Backward on the tensor cores in one walk: dK, dV and dQ from five products a tile, not seven.

A block owns tile_n rows of K and V and walks over Q and dO, as `backward_dkdv` does. dS^T, which
the warps hold by keys, then goes through shared memory, and each warp computes dQ = dS K for its
rows of queries and its part of head_dim.

dQ of a query is a sum over all keys, which are dealt out to `num_splits` blocks: each of them
walks over every num_splits-th row block of K and V, adds to float32 parts of dQ of its own, and so
needs no atomics; `reduce_dq` adds the parts up. The result is the same in every run. The parts lie
as the threads hold them, 16 bytes a lane.

The main loop in machine code, a warp and a tile (bfloat16, head_dim 128, tile 32 x 128, sm_90a):

    160 HMMA             S^T, dP^T, dV, dK and dQ
    104 LDSM             operands: 8 of K, 8 of V, 16 each of Q and dO, by rows and transposed,
                         8 of dS and 16 of K transposed
     16 MUFU, FFMA       P from S and lse; 8 LDS for lse and delta
     16 FFMA, FMUL       dS from P, dP and delta; 16 F2FP, 8 STS of dS
      4 LDG, STG         16 bytes each of this split's dQ; 6 LDGSTS, 2 BAR

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2; one buffer of dQ a split as in its
deterministic mode.
"""

from numflash.configs import MmaBackwardConfig, Traits
from numflash.kernels.arguments import Mask, Pointer, Shape, Statistics, Tensor, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.queries import following, make_fetch_queries
from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x, mov_tid_x, u32
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.ptx.memory import ld_global_v4_f32, st_global_v4_f32
from numflash.tiles import features
from numflash.tiles.addresses import first_of_rows, row_of_head
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import quotient, tiles_of
from numflash.tiles.mma import copies, elements, layouts, products, softmax
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    accumulator_column,
    accumulator_row,
    column_operand_chunk,
    column_operand_row,
    row_operand_chunk,
    row_operand_row,
)
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_rows, make_mask_scores
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import (
    last_of,
    seen_from_keys,
    sequence_of_all,
    tiles_seen,
    tiles_seen_whole,
)


def make_backward_kernel(config: MmaBackwardConfig, traits: Traits) -> Kernel:
    """The backward kernel for one config; see the module's docstring."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages = config.num_stages
    n_tiles = tile_m // 8
    dk_tiles, dv_tiles = traits.head_dim // 8, traits.head_dim_v // 8
    n_scores, n_dk, n_dv = 4 * n_tiles, 4 * dk_tiles, 4 * dv_tiles
    # dQ of a tile: the warps share its rows, and where there are more of them its columns.
    m_warps = tile_m // MMA_ROWS
    dq_tiles = dk_tiles // (config.num_warps // m_warps)
    n_dq, dq_words = 4 * dq_tiles, tile_m * traits.head_dim

    offsets = config.smem_offsets(traits)
    k_smem, v_smem, q_smem, do_smem = (offsets[name] for name in ("k", "v", "q", "do"))
    lse_smem, delta_smem, ds_smem = offsets["lse"], offsets["delta"], offsets["ds"]
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    ds_layout = TileLayout(config.ds_columns // element.per_chunk, config.swizzled)
    q_words, do_words = tile_m * k_layout.pitch, tile_m * v_layout.pitch

    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_k = copies.make_copy_tile(element, k_layout, tile_n, *copy)
    copy_v = copies.make_copy_tile(element, v_layout, tile_n, *copy)
    fetch_queries = make_fetch_queries(config, traits)
    k_word, v_word, ds_word = map(layouts.make_word, (k_layout, v_layout, ds_layout))
    first_of_q, _ = elements.make_transposed_operand(element, k_layout)
    first_of_do, _ = elements.make_transposed_operand(element, v_layout)
    multiply_k_q = products.make_product_nt(element, 1, n_tiles, k_layout, k_layout)
    multiply_v_do = products.make_product_nt(element, 1, n_tiles, v_layout, v_layout)
    multiply_p_do = products.make_product_pn(element, 1, n_tiles, dv_tiles, v_layout)
    multiply_ds_q = products.make_product_pn(element, 1, n_tiles, dk_tiles, k_layout)
    multiply_ds_k = products.make_product_tn(element, tile_n, dq_tiles, ds_layout, k_layout)
    apply_functions = make_apply_functions(1, n_tiles, traits, False, traits.bends_scores)
    mask_scores, mask_rows = make_mask_scores(1, n_tiles), make_mask_rows(1, n_tiles)
    softmax_backward = softmax.make_softmax_backward_by_column(1, n_tiles, traits)
    store_ds = copies.make_store_scores(element, n_tiles, ds_layout)
    store_as = traits.vectorized, traits.float32_out, row_of_head, traits.float32_out
    store_dk = copies.make_store_rows(element, 1, dk_tiles, *store_as)
    store_dv = copies.make_store_rows(element, 1, dv_tiles, *store_as)
    out_storage = f32 if traits.float32_out else element.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    bends, has_functions = traits.shapes_scores, traits.has_functions
    drops = traits.drops_weights
    n_slopes = n_scores if traits.bends_scores else 1
    # Tiles that may be on their way while one is used.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[max(0, num_stages - 2)]

    def backward(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dk: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        dv: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        dq_parts: Pointer(f32),  # (split, batch, num_heads_q, tiles of queries, tile_m * head_dim)
        mask: Mask,
        shape: Shape,
        num_splits: i32,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        dq_acc = cuda.local.array(n_dq, f32)

        num_heads_kv = quotient(shape.num_heads_q, shape.group_size)
        split, head_kv, batch = place_in_heads(mov_ctaid_x(), num_splits, num_heads_kv)
        sequence = sequence_of_all(shape, mask)
        from_keys = seen_from_keys(sequence)
        num_n_blocks = tiles_of(sequence.seqlen_k, tile_n)
        num_m_blocks = tiles_of(shape.seqlen_q, tile_m)
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E

        for walk in range(tiles_of(num_n_blocks - split, num_splits)):
            n_block = i32(split + walk * num_splits)
            n_start = i32(n_block * tile_n)
            # Tiles of queries that see some of these keys, and those that see all of them.
            last_key = last_of(n_start, tile_n, sequence.seqlen_k)
            m_begin, m_end = tiles_seen(n_start, last_key, tile_m, from_keys)
            whole = tiles_seen_whole(n_start, last_key, tile_m, from_keys)
            # All threads have read the K and V before these, whose buffers are filled again.
            cuda.syncthreads()
            # Nothing waits for the copies of a walk without tiles, which would still be under way
            # when the next walk copies to the same bytes.
            if m_begin < m_end:
                copy_k(smem, k_smem, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
                copy_v(smem, v_smem, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)
            for i in range(n_dk):
                dk_acc[i] = f32(0)
            for i in range(n_dv):
                dv_acc[i] = f32(0)

            num_tiles = i32((m_end - m_begin) * shape.group_size)
            next_m, next_head = m_begin, i32(head_kv * shape.group_size)
            m_block, head = m_begin, next_head
            stage = i32(0)
            last_stage = i32(num_stages - 1)
            for tile in range(i32(1 - num_stages), num_tiles):
                if tile >= 0:
                    # The tile must have arrived, unless there is only one stage. The barrier shows
                    # it to all threads, and all have read the tile before it and dS, whose buffers
                    # are written again.
                    if asynchronous and num_stages > 1:
                        wait_for_tile()
                    cuda.syncthreads()
                if i32(tile + num_stages - 1) < num_tiles:
                    into = i32(last_stage if tile >= 0 else tile + num_stages - 1)
                    ahead = next_m, next_head
                    fetch_queries(
                        smem, into, ahead, q, do, statistics_log2, batch, sequence, shape
                    )
                    if num_stages == 1:
                        m_block, head = ahead
                    next_m, next_head = following(next_m, next_head, m_begin, m_end)
                if asynchronous:
                    cp_async_commit_group()
                if tile >= 0:
                    if num_stages == 1:
                        # The only buffer must have been filled, for all threads.
                        if asynchronous:
                            wait_for_tile()
                        cuda.syncthreads()

                    # Where this lane reads operands. All gradients in registers leave none to keep
                    # this in, so it is computed again for each tile.
                    thread = mov_tid_x()
                    warp, lane = thread // 32, thread % 32
                    row_operand = warp * MMA_ROWS + row_operand_row(lane)
                    row_chunk = row_operand_chunk(lane)
                    column_operand = column_operand_row(lane)
                    column_chunk = column_operand_chunk(lane)
                    k_mine = k_smem + k_word(row_operand, row_chunk)
                    v_mine = v_smem + v_word(row_operand, row_chunk)
                    q_mine = q_smem + k_word(column_operand, column_chunk) + q_words * stage
                    do_mine = do_smem + v_word(column_operand, column_chunk) + do_words * stage

                    # S^T = K Q^T, dP^T = V dO^T
                    multiply_k_q(s_acc, smem, k_mine, q_mine)
                    multiply_v_do(dp_acc, smem, v_mine, do_mine)
                    m_start = i32(m_block * tile_m)
                    if has_functions:
                        args = args_of_head(scores, batch, head)
                        j = i32(n_start + accumulator_row(MMA_ROWS))
                        i = i32(m_start + accumulator_column())
                        corner = Corner(j, i, sequence, False)
                        apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
                    if m_start < whole.first or m_start > whole.last:
                        j = i32(n_start + accumulator_row(MMA_ROWS))
                        i = i32(m_start + accumulator_column())
                        mask_scores(s_acc, j, i, sequence.seqlen_q, from_keys, 1)
                    if n_start + tile_n > sequence.seqlen_k:
                        j = i32(n_start + accumulator_row(MMA_ROWS))
                        mask_rows(s_acc, j, sequence.seqlen_k)

                    # dS = P * (softmax_scale dP - delta); dV += P^T dO, dK += dS^T Q
                    first_of_stage = tile_m * stage + accumulator_column()
                    lse_mine, delta_mine = lse_smem + first_of_stage, delta_smem + first_of_stage
                    scales = scale_log2, scores.softmax_scale
                    at = smem, lse_mine, delta_mine
                    if drops:
                        j = i32(n_start + accumulator_row(MMA_ROWS))
                        i = i32(m_start + accumulator_column())
                        drawn = args_of_head(scores, batch, head).drawn
                        softmax_backward(s_acc, dp_acc, slopes, *at, scales, j, i, drawn)
                    else:
                        softmax_backward(s_acc, dp_acc, slopes, *at, scales)
                    store_ds(dp_acc, smem, ds_smem)
                    lane = mov_tid_x() % 32
                    do_transposed = do_smem + first_of_do(lane) + do_words * stage
                    q_transposed = q_smem + first_of_q(lane) + q_words * stage
                    multiply_p_do(dv_acc, s_acc, smem, do_transposed)
                    multiply_ds_q(dk_acc, dp_acc, smem, q_transposed)
                    # dS of all warps must have arrived.
                    cuda.syncthreads()

                    # dQ += dS K, on top of the sums over this split's earlier keys
                    part = i64((split * shape.batch_size + batch) * shape.num_heads_q + head)
                    # A warp has 16 rows of queries and dq_tiles of the columns of head_dim. dS
                    # lies by rows of keys, as the warps wrote it.
                    thread = mov_tid_x()
                    warp, lane = thread // 32, thread % 32
                    ds_chunk = 2 * (warp % m_warps) + column_operand_chunk(lane)
                    ds_mine = ds_smem + ds_word(column_operand_row(lane), ds_chunk)
                    k_chunk = warp // m_warps * dq_tiles + row_operand_chunk(lane)
                    k_transposed = k_smem + k_word(row_operand_row(lane), k_chunk)
                    dq_mine = (thread // 32 * dq_tiles * 32 + thread % 32) * 4
                    place = (part * num_m_blocks + m_block) * dq_words + dq_mine
                    first_seen = quotient(max(0, m_start + sequence.lo), tile_n)
                    if n_block - num_splits < first_seen:
                        for i in range(n_dq):
                            dq_acc[i] = f32(0)
                    else:
                        for i in range(dq_tiles):
                            ld_global_v4_f32(dq_acc[4 * i : 4 * i + 4], dq_parts, place + 128 * i)
                    multiply_ds_k(dq_acc, smem, ds_mine, k_transposed)
                    for i in range(dq_tiles):
                        st_global_v4_f32(dq_parts, place + 128 * i, dq_acc[4 * i : 4 * i + 4])
                    last_stage = stage
                    stage = i32(stage + 1 if stage + 1 < num_stages else 0)
                    if num_stages > 1:
                        m_block, head = following(m_block, head, m_begin, m_end)

            row = i32(n_start + accumulator_row(MMA_ROWS))
            dk_base = first_of_rows(dk, batch, head_kv, sequence.first_k)
            dv_base = first_of_rows(dv, batch, head_kv, sequence.first_k)
            store_dv(dv_acc, dv, dv_base, row, sequence.seqlen_k, shape.head_dim_v)
            store_dk(dk_acc, dk, dk_base, row, sequence.seqlen_k, shape.head_dim)

    return Kernel(config.family, backward, num_threads, config.smem_bytes(traits))
