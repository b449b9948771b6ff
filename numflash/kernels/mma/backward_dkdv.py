"""Backward for K and V on the tensor cores: dV = P^T dO and dK = dS^T Q.

A block owns tile_n rows of K and V and walks over Q and dO in tiles of tile_m, for every query
head of the group that shares the key-value head. It works on transposed tiles, S^T = K Q^T, whose
rows are its own: P^T and dS^T go from accumulator to operand in registers, and a mask is the same
band seen from the other side. Q and dO serve twice, by rows for S^T and dP^T and transposed for dK
and dV.

Where the accumulators of both do not fit the registers, dK and dV are `apart`: one half of the
blocks computes dV, the other dK. That is five products instead of four.

The main loop in machine code, a warp and a tile (bfloat16, head_dim 128, tile 64 x 64, sm_90a):

    256 HMMA             S^T, dP^T, dV and dK
    144 LDSM             operands: 8 of K, 8 of V, 32 each of Q and dO, by rows and transposed
     32 MUFU, FFMA       P from S and lse; 16 LDS for lse and delta
     32 FFMA, FMUL       dS from P, dP and delta; 32 F2FP for P and dS to bfloat16
     18 LDGSTS           Q, dO, lse and delta, with addresses and bounds; 1 BAR
     96 ISETP, FSEL      the mask, only on tiles that an edge crosses

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2.
"""

from numflash.configs import MmaBackwardDkDvConfig, Traits
from numflash.kernels.arguments import Statistics, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.queries import Walk, make_fetch_queries, make_steps_of_heads
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, mov_tid_x, u32
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.tiles import addresses, blocks, features, sequences
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import quotient
from numflash.tiles.mma import copies, elements, fragments, products, softmax
from numflash.tiles.mma.fragments import accumulator_column, accumulator_row, first_row_of_warp
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, seen_from_keys, tiles_seen, tiles_seen_whole
from numflash.tiles.steps import make_tile_at


