"""Backward for K and V: dV = P^T dO and dK = dS^T Q, with P computed again from lse.

A block owns tile_n rows of K and V and walks over Q and dO in tiles of tile_m, for every query
head of the group that shares the key-value head. It works on transposed tiles, S^T = K Q^T, so
that its own rows are rows here too; a mask then is the same band seen from the other side.

Source: FlashAttention, arXiv 2205.14135, Algorithm 4.
"""

from numflash.configs import BackwardDkDvConfig, Traits
from numflash.kernels.arguments import Statistics, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.tiles import addresses, blocks, features, sequences, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import quotient
from numflash.tiles.portable import copies, dropout, gradients, lanes, products
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES, first_row_of_thread
from numflash.tiles.portable.scores import make_apply_functions, make_mask_scores
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, seen_from_keys, tiles_seen, tiles_seen_whole


def make_backward_dkdv_kernel(config: BackwardDkDvConfig, traits: Traits) -> Kernel:
    """The dK and dV kernel for one config; see the module's docstring."""
    element, result = ELEMENTS[traits.dtype], ELEMENTS[traits.out_dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows = lanes.rows_per_thread(tile_n, config.num_warps)
    columns = lanes.columns_per_thread(tile_m)
    groups = lanes.groups_per_thread(traits.head_dim)
    groups_v = lanes.groups_per_thread(traits.head_dim_v)
    rows_per_warp = ROW_LANES * rows
    n_scores, n_dk, n_dv = rows * columns, rows * 4 * groups, rows * 4 * groups_v

    layout = config.smem_layout(traits)
    q_smem, do_smem = layout.offsets["q"], layout.offsets["do"]
    k_smem, v_smem, p_smem = (layout.offsets[name] for name in "kvp")
    k_pitch, v_pitch, p_pitch = (layout.pitches[name] for name in "kvp")

    place_of_keys = blocks.make_place_of_keys(tile_n, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    steps_of = steps.make_steps_of(traits, tile_m, by_keys=True)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    copy = (num_threads, traits.vectorized)
    load_k = copies.make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = copies.make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    load_q = copies.make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_do = copies.make_load_tile(element, tile_m, traits.head_dim_v, v_pitch, *copy)
    load_query_statistics = gradients.make_load_query_statistics(columns, COLUMN_LANES)
    multiply_k_q = products.make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_v_do = products.make_product_nt(rows, columns, traits.head_dim_v, v_pitch, v_pitch)
    multiply_p_do = products.make_product_nn(rows, groups_v, tile_m, p_pitch, v_pitch)
    multiply_ds_q = products.make_product_nn(rows, groups, tile_m, p_pitch, k_pitch)
    apply_functions = make_apply_functions(rows, columns, traits, False, traits.bends_scores)
    mask_scores = make_mask_scores(rows, columns)
    draw_kept = dropout.make_draw_kept(rows, columns, traits.features, by_row=False)
    softmax_backward = gradients.make_softmax_backward(rows, columns, traits, by_row=False)
    store_scores = gradients.make_store_scores(rows, columns, p_pitch)
    store_dk = copies.make_store_rows(result, rows, groups, traits.vectorized)
    store_dv = copies.make_store_rows(result, rows, groups_v, traits.vectorized)
    out_storage = result.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    n_slopes = n_scores if traits.bends_scores else 1
    n_kept = dropout.words_of_bits(n_scores) if traits.drops_weights else 1

    def backward_dkdv(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dk: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        dv: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        kept = cuda.local.array(n_kept, u32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        lses = cuda.local.array(columns, f32)
        deltas = cuda.local.array(columns, f32)

        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), quotient(shape.num_heads_q, shape.group_size), shape):
            return
        place = place_of_keys(mov_ctaid_x(), shape, mask)
        n_start, first_head, head_kv, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        k_mine, q_mine = k_smem + row * k_pitch, q_smem + column * k_pitch
        v_mine, do_mine = v_smem + row * v_pitch, do_smem + column * v_pitch
        p_mine = p_smem + row * p_pitch
        q_columns, do_columns = q_smem + 4 * column, do_smem + 4 * column

        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        load_k(smem, k_smem, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
        load_v(smem, v_smem, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)

        # Tiles of queries that see some of these keys, and those that see all of them.
        from_keys, end = seen_from_keys(sequence), sequence.seqlen_q
        last_key = last_of(n_start, tile_n, sequence.seqlen_k)
        tiles = tiles_seen(n_start, last_key, tile_m, from_keys)
        whole = tiles_seen_whole(n_start, last_key, tile_m, from_keys)
        for head in range(first_head, first_head + shape.group_size):
            q_base = first_of_rows(q, batch, head, sequence.first_q)
            do_base = first_of_rows(do, batch, head, sequence.first_q)
            first_query = first_of_statistics(batch, head, shape) + sequence.first_q
            args = args_of_head(scores, batch, head)
            m_begin, m_end = steps_of(mask, batch, head, n_start, tiles)
            for step in range(m_begin, m_end):
                m_block, is_full = tile_at(mask, step)
                m_start = i32(m_block * tile_m)
                i, j = m_start + column, n_start + row
                # All threads have read the Q and dO before these, whose place they take.
                cuda.syncthreads()
                load_q(smem, q_smem, q, q_base, m_start, end, shape.head_dim)
                load_do(smem, do_smem, do, do_base, m_start, end, shape.head_dim_v)
                load_query_statistics(lses, deltas, statistics, first_query, i, end)
                # K, V, Q and dO of all threads must have arrived.
                cuda.syncthreads()

                # S^T = K Q^T, dP^T = V dO^T
                multiply_k_q(s_acc, smem, k_mine, q_mine)
                multiply_v_do(dp_acc, smem, v_mine, do_mine)
                apply_functions(s_acc, slopes, Corner(j, i, sequence, is_full), scores, args)
                if m_start < whole.first or m_start > whole.last:
                    mask_scores(s_acc, j, i, end, from_keys)

                # dV += P^T dO, dK += dS^T Q; P and dS take turns in one tile
                draw_kept(kept, j, i, args.drawn)
                scales = scores.softmax_scale, scores.features.dropout.scale
                softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, kept)
                store_scores(s_acc, smem, p_mine + column)
                # P of all lanes must have arrived: a warp exchanges that of its own rows.
                cuda.syncwarp()
                multiply_p_do(dv_acc, smem, p_mine, do_columns)
                # All lanes have read P, whose place dS takes.
                cuda.syncwarp()
                store_scores(dp_acc, smem, p_mine + column)
                # dS of all lanes must have arrived.
                cuda.syncwarp()
                multiply_ds_q(dk_acc, smem, p_mine, q_columns)

        dk_base = first_of_rows(dk, batch, head_kv, sequence.first_k)
        dv_base = first_of_rows(dv, batch, head_kv, sequence.first_k)
        store_dk(dk_acc, dk, dk_base, n_start + row, sequence.seqlen_k, shape.head_dim)
        store_dv(dv_acc, dv, dv_base, n_start + row, sequence.seqlen_k, shape.head_dim_v)

    return Kernel(config.family, backward_dkdv, num_threads, layout.smem_bytes)
