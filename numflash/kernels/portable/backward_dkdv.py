"""Backward for K and V: dV = P^T dO and dK = dS^T Q, with P computed again from lse.

A block owns tile_n rows of K and V and walks over Q and dO in tiles of tile_m, for every query
head of the group that shares the key-value head. It works on transposed tiles, S^T = K Q^T, so
that its own rows are rows here too; a mask then is the same band seen from the other side.

Source: FlashAttention, arXiv 2205.14135, Algorithm 4.
"""

from numflash.configs import BackwardDkDvConfig, Traits
from numflash.kernels.kernel import Kernel
from numflash.ptx import Pointer, cuda, f32, i32, i64
from numflash.tiles.copies import make_load_tile, make_store_rows
from numflash.tiles.elements import ELEMENTS
from numflash.tiles.gradients import (
    make_load_query_statistics,
    make_softmax_backward,
    make_store_scores,
)
from numflash.tiles.lanes import (
    COLUMN_LANES,
    ROW_LANES,
    columns_per_thread,
    groups_per_thread,
    rows_per_thread,
)
from numflash.tiles.products import make_product_nn, make_product_nt
from numflash.tiles.scores import (
    band_block_begin,
    band_block_end,
    band_is_partial,
    first_row_of_thread,
    make_mask_scores,
    make_scale_scores,
)