def make_backward_dkdv_kernel(config: MmaBackwardDkDvConfig, traits: Traits) -> Kernel:
    """The dK and dV kernel for one config; see the module's docstring."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages = config.num_stages
    m_tiles, n_tiles = config.m_tiles, tile_m // 8
    dk_tiles, dv_tiles = traits.head_dim // 8, traits.head_dim_v // 8
    rows_per_warp = fragments.MMA_ROWS * m_tiles
    n_scores = 4 * m_tiles * n_tiles
    n_dk, n_dv, apart = 4 * m_tiles * dk_tiles, 4 * m_tiles * dv_tiles, config.apart
    if apart:
        n_dk = n_dv = max(n_dk, n_dv)

    offsets = config.smem_offsets(traits)
    k_smem, v_smem, q_smem, do_smem = (offsets[name] for name in ("k", "v", "q", "do"))
    lse_smem, delta_smem = offsets["lse"], offsets["delta"]
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    q_words, do_words = tile_m * k_layout.pitch, tile_m * v_layout.pitch

    place_of_keys = blocks.make_place_of_keys(tile_n, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_k = copies.make_copy_tile(element, k_layout, tile_n, *copy)
    copy_v = copies.make_copy_tile(element, v_layout, tile_n, *copy)
    fetch_queries = make_fetch_queries(config, traits)
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)
    tile_at, listed = make_tile_at(traits, tile_m, by_keys=True), bool(traits.blocks)
    k_row_operand, k_column_operand = fragments.make_operands(k_layout)
    v_row_operand, v_column_operand = fragments.make_operands(v_layout)
    first_of_q, _ = elements.make_transposed_operand(element, k_layout)
    first_of_do, _ = elements.make_transposed_operand(element, v_layout)
    multiply_k_q = products.make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    multiply_v_do = products.make_product_nt(element, m_tiles, n_tiles, v_layout, v_layout)
    multiply_p_do = products.make_product_pn(element, m_tiles, n_tiles, dv_tiles, v_layout)
    multiply_ds_q = products.make_product_pn(element, m_tiles, n_tiles, dk_tiles, k_layout)
    apply_functions = make_apply_functions(m_tiles, n_tiles, traits, False, traits.bends_scores)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    softmax_backward = softmax.make_softmax_backward_by_column(m_tiles, n_tiles, traits)
    store_as = traits.vectorized, traits.float32_out, addresses.row_of_head, traits.float32_out
    store_dk = copies.make_store_rows(element, m_tiles, dk_tiles, *store_as)
    store_dv = copies.make_store_rows(element, m_tiles, dv_tiles, *store_as)
    out_storage = f32 if traits.float32_out else element.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    bends, has_functions = traits.shapes_scores, traits.has_functions
    drops = traits.drops_weights
    n_slopes = n_scores if traits.bends_scores else 1
    # Tiles that may be on their way while one is used.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[max(0, num_stages - 2)]

    def backward_dkdv(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dk: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        dv: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = dk_acc
        if not apart:
            dv_acc = cuda.local.array(n_dv, f32)

        block = mov_ctaid_x()
        with_dk = with_dv = True
        if apart:
            with_dv = block % 2 == 0
            with_dk = not with_dv
            block = u32(block // u32(2))
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(block, quotient(shape.num_heads_q, shape.group_size), shape):
            return
        place = place_of_keys(block, shape, mask)
        n_start, first_head, head_kv, batch, _ = place[:5]
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        sequence = sequence_of(place, shape, mask)
        # Tiles of queries that see some of these keys, and those that see all of them.
        from_keys = seen_from_keys(sequence)
        last_key = last_of(n_start, tile_n, sequence.seqlen_k)
        tiles = tiles_seen(n_start, last_key, tile_m, from_keys)
        walk = Walk(mask, batch, n_start, first_head, shape.group_size, tiles)
        whole = tiles_seen_whole(n_start, last_key, tile_m, from_keys)

        # This lane's position in the operands, and of its scores in the tile.
        lane = mov_tid_x() % 32
        warp_row = first_row_of_warp(rows_per_warp)
        k_mine = k_smem + k_row_operand(warp_row, 0, lane)
        v_mine = v_smem + v_row_operand(warp_row, 0, lane)
        q_mine = q_smem + k_column_operand(0, 0, lane)
        do_mine = do_smem + v_column_operand(0, 0, lane)
        q_transposed, do_transposed = q_smem + first_of_q(lane), do_smem + first_of_do(lane)
        lse_mine = lse_smem + accumulator_column()
        delta_mine = delta_smem + accumulator_column()

        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        # Without queries nothing would wait for K and V.
        next_m, next_head, next_end = first_step(walk)
        if listed:
            steps, heads = cuda.local.array(num_stages, i32), cuda.local.array(num_stages, i32)
        if not asynchronous or next_m < next_end:
            copy_k(smem, k_smem, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
            copy_v(smem, v_smem, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)

        # One walk over the tiles of all heads of the group; copies run num_stages - 1 ahead.
        num_tiles = count_steps(walk)
        m_step, head, m_end = next_m, next_head, next_end
        stage = i32(0)
        last_stage = i32(num_stages - 1)
        for tile in range(i32(1 - num_stages), num_tiles):
            if tile >= 0:
                # The tile must have arrived, unless there is only one stage. The barrier shows it
                # to all threads, and all have read the tile before it, whose buffer is written
                # again.
                if asynchronous and num_stages > 1:
                    wait_for_tile()
                cuda.syncthreads()
            if listed:
                # Of the tiles under way, which is less to keep than two places in lists.
                for i in range(num_stages - 1):
                    steps[i], heads[i] = steps[i + 1], heads[i + 1]
                steps[num_stages - 1], heads[num_stages - 1] = next_m, next_head
            if i32(tile + num_stages - 1) < num_tiles:
                into = i32(last_stage if tile >= 0 else tile + num_stages - 1)
                m_block, _ = tile_at(mask, next_m)
                ahead = m_block, next_head
                fetch_queries(smem, into, ahead, q, do, statistics_log2, batch, sequence, shape)
                if num_stages == 1:
                    m_step, head, m_end = next_m, next_head, next_end
                next_m, next_head, next_end = next_step(walk, next_m, next_head, next_end)
            if asynchronous:
                cp_async_commit_group()
            if tile >= 0:
                if num_stages == 1:
                    # The only buffer must have been filled, for all threads.
                    if asynchronous:
                        wait_for_tile()
                    cuda.syncthreads()

                # S^T = K Q^T, dP^T = V dO^T
                multiply_k_q(s_acc, smem, k_mine, q_mine + q_words * stage)
                if with_dk:
                    multiply_v_do(dp_acc, smem, v_mine, do_mine + do_words * stage)
                if listed:
                    m_step, head = steps[0], heads[0]
                m_block, is_full = tile_at(mask, m_step)
                m_start = i32(m_block * tile_m)
                if has_functions:
                    j = i32(n_start + accumulator_row(rows_per_warp))
                    i = i32(m_start + accumulator_column())
                    args = args_of_head(scores, batch, head)
                    corner = Corner(j, i, sequence, is_full)
                    apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
                if m_start < whole.first or m_start > whole.last:
                    j = i32(n_start + accumulator_row(rows_per_warp))
                    i = i32(m_start + accumulator_column())
                    mask_scores(s_acc, j, i, sequence.seqlen_q, from_keys, 1)

                # dS = P * (softmax_scale dP - delta); dV += P^T dO, dK += dS^T Q
                lse_of_stage = lse_mine + tile_m * stage
                delta_of_stage = delta_mine + tile_m * stage
                at = smem, lse_of_stage, delta_of_stage
                scales = scale_log2, scores.softmax_scale
                if drops:
                    j = i32(n_start + accumulator_row(rows_per_warp))
                    i = i32(m_start + accumulator_column())
                    drawn = args_of_head(scores, batch, head).drawn
                    softmax_backward(s_acc, dp_acc, slopes, *at, scales, j, i, drawn)
                else:
                    softmax_backward(s_acc, dp_acc, slopes, *at, scales)
                if apart and not asynchronous:
                    # Long rows and their copies leave no registers to keep this in: it is
                    # computed again.
                    lane = mov_tid_x() % 32
                    q_transposed = q_smem + first_of_q(lane)
                    do_transposed = do_smem + first_of_do(lane)
                if with_dv:
                    multiply_p_do(dv_acc, s_acc, smem, do_transposed + do_words * stage)
                if with_dk:
                    multiply_ds_q(dk_acc, dp_acc, smem, q_transposed + q_words * stage)
                last_stage = stage
                stage = i32(stage + 1 if stage + 1 < num_stages else 0)
                if num_stages > 1 and not listed:
                    m_step, head, m_end = next_step(walk, m_step, head, m_end)

        # The place is computed again, so that no register keeps it through the walk.
        block = mov_ctaid_x()
        if apart:
            block = u32(block // u32(2))
        place = place_of_keys(block, shape, mask)
        n_start, _, head_kv, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        row = i32(n_start + accumulator_row(rows_per_warp))
        dk_base = first_of_rows(dk, batch, head_kv, sequence.first_k)
        dv_base = first_of_rows(dv, batch, head_kv, sequence.first_k)
        if with_dv:
            store_dv(dv_acc, dv, dv_base, row, sequence.seqlen_k, shape.head_dim_v)
        if with_dk:
            store_dk(dk_acc, dk, dk_base, row, sequence.seqlen_k, shape.head_dim)

    return Kernel(config.family, backward_dkdv, num_threads, config.smem_bytes(traits))
