"""Forward: O = softmax(softmax_scale Q K^T) V and lse, without ever holding S.

A block owns tile_m rows of Q. It walks over K and V in tiles of tile_n: a tile of scores S, the
online softmax that turns it into P, and O += P V. A warp owns whole rows, so rows never need
another warp; the block meets only to replace K and V in shared memory.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1.
"""

from numflash.configs import ForwardConfig, Traits
from numflash.kernels.arguments import Pointer, Shape, Tensor, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.tiles.blocks import (
    first_of_rows,
    first_of_statistics,
    last_of,
    make_place_of_queries,
    sequence_of,
    tiles_seen,
    tiles_seen_whole,
)
from numflash.tiles.features import make_args_of_head
from numflash.tiles.portable.copies import make_load_tile, make_store_rows
from numflash.tiles.portable.dropout import make_draw_kept, words_of_bits
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import (
    COLUMN_LANES,
    ROW_LANES,
    columns_per_thread,
    groups_per_thread,
    rows_per_thread,
)
from numflash.tiles.portable.products import make_product_nn, make_product_nt
from numflash.tiles.portable.softmax import make_online_softmax, row_sum_of_lanes
from numflash.tiles.rows import NATURAL, make_end_of_row
from numflash.tiles.scores import (
    NEG_INF,
    Corner,
    first_row_of_thread,
    make_apply_functions,
    make_mask_scores,
)
from numflash.tiles.steps import make_steps_of, make_tile_at


def make_forward_kernel(config: ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    element, result = ELEMENTS[traits.dtype], ELEMENTS[traits.out_dtype]
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

    place_of_queries = make_place_of_queries(tile_m)
    steps_of, tile_at = make_steps_of(traits, tile_n), make_tile_at(traits, tile_n)
    copy = (num_threads, traits.vectorized)
    load_q = make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_k = make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    multiply_q_k = make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_p_v = make_product_nn(rows, groups, tile_n, p_pitch, v_pitch)
    apply_functions = make_apply_functions(rows, columns, traits, True, False)
    mask_scores = make_mask_scores(rows, columns)
    draw_kept = make_draw_kept(rows, columns, traits.features, by_row=True)
    online_softmax = make_online_softmax(rows, columns, n_out, p_pitch, traits.features)
    end_of_row, lse_of_row = make_end_of_row(traits.features, NATURAL)
    store_o = make_store_rows(result, rows, groups, traits.vectorized)
    out_storage = result.storage
    storage, args_of_head = element.storage, make_args_of_head(traits)
    n_kept = words_of_bits(n_scores) if traits.drops_weights else 1

    def forward(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        out: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        mask: mask_of(traits),
        shape: Shape,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)
        kept = cuda.local.array(n_kept, u32)

        m_start, head, head_kv, batch, _ = place_of_queries(mov_ctaid_x(), shape)
        sequence = sequence_of(shape, mask)
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        out_base = first_of_rows(out, batch, head, sequence.first_q)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        args = args_of_head(scores, batch, head)

        # This thread's first row and columns, in the tiles.
        row = first_row_of_thread(rows_per_warp)
        column = cuda.threadIdx.x % COLUMN_LANES
        q_mine, k_mine = q_smem + row * k_pitch, k_smem + column * k_pitch
        p_mine, v_mine = p_smem + row * p_pitch, v_smem + 4 * column

        load_q(smem, q_smem, q, q_base, m_start, sequence.seqlen_q, shape.head_dim)
        for i in range(n_o):
            o_acc[i] = f32(0)
        for r in range(rows):
            row_max[r] = NEG_INF
            row_sum[r] = f32(0)

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
            # Q, K and V of all threads must have arrived.
            cuda.syncthreads()

            # S = softmax_scale Q K^T, masked where the block crosses an edge of the band
            multiply_q_k(s_acc, smem, q_mine, k_mine)
            i, j = m_start + row, n_start + column
            apply_functions(s_acc, s_acc, Corner(i, j, sequence, is_full), scores, args)
            if n_start < whole.first or n_start > whole.last:
                mask_scores(s_acc, i, j, sequence.seqlen_k, sequence)

            # P = exp(S - row_max), O += P V
            draw_kept(kept, i, j, args.drawn)
            online_softmax(s_acc, row_max, row_sum, o_acc, smem, p_mine + column, kept)
            # P of all lanes must have arrived: a warp exchanges that of its own rows.
            cuda.syncwarp()
            multiply_p_v(o_acc, smem, p_mine, v_mine)

        for r in range(rows):
            total = row_sum_of_lanes(row_sum[r])
            factor, top, total = end_of_row(row_max[r], total, scores.features, batch, head)
            for j in range(n_out):
                o_acc[n_out * r + j] *= factor
            i = m_start + row + ROW_LANES * r
            if column == 0 and i < sequence.seqlen_q:
                lse[first_query + i] = lse_of_row(top, total)
        store_o(o_acc, out, out_base, m_start + row, sequence.seqlen_q, shape.head_dim_v)

    return Kernel(config.family, forward, num_threads, layout.smem_bytes)
