"""Forward: O = softmax(softmax_scale Q K^T) V and lse, without ever holding S.

A block owns tile_m rows of Q. It walks over K and V in tiles of tile_n: a tile of scores S, the
online softmax that turns it into P, and O += P V. A warp owns whole rows, so rows never need
another warp; the block meets only to replace K and V in shared memory.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1.
"""

import math

from numflash.configs import ForwardConfig, Traits
from numflash.kernels.kernel import Kernel
from numflash.ptx import Pointer, cuda, f32, i32, i64
from numflash.tiles.copies import make_load_tile, make_store_rows
from numflash.tiles.elements import ELEMENTS
from numflash.tiles.lanes import (
    COLUMN_LANES,
    ROW_LANES,
    columns_per_thread,
    groups_per_thread,
    rows_per_thread,
)
from numflash.tiles.products import make_product_nn, make_product_nt
from numflash.tiles.scores import (
    NEG_INF,
    band_block_begin,
    band_block_end,
    band_is_partial,
    first_row_of_thread,
    make_mask_scores,
    make_scale_scores,
)
from numflash.tiles.softmax import make_online_softmax, row_sum_of_lanes


def make_forward_kernel(config: ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    element = ELEMENTS[traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows, columns = rows_per_thread(tile_m, config.num_warps), columns_per_thread(tile_n)
    groups = groups_per_thread(traits.head_dim_v)
    rows_per_warp = ROW_LANES * rows
    n_scores, n_out = rows * columns, 4 * groups
    n_o = rows * n_out

    layout = config.smem_layout(traits)
    q_smem, k_smem = layout.offsets["q"], layout.offsets["k"]
    v_smem, p_smem = layout.offsets["v"], layout.offsets["p"]
    k_pitch, v_pitch, p_pitch = (layout.pitches[name] for name in "kvp")

    copy = (num_threads, traits.vectorized)
    load_q = make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_k = make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    multiply_q_k = make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_p_v = make_product_nn(rows, groups, tile_n, p_pitch, v_pitch)
    scale_scores = make_scale_scores(rows, columns, traits.softcap, traits.alibi)
    mask_scores = make_mask_scores(rows, columns)
    online_softmax = make_online_softmax(rows, columns, n_out, p_pitch)
    store_o = make_store_rows(element, rows, groups, traits.vectorized)
    storage, alibi = element.storage, traits.alibi
    n_cap_slopes = n_scores if traits.softcap else 1

    def forward(
        q: Pointer(storage),
        k: Pointer(storage),
        v: Pointer(storage),
        out: Pointer(storage),
        lse: Pointer(f32),
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
        out_batch: i64,
        out_row: i64,
        out_head: i64,
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
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        cap_slopes = cuda.local.array(n_cap_slopes, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)

        # The last rows of a causal problem see the most keys: they start first.
        num_m_blocks = (seqlen_q + tile_m - 1) // tile_m
        m_start = (num_m_blocks - 1 - cuda.blockIdx.x % num_m_blocks) * tile_m
        head_of_batch = cuda.blockIdx.x // num_m_blocks
        head = head_of_batch % num_heads_q
        batch = head_of_batch // num_heads_q
        head_kv = head // group_size
        q_base = batch * q_batch + head * q_head
        k_base = batch * k_batch + head_kv * k_head
        v_base = batch * v_batch + head_kv * v_head
        out_base = batch * out_batch + head * out_head
        alibi_slope = f32(0)
        if alibi:
            alibi_slope = alibi_slopes[batch * slopes_batch + head * slopes_head]

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        q_mine, k_mine = q_smem + row * k_pitch, k_smem + column * k_pitch
        p_mine, v_mine = p_smem + row * p_pitch, v_smem + 4 * column

        load_q(smem, q_smem, q, q_base, q_row, m_start, seqlen_q, head_dim)
        for i in range(n_o):
            o_acc[i] = f32(0)
        for r in range(rows):
            row_max[r] = NEG_INF
            row_sum[r] = f32(0)

        last_row = min(m_start + tile_m, seqlen_q) - 1
        n_begin = band_block_begin(m_start, band_lo, tile_n)
        n_end = band_block_end(last_row, band_hi, seqlen_k, tile_n)
        for n_block in range(n_begin, n_end):
            n_start = n_block * tile_n
            cuda.syncthreads()  # the previous K and V have been read by all
            load_k(smem, k_smem, k, k_base, k_row, n_start, seqlen_k, head_dim)
            load_v(smem, v_smem, v, v_base, v_row, n_start, seqlen_k, head_dim_v)
            cuda.syncthreads()  # Q, K and V have arrived

            # S = softmax_scale Q K^T, masked where the block crosses an edge of the band
            multiply_q_k(s_acc, smem, q_mine, k_mine)
            i, j = m_start + row, n_start + column
            scale_scores(s_acc, cap_slopes, i, j, bias_shift, score_scale, softcap, alibi_slope)
            if band_is_partial(m_start, tile_m, n_start, tile_n, seqlen_k, band_lo, band_hi):
                mask_scores(s_acc, i, j, seqlen_k, band_lo, band_hi)

            # P = exp(S - row_max), O += P V
            online_softmax(s_acc, row_max, row_sum, o_acc, smem, p_mine + column)
            cuda.syncwarp()  # P is exchanged within the warp that owns its rows
            multiply_p_v(o_acc, smem, p_mine, v_mine)

        for r in range(rows):
            total = row_sum_of_lanes(row_sum[r])
            # A row that sees no key has output 0 and lse -inf.
            reciprocal = f32(1) / total if total != f32(0) else f32(0)
            for j in range(n_out):
                o_acc[n_out * r + j] *= reciprocal
            i = m_start + row + ROW_LANES * r
            if column == 0 and i < seqlen_q:
                row_lse = NEG_INF
                if total != f32(0):
                    row_lse = row_max[r] + f32(math.log(total))
                lse[i64(head_of_batch) * seqlen_q + i] = row_lse
        store_o(o_acc, out, out_base, out_row, m_start + row, seqlen_q, head_dim_v)

    return Kernel(config.family, forward, num_threads, layout.smem_bytes)
