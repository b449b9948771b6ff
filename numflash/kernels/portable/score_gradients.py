"""dS of a tile, computed again from Q, K, V, dO and the statistics of queries.

For kernels that want the gradient of the scores themselves, and not of what they are made of. They
own what they like, and walk over tiles as they like; here a tile of dS is made in registers. dS is
the gradient of the scores that features give, as they go into the softmax without a program:

    dS = P * (dP - delta)       P = exp(S - lse), dP = dO V^T, delta not scaled

so `statistics` must be those whose delta is rowsum(O * dO), less the gradient of lse. All threads
of a block call these functions together.
"""

from numflash.configs import Traits
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, u32
from numflash.tiles import addresses
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.portable import copies, dropout, gradients, lanes, products, softmax
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import COLUMN_LANES, FULL_WARP, ROW_LANES, first_row_of_thread
from numflash.tiles.portable.scores import make_apply_functions, make_mask_scores
from numflash.tiles.scores import Corner


@device_function
def _nothing():
    """Loads are there when they return."""


@device_function
def _rows_beyond(r):
    return ROW_LANES * r


@device_function
def _columns_beyond(c):
    return COLUMN_LANES * c


@device_function
def _sum_of_column(x):
    for distance in (8, 16):
        x += cuda.shfl_xor_sync(FULL_WARP, x, distance)
    return x


@device_function
def _leads_column():
    return cuda.threadIdx.x % 32 < COLUMN_LANES


@device_function
def _read_float(smem, i):
    return smem[i]


def make_score_gradients(config, traits: Traits) -> ScoreGradients:
    """The functions for a config with one tile each of q, do, k and v in shared memory."""
    element = ELEMENTS[traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    rows = lanes.rows_per_thread(tile_m, config.num_warps)
    columns = lanes.columns_per_thread(tile_n)
    rows_per_warp = ROW_LANES * rows
    layout = config.smem_layout(traits)
    q_smem, do_smem = layout.offsets["q"], layout.offsets["do"]
    k_smem, v_smem = layout.offsets["k"], layout.offsets["v"]
    k_pitch, v_pitch = layout.pitches["k"], layout.pitches["v"]

    copy = (num_threads, traits.vectorized)
    load_q = copies.make_load_tile(element, tile_m, traits.head_dim, k_pitch, *copy)
    load_do = copies.make_load_tile(element, tile_m, traits.head_dim_v, v_pitch, *copy)
    load_k = copies.make_load_tile(element, tile_n, traits.head_dim, k_pitch, *copy)
    load_v = copies.make_load_tile(element, tile_n, traits.head_dim_v, v_pitch, *copy)
    load_query_statistics = gradients.make_load_query_statistics(rows, ROW_LANES)
    multiply_q_k = products.make_product_nt(rows, columns, traits.head_dim, k_pitch, k_pitch)
    multiply_do_v = products.make_product_nt(rows, columns, traits.head_dim_v, v_pitch, v_pitch)
    bends = traits.program_bends
    n_slopes = rows * columns if bends else 1
    apply_functions = make_apply_functions(rows, columns, traits, True, bends, True)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    mask_scores = make_mask_scores(rows, columns)
    softmax_backward = gradients.make_softmax_backward(
        rows, columns, traits, True, of_scores=not bends
    )
    draw_kept = dropout.make_draw_kept(rows, columns, traits.features, by_row=True)
    n_kept = dropout.words_of_bits(rows * columns) if traits.drops_weights else 1

    @device_function
    def place():
        return first_row_of_thread(rows_per_warp), cuda.threadIdx.x % COLUMN_LANES

    @device_function
    def beyond(e):
        return ROW_LANES * (e // columns), COLUMN_LANES * (e % columns)

    @device_function
    def row_of(e):
        return e // columns

    @device_function
    def column_of(e):
        return e % columns

    @device_function
    def load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape):
        q, _, _, do, statistics = inputs
        end, (row, _) = sequence.seqlen_q, place()
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        do_base = first_of_rows(do, batch, head, sequence.first_q)
        load_q(smem, q_smem, q, q_base, m_start, end, shape.head_dim)
        load_do(smem, do_smem, do, do_base, m_start, end, shape.head_dim_v)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        load_query_statistics(lses, deltas, statistics, first_query, m_start + row, end)

    @device_function
    def load_keys(smem, stage, inputs, batch, head_kv, n_start, sequence, shape):
        _, k, v, _, _ = inputs
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        load_k(smem, k_smem, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
        load_v(smem, v_smem, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)

    @device_function
    def compute(ds_acc, s_acc, smem, stage, of_rows, tile, sequence, scores, args):
        slopes = cuda.local.array(n_slopes, f32)
        kept = cuda.local.array(n_kept, u32)
        lses, deltas = of_rows
        m_start, n_start, is_whole, is_full = tile
        row, column = place()
        multiply_q_k(s_acc, smem, q_smem + row * k_pitch, k_smem + column * k_pitch)
        multiply_do_v(ds_acc, smem, do_smem + row * v_pitch, v_smem + column * v_pitch)
        i, j = m_start + row, n_start + column
        apply_functions(s_acc, slopes, Corner(i, j, sequence, is_full), scores, args)
        if not is_whole:
            mask_scores(s_acc, i, j, sequence.seqlen_k, sequence)
        draw_kept(kept, i, j, args.drawn)
        scales = f32(1), scores.features.dropout.scale
        softmax_backward(s_acc, ds_acc, slopes, lses, deltas, scales, kept)

    return ScoreGradients(
        load_queries=load_queries,
        load_keys=load_keys,
        commit=_nothing,
        wait=_nothing,
        compute=compute,
        place=place,
        beyond=beyond,
        rows_beyond=_rows_beyond,
        columns_beyond=_columns_beyond,
        row_of=row_of,
        column_of=column_of,
        sum_of_row=softmax.row_sum_of_lanes,
        sum_of_column=_sum_of_column,
        leads_column=_leads_column,
        read_float=_read_float,
        memory=f32,
        alignment=16,
        num_stages=1,
        rows=rows,
        columns=columns,
        n_scores=rows * columns,
    )
