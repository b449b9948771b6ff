"""Forward: O = softmax(softmax_scale Q K^T) V and lse, without ever holding S.

A block owns tile_m rows of Q. It walks over K and V in tiles of tile_n: a tile of scores S, the
online softmax that turns it into P, and O += P V. A warp owns whole rows, so rows never need
another warp; the block meets only to replace K and V in shared memory.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1.
"""

from numflash.configs import ForwardConfig, Traits
from numflash.kernels.arguments import Pointer, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.tiles import addresses, blocks, features, pages, sequences, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.portable import copies, dropout, lanes, products, softmax
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES, first_row_of_thread
from numflash.tiles.portable.scores import make_apply_functions, make_mask_scores
from numflash.tiles.portable.softmax import row_sum_of_lanes
from numflash.tiles.rows import NATURAL, make_end_of_row
from numflash.tiles.scores import NEG_INF, Corner
from numflash.tiles.sequences import last_of, tiles_seen, tiles_seen_whole


def make_forward_kernel(config: ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    element, result = ELEMENTS[traits.dtype], ELEMENTS[traits.out_dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows = lanes.rows_per_thread(tile_m, config.num_warps)
    columns = lanes.columns_per_thread(tile_n)
    groups = lanes.groups_per_thread(traits.head_dim_v)
    rows_per_warp = ROW_LANES * rows
    n_scores, n_out = rows * columns, 4 * groups
    n_o = rows * n_out

    layout = config.smem_layout(traits)
    q_smem, k_smem = layout.offsets["q"], layout.offsets["k"]
    v_smem, p_smem = layout.offsets["v"], layout.offsets["p"]
    k_pitch, v_pitch, p_pitch = (layout.pitches[name] for name in "kvp")

    place_of_queries = blocks.make_place_of_queries(tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    steps_of, tile_at = steps.make_steps_of(traits, tile_n), steps.make_tile_at(traits, tile_n)
    copy = (num_threads, traits.vectorized)
    load_q = copies.make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    of_keys = pages.row_in_pages if traits.paged else addresses.row_of_head
    load_k = copies.make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy, of_keys)
    load_v = copies.make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy, of_keys)
    origin_of_keys = pages.make_origin_of_keys(traits)
    multiply_q_k = products.make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_p_v = products.make_product_nn(rows, groups, tile_n, p_pitch, v_pitch)
    apply_functions = make_apply_functions(rows, columns, traits, True, False)
    mask_scores = make_mask_scores(rows, columns)
    draw_kept = dropout.make_draw_kept(rows, columns, traits.features, by_row=True)
    online_softmax = softmax.make_online_softmax(rows, columns, n_out, p_pitch, traits.features)
    end_of_row, lse_of_row = make_end_of_row(traits.features, NATURAL)
    store_o = copies.make_store_rows(result, rows, groups, traits.vectorized)
    out_storage = result.storage
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    n_kept = dropout.words_of_bits(n_scores) if traits.drops_weights else 1

    def forward(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        out: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)
        kept = cuda.local.array(n_kept, u32)

        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        place = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, _, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        k_origin = origin_of_keys(k, place, sequence, shape)
        v_origin = origin_of_keys(v, place, sequence, shape)
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
            load_k(smem, k_smem, k, k_origin, n_start, sequence.seqlen_k, shape.head_dim)
            load_v(smem, v_smem, v, v_origin, n_start, sequence.seqlen_k, shape.head_dim_v)
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
