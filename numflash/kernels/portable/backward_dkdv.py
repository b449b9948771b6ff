"""Backward for K and V: dV = P^T dO and dK = dS^T Q, with P computed again from lse.

A block owns tile_n rows of K and V and walks over Q and dO in tiles of tile_m, for every query
head of the group that shares the key-value head. It works on transposed tiles, S^T = K Q^T, so
that its own rows are rows here too; a mask then is the same band seen from the other side.

Source: FlashAttention, arXiv 2205.14135, Algorithm 4.
"""

from numflash.configs import BackwardDkDvConfig, Traits
from numflash.kernels.arguments import Mask, Scores, Shape, Statistics, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i64
from numflash.tiles.blocks import first_of_head
from numflash.tiles.features import make_args_of_head
from numflash.tiles.portable.copies import make_load_tile, make_store_rows
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.gradients import (
    make_load_query_statistics,
    make_softmax_backward,
    make_store_scores,
)
from numflash.tiles.portable.lanes import (
    COLUMN_LANES,
    ROW_LANES,
    columns_per_thread,
    groups_per_thread,
    rows_per_thread,
)
from numflash.tiles.portable.products import make_product_nn, make_product_nt
from numflash.tiles.scores import (
    band_block_begin,
    band_block_end,
    band_is_partial,
    first_row_of_thread,
    make_mask_scores,
    make_scale_scores_backward,
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
    scale_scores = make_scale_scores_backward(
        rows, columns, traits.features, False, traits.bends_scores
    )
    mask_scores = make_mask_scores(rows, columns)
    softmax_backward = make_softmax_backward(rows, columns, traits.bends_scores, by_row=False)
    store_scores = make_store_scores(rows, columns, p_pitch)
    store_dk = make_store_rows(element, rows, groups, traits.vectorized)
    store_dv = make_store_rows(element, rows, groups_v, traits.vectorized)
    storage, args_of_head = element.storage, make_args_of_head(traits.features)
    n_slopes = n_scores if traits.bends_scores else 1

    def backward_dkdv(
        q: Tensor[storage],
        k: Tensor[storage],
        v: Tensor[storage],
        do: Tensor[storage],
        statistics: Statistics,
        dk: Tensor[storage],
        dv: Tensor[storage],
        mask: Mask,
        shape: Shape,
        scores: Scores,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        lses = cuda.local.array(columns, f32)
        deltas = cuda.local.array(columns, f32)

        # The first keys of a causal problem are seen by the most queries: they start first.
        num_n_blocks = (shape.seqlen_k + tile_n - 1) // tile_n
        n_start = cuda.blockIdx.x % num_n_blocks * tile_n
        num_heads_kv = shape.num_heads_q // shape.group_size
        head_kv = cuda.blockIdx.x // num_n_blocks % num_heads_kv
        batch = cuda.blockIdx.x // num_n_blocks // num_heads_kv

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        k_mine, q_mine = k_smem + row * k_pitch, q_smem + column * k_pitch
        v_mine, do_mine = v_smem + row * v_pitch, do_smem + column * v_pitch
        p_mine = p_smem + row * p_pitch
        q_columns, do_columns = q_smem + 4 * column, do_smem + 4 * column

        k_base = first_of_head(k, batch, head_kv)
        v_base = first_of_head(v, batch, head_kv)
        load_k(smem, k_smem, k, k_base, n_start, shape.seqlen_k, shape.head_dim)
        load_v(smem, v_smem, v, v_base, n_start, shape.seqlen_k, shape.head_dim_v)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)

        # The mask from the side of the keys.
        queries_mask = Mask(-mask.hi, -mask.lo)
        last_row = min(n_start + tile_n, shape.seqlen_k) - 1
        m_begin = band_block_begin(n_start, -mask.hi, tile_m)
        m_end = band_block_end(last_row, -mask.lo, shape.seqlen_q, tile_m)
        for head in range(head_kv * shape.group_size, (head_kv + 1) * shape.group_size):
            q_base = first_of_head(q, batch, head)
            do_base = first_of_head(do, batch, head)
            first_query = i64(batch * shape.num_heads_q + head) * shape.seqlen_q
            args = args_of_head(scores.features, batch, head)
            for m_block in range(m_begin, m_end):
                m_start = m_block * tile_m
                i, j = m_start + column, n_start + row
                cuda.syncthreads()  # the previous Q and dO have been read by all
                load_q(smem, q_smem, q, q_base, m_start, shape.seqlen_q, shape.head_dim)
                load_do(smem, do_smem, do, do_base, m_start, shape.seqlen_q, shape.head_dim_v)
                load_query_statistics(lses, deltas, statistics, first_query, i, shape.seqlen_q)
                cuda.syncthreads()  # K, V, Q and dO have arrived

                # S^T = K Q^T, dP^T = V dO^T
                multiply_k_q(s_acc, smem, k_mine, q_mine)
                multiply_v_do(dp_acc, smem, v_mine, do_mine)
                scale_scores(s_acc, slopes, j, i, scores, args)
                if band_is_partial(n_start, tile_n, m_start, tile_m, shape.seqlen_q, queries_mask):
                    mask_scores(s_acc, j, i, shape.seqlen_q, queries_mask)

                # dV += P^T dO, dK += dS^T Q; P and dS take turns in one tile
                softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scores.softmax_scale)
                store_scores(s_acc, smem, p_mine + column)
                cuda.syncwarp()  # P is exchanged within the warp that owns its rows
                multiply_p_do(dv_acc, smem, p_mine, do_columns)
                cuda.syncwarp()  # P has been read
                store_scores(dp_acc, smem, p_mine + column)
                cuda.syncwarp()  # dS likewise
                multiply_ds_q(dk_acc, smem, p_mine, q_columns)

        dk_base = first_of_head(dk, batch, head_kv)
        dv_base = first_of_head(dv, batch, head_kv)
        store_dk(dk_acc, dk, dk_base, n_start + row, shape.seqlen_k, shape.head_dim)
        store_dv(dv_acc, dv, dv_base, n_start + row, shape.seqlen_k, shape.head_dim_v)

    return Kernel(config.family, backward_dkdv, num_threads, layout.smem_bytes)
