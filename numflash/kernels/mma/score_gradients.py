"""dS of a tile on the tensor cores, as `portable.score_gradients` has it on the FMA units.

A tile of each of Q and dO lies in shared memory, and `config.num_stages` of K and V. With one
stage a tile is copied when it is needed: blocks on one SM take turns at copying and computing.
"""

import math
from dataclasses import replace

from numflash.configs import Traits
from numflash.configs.features import rows_of
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, i32, u32
from numflash.ptx.arithmetic import bits_as_float
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.tiles import addresses
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.mma import copies, elements, fragments, products, softmax
from numflash.tiles.mma.fragments import (
    MMA_COLUMNS,
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    first_row_of_warp,
)
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import Corner


@device_function
def _rows_beyond(r):
    return ROW_STEP * r


@device_function
def _columns_beyond(c):
    return c // 2 * MMA_COLUMNS + c % 2


@device_function
def _sum_of_column(x):
    for distance in (4, 8, 16):
        x += cuda.shfl_xor_sync(FULL_WARP, x, distance)
    return x


@device_function
def _leads_column():
    return cuda.threadIdx.x % 32 < 4


@device_function
def _read_float(smem, i):
    return bits_as_float(smem[i])


def make_score_gradients(config, traits: Traits) -> ScoreGradients:
    """The functions for a config with the tiles q, do, k and v in shared memory."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    m_tiles, n_tiles = config.m_tiles, tile_n // MMA_COLUMNS
    rows, rows_per_warp = 2 * m_tiles, MMA_ROWS * m_tiles
    n_scores = 4 * m_tiles * n_tiles

    offsets = config.smem_offsets(traits)
    num_stages = config.num_stages
    q_smem, do_smem, k_smem, v_smem = (offsets[name] for name in ("q", "do", "k", "v"))
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    k_words, v_words = tile_n * k_layout.pitch, tile_n * v_layout.pitch
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_q = copies.make_copy_tile(element, k_layout, tile_m, *copy)
    copy_do = copies.make_copy_tile(element, v_layout, tile_m, *copy)
    copy_k = copies.make_copy_tile(element, k_layout, tile_n, *copy)
    copy_v = copies.make_copy_tile(element, v_layout, tile_n, *copy)
    k_row_operand, k_column_operand = fragments.make_operands(k_layout)
    v_row_operand, v_column_operand = fragments.make_operands(v_layout)
    multiply_q_k = products.make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    multiply_do_v = products.make_product_nt(element, m_tiles, n_tiles, v_layout, v_layout)
    # Of what features do to scores dS takes no notice, but of what they do to P; and of what the
    # program does with scores, or with the element that it reads.
    weighing = (row.name for row in rows_of(traits.features) if row.hook == "weigh")
    later = replace(traits, features=tuple(weighing))
    apply_functions = make_apply_functions(
        m_tiles, n_tiles, traits, True, later.bends_scores, after_features=True
    )
    first_of_statistics = addresses.make_first_of_statistics(traits)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    softmax_backward = softmax.make_softmax_backward_by_row(m_tiles, n_tiles, later)
    shapes, has_functions = traits.shapes_scores, traits.has_functions
    drops, n_slopes = traits.drops_weights, n_scores if later.bends_scores else 1
    # Tiles that may be on their way while one is used.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[max(0, num_stages - 2)]

    @device_function
    def load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape):
        q, _, _, do, statistics = inputs
        end = sequence.seqlen_q
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        do_base = first_of_rows(do, batch, head, sequence.first_q)
        copy_q(smem, q_smem, q, q_base, m_start, end, shape.head_dim)
        copy_do(smem, do_smem, do, do_base, m_start, end, shape.head_dim_v)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        row = i32(m_start + accumulator_row(rows_per_warp))
        for r in range(rows):
            i = row + ROW_STEP * r
            # A row past the end is like one that sees no key: its P is zero.
            lses[r] = f32(math.inf)
            deltas[r] = f32(0)
            if i < end:
                lses[r] = statistics.lse[first_query + i]
                deltas[r] = statistics.delta[first_query + i]

    @device_function
    def load_keys(smem, stage, inputs, batch, head_kv, n_start, sequence, shape):
        _, k, v, _, _ = inputs
        k_base = first_of_rows(k, batch, head_kv, sequence.first_k)
        v_base = first_of_rows(v, batch, head_kv, sequence.first_k)
        k_tile, v_tile = k_smem + k_words * stage, v_smem + v_words * stage
        copy_k(smem, k_tile, k, k_base, n_start, sequence.seqlen_k, shape.head_dim)
        copy_v(smem, v_tile, v, v_base, n_start, sequence.seqlen_k, shape.head_dim_v)

    @device_function
    def commit():
        if asynchronous:
            cp_async_commit_group()

    @device_function
    def wait():
        if asynchronous:
            wait_for_tile()

    @device_function
    def place():
        return accumulator_row(rows_per_warp), accumulator_column()

    @device_function
    def beyond(e):
        tile, more = e // 4, e % 4
        rows_beyond = tile // n_tiles * MMA_ROWS + more // 2 * ROW_STEP
        return rows_beyond, tile % n_tiles * MMA_COLUMNS + more % 2

    @device_function
    def row_of(e):
        return e // 4 // n_tiles * 2 + e % 4 // 2

    @device_function
    def column_of(e):
        return e // 4 % n_tiles * 2 + e % 2

    @device_function
    def compute(ds_acc, s_acc, smem, stage, of_rows, tile, sequence, scores, args):
        slopes = cuda.local.array(n_slopes, f32)
        lses, deltas = of_rows
        m_start, n_start, is_whole, is_full = tile
        # This lane's position in the operands.
        lane = cuda.threadIdx.x % 32
        warp_row = first_row_of_warp(rows_per_warp)
        q_mine = q_smem + k_row_operand(warp_row, 0, lane)
        do_mine = do_smem + v_row_operand(warp_row, 0, lane)
        k_mine = k_smem + k_column_operand(0, 0, lane)
        v_mine = v_smem + v_column_operand(0, 0, lane)
        multiply_q_k(s_acc, smem, q_mine, k_mine + k_words * stage)
        multiply_do_v(ds_acc, smem, do_mine, v_mine + v_words * stage)
        i = i32(m_start + accumulator_row(rows_per_warp))
        j = i32(n_start + accumulator_column())
        scale_log2 = LOG2_E
        if not shapes:
            scale_log2 = scores.scale * LOG2_E
        if has_functions:
            corner = Corner(i, j, sequence, is_full)
            apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
        if not is_whole:
            mask_scores(s_acc, i, j, sequence.seqlen_k, sequence, 1)
        scales = scale_log2, f32(1)
        if drops:
            softmax_backward(s_acc, ds_acc, slopes, lses, deltas, scales, i, j, args.drawn)
        else:
            softmax_backward(s_acc, ds_acc, slopes, lses, deltas, scales)

    return ScoreGradients(
        load_queries=load_queries,
        load_keys=load_keys,
        commit=commit,
        wait=wait,
        compute=compute,
        place=place,
        beyond=beyond,
        rows_beyond=_rows_beyond,
        columns_beyond=_columns_beyond,
        row_of=row_of,
        column_of=column_of,
        sum_of_row=softmax.row_sum_of_quad,
        sum_of_column=_sum_of_column,
        leads_column=_leads_column,
        read_float=_read_float,
        memory=u32,
        alignment=128,
        num_stages=num_stages,
        rows=rows,
        columns=2 * n_tiles,
        n_scores=n_scores,
    )