def make_backward_dkdv_kernel(config: BackwardDkDvConfig, traits: Traits) -> Kernel:
    """The dK and dV kernel for one config; see the module's docstring."""
    element = ELEMENTS[traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows, columns = rows_per_thread(tile_n, config.num_warps), columns_per_thread(tile_m)
    groups, groups_v = groups_per_thread(traits.head_dim), groups_per_thread(traits.head_dim_v)
    rows_per_warp = ROW_LANES * rows
    n_scores, n_dk, n_dv = rows * columns, rows * 4 * groups, rows * 4 * groups_v

    layout = config.smem_layout(traits)
    q_smem, do_smem = layout.offsets["q"], layout.offsets["do"]
    k_smem, v_smem, p_smem = (layout.offsets[name] for name in "kvp")
    k_pitch, v_pitch, p_pitch = (layout.pitches[name] for name in "kvp")

    copy = (num_threads, traits.vectorized)
    load_k = make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    load_q = make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_do = make_load_tile(element, tile_m, traits.head_dim_v, v_pitch, *copy)
    load_query_statistics = make_load_query_statistics(columns, COLUMN_LANES)
    multiply_k_q = make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_v_do = make_product_nt(rows, columns, traits.head_dim_v, v_pitch, v_pitch)
    multiply_p_do = make_product_nn(rows, groups_v, tile_m, p_pitch, v_pitch)
    multiply_ds_q = make_product_nn(rows, groups, tile_m, p_pitch, k_pitch)
    scale_scores = make_scale_scores(rows, columns, traits.softcap, traits.alibi)
    mask_scores = make_mask_scores(rows, columns)
    softmax_backward = make_softmax_backward(rows, columns, traits.softcap, by_row=False)
    store_scores = make_store_scores(rows, columns, p_pitch)
    store_dk = make_store_rows(element, rows, groups, traits.vectorized)
    store_dv = make_store_rows(element, rows, groups_v, traits.vectorized)
    storage, alibi = element.storage, traits.alibi
    n_cap_slopes = n_scores if traits.softcap else 1

    def backward_dkdv(
        q: Pointer(storage),
        k: Pointer(storage),
        v: Pointer(storage),
        do: Pointer(storage),
        lse: Pointer(f32),
        delta: Pointer(f32),
        dk: Pointer(storage),
        dv: Pointer(storage),
        alibi_slopes: Pointer(f32),
        q_batch: i64,
        q_row: i64,
        q_head: i64,
        k_batch: i64,
        k_row: i64,
        k_head: i64,
        v_batch: i64,
        v_row: i64,
        v_head: i64,
        do_batch: i64,
        do_row: i64,
        do_head: i64,
        dk_batch: i64,
        dk_row: i64,
        dk_head: i64,
        dv_batch: i64,
        dv_row: i64,
        dv_head: i64,
        slopes_batch: i64,
        slopes_head: i64,
        seqlen_q: i32,
        seqlen_k: i32,
        num_heads_q: i32,
        group_size: i32,
        head_dim: i32,
        head_dim_v: i32,
        band_lo: i32,
        band_hi: i32,
        bias_shift: i32,
        score_scale: f32,
        softcap: f32,
        softmax_scale: f32,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        cap_slopes = cuda.local.array(n_cap_slopes, f32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        lses = cuda.local.array(columns, f32)
        deltas = cuda.local.array(columns, f32)

        # The first keys of a causal problem are seen by the most queries: they start first.
        num_n_blocks = (seqlen_k + tile_n - 1) // tile_n
        n_start = cuda.blockIdx.x % num_n_blocks * tile_n
        num_heads_kv = num_heads_q // group_size
        head_kv = cuda.blockIdx.x // num_n_blocks % num_heads_kv
        batch = cuda.blockIdx.x // num_n_blocks // num_heads_kv

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        k_mine, q_mine = k_smem + row * k_pitch, q_smem + column * k_pitch
        v_mine, do_mine = v_smem + row * v_pitch, do_smem + column * v_pitch
        p_mine = p_smem + row * p_pitch
        q_columns, do_columns = q_smem + 4 * column, do_smem + 4 * column

        k_base = batch * k_batch + head_kv * k_head
        v_base = batch * v_batch + head_kv * v_head
        load_k(smem, k_smem, k, k_base, k_row, n_start, seqlen_k, head_dim)
        load_v(smem, v_smem, v, v_base, v_row, n_start, seqlen_k, head_dim_v)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)

        last_row = min(n_start + tile_n, seqlen_k) - 1
        m_begin = band_block_begin(n_start, -band_hi, tile_m)
        m_end = band_block_end(last_row, -band_lo, seqlen_q, tile_m)
        for head in range(head_kv * group_size, (head_kv + 1) * group_size):
            q_base = batch * q_batch + head * q_head
            do_base = batch * do_batch + head * do_head
            statistics = i64(batch * num_heads_q + head) * seqlen_q
            alibi_slope = f32(0)
            if alibi:
                alibi_slope = alibi_slopes[batch * slopes_batch + head * slopes_head]
            for m_block in range(m_begin, m_end):
                m_start = m_block * tile_m
                i, j = m_start + column, n_start + row
                cuda.syncthreads()  # the previous Q and dO have been read by all
                load_q(smem, q_smem, q, q_base, q_row, m_start, seqlen_q, head_dim)
                load_do(smem, do_smem, do, do_base, do_row, m_start, seqlen_q, head_dim_v)
                load_query_statistics(lses, deltas, lse, delta, statistics, i, seqlen_q)
                cuda.syncthreads()  # K, V, Q and dO have arrived

                # S^T = K Q^T, dP^T = V dO^T
                multiply_k_q(s_acc, smem, k_mine, q_mine)
                multiply_v_do(dp_acc, smem, v_mine, do_mine)
                scale_scores(
                    s_acc, cap_slopes, j, i, -bias_shift, score_scale, softcap, alibi_slope
                )
                if band_is_partial(n_start, tile_n, m_start, tile_m, seqlen_q, -band_hi, -band_lo):
                    mask_scores(s_acc, j, i, seqlen_q, -band_hi, -band_lo)

                # dV += P^T dO, dK += dS^T Q; P and dS take turns in one tile
                softmax_backward(s_acc, dp_acc, cap_slopes, lses, deltas, softmax_scale)
                store_scores(s_acc, smem, p_mine + column)
                cuda.syncwarp()  # P is exchanged within the warp that owns its rows
                multiply_p_do(dv_acc, smem, p_mine, do_columns)
                cuda.syncwarp()  # P has been read
                store_scores(dp_acc, smem, p_mine + column)
                cuda.syncwarp()  # dS likewise
                multiply_ds_q(dk_acc, smem, p_mine, q_columns)

        dk_base = batch * dk_batch + head_kv * dk_head
        dv_base = batch * dv_batch + head_kv * dv_head
        store_dk(dk_acc, dk, dk_base, dk_row, n_start + row, seqlen_k, head_dim)
        store_dv(dv_acc, dv, dv_base, dv_row, n_start + row, seqlen_k, head_dim_v)

    return Kernel(config.family, backward_dkdv, num_threads, layout.smem_bytes)
