"""Backward for Q: dQ = dS K, with P computed again from lse.

A block owns tile_m rows of Q and dO and walks over K and V in tiles of tile_n, exactly as the
forward does; instead of O it accumulates dQ.

Source: FlashAttention, arXiv 2205.14135, Algorithm 4, with the loop order that gives each block
its own rows of dQ.
"""

from numflash.configs import BackwardDqConfig, Traits
from numflash.kernels.arguments import Statistics, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.tiles import addresses, blocks, features, sequences, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.portable import copies, dropout, gradients, lanes, products
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES, first_row_of_thread
from numflash.tiles.portable.scores import make_apply_functions, make_mask_scores
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, tiles_seen, tiles_seen_whole


def make_backward_dq_kernel(config: BackwardDqConfig, traits: Traits) -> Kernel:
    """The dQ kernel for one config; see the module's docstring."""
    element, result = ELEMENTS[traits.dtype], ELEMENTS[traits.out_dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows = lanes.rows_per_thread(tile_m, config.num_warps)
    columns = lanes.columns_per_thread(tile_n)
    groups = lanes.groups_per_thread(traits.head_dim)
    rows_per_warp = ROW_LANES * rows
    n_scores, n_dq = rows * columns, rows * 4 * groups

    layout = config.smem_layout(traits)
    q_smem, do_smem = layout.offsets["q"], layout.offsets["do"]
    k_smem, v_smem, ds_smem = (layout.offsets[name] for name in "kvp")
    k_pitch, v_pitch, ds_pitch = (layout.pitches[name] for name in "kvp")

    place_of_queries = blocks.make_place_of_queries(tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    steps_of, tile_at = steps.make_steps_of(traits, tile_n), steps.make_tile_at(traits, tile_n)
    copy = (num_threads, traits.vectorized)
    load_q = copies.make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_do = copies.make_load_tile(element, tile_m, traits.head_dim_v, v_pitch, *copy)
    load_k = copies.make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = copies.make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    load_query_statistics = gradients.make_load_query_statistics(rows, ROW_LANES)
    multiply_q_k = products.make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_do_v = products.make_product_nt(rows, columns, traits.head_dim_v, v_pitch, v_pitch)
    multiply_ds_k = products.make_product_nn(rows, groups, tile_n, ds_pitch, k_pitch)
    apply_functions = make_apply_functions(rows, columns, traits, True, traits.bends_scores)
    mask_scores = make_mask_scores(rows, columns)
    draw_kept = dropout.make_draw_kept(rows, columns, traits.features, by_row=True)
    softmax_backward = gradients.make_softmax_backward(rows, columns, traits, by_row=True)
    store_scores = gradients.make_store_scores(rows, columns, ds_pitch)
    store_dq = copies.make_store_rows(result, rows, groups, traits.vectorized)
    out_storage = result.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    n_slopes = n_scores if traits.bends_scores else 1
    n_kept = dropout.words_of_bits(n_scores) if traits.drops_weights else 1

    def backward_dq(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dq: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        kept = cuda.local.array(n_kept, u32)
        dq_acc = cuda.local.array(n_dq, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)

        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        place = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, head_kv, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        args = args_of_head(scores, batch, head)

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        q_mine, k_mine = q_smem + row * k_pitch, k_smem + column * k_pitch
        do_mine, v_mine = do_smem + row * v_pitch, v_smem + column * v_pitch
        ds_mine, k_columns = ds_smem + row * ds_pitch, k_smem + 4 * column

        q_base = first_of_rows(q, batch, head, sequence.first_q)
        do_base = first_of_rows(do, batch, head, sequence.first_q)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        end = sequence.seqlen_q
        load_q(smem, q_smem, q, q_base, m_start, end, shape.head_dim)
        load_do(smem, do_smem, do, do_base, m_start, end, shape.head_dim_v)
        load_query_statistics(lses, deltas, statistics, first_query, m_start + row, end)
        for i in range(n_dq):
            dq_acc[i] = f32(0)

        # Tiles of keys that some of these rows see, and those that all of them see.
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(m_start, last_query, tile_n, sequence)
        n_begin, n_end = steps_of(mask, batch, head, m_start, tiles)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        for step in range(n_begin, n_end):
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            # All threads have read the K and V before these, whose place they take.
            cuda.syncthreads()
            load_k(smem, k_smem, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
            load_v(smem, v_smem, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)
            # Q, dO, K and V of all threads must have arrived.
            cuda.syncthreads()

            # S = Q K^T, dP = dO V^T
            multiply_q_k(s_acc, smem, q_mine, k_mine)
            multiply_do_v(dp_acc, smem, do_mine, v_mine)
            i, j = m_start + row, n_start + column
            apply_functions(s_acc, slopes, Corner(i, j, sequence, is_full), scores, args)
            if n_start < whole.first or n_start > whole.last:
                mask_scores(s_acc, i, j, sequence.seqlen_k, sequence)

            # dS = P * (softmax_scale dP - delta), dQ += dS K
            draw_kept(kept, i, j, args.drawn)
            scales = scores.softmax_scale, scores.features.dropout.scale
            softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, kept)
            store_scores(dp_acc, smem, ds_mine + column)
            # dS of all lanes must have arrived: a warp exchanges that of its own rows.
            cuda.syncwarp()
            multiply_ds_k(dq_acc, smem, ds_mine, k_columns)

        dq_base = first_of_rows(dq, batch, head, sequence.first_q)
        store_dq(dq_acc, dq, dq_base, m_start + row, sequence.seqlen_q, shape.head_dim)

    return Kernel(config.family, backward_dq, num_threads, layout.smem_bytes)
