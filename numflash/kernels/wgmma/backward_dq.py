"""Backward for Q on Hopper: dQ = dS K, with P computed again from lse.

A block owns tile_m rows of Q and dO, 64 to a warpgroup, and walks over K and V in tiles of tile_n,
as the forward does: one thread fetches them by bulk copies, warpgroups multiply. S = Q K^T and
dP = dO V^T come from shared memory; P, dP and dS stay in registers, and dS is operand A of the
product with K, by rows. P is computed while dP is under way.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2, with the loop order that gives each block
its own rows of dQ.
"""

import math

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardDqConfig
from numflash.kernels.arguments import Statistics, Tensor, mapped_shape_of, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.wgmma.gradient_ring import (
    channels_of,
    make_fetch,
    make_operand_of,
    make_run_block,
    matrix_of,
)
from numflash.kernels.wgmma.origins import make_origins_of_gradients
from numflash.ptx import TensorMap, cuda, device_function, f32, i32, mov_ctaid_x, u32
from numflash.ptx.bulk_copies import EVICT_FIRST, EVICT_LAST, prefetch_tensormap
from numflash.ptx.memory import mov_shared_address
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import addresses, blocks, features, sequences
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.mma import copies
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, tiles_seen, tiles_seen_whole
from numflash.tiles.steps import make_steps_of, make_tile_at
from numflash.tiles.wgmma import products
from numflash.tiles.wgmma.gradients import (
    make_bend,
    make_draw_kept,
    make_drop,
    make_gradients_by_row,
    make_probabilities_by_row,
    make_sums_of_rows,
    words_of_kept,
)
from numflash.tiles.wgmma.products import SLAB_BYTES
from numflash.tiles.wgmma.turns import group_of_thread, softmax_before_wait


def make_backward_dq_kernel(config: Sm90BackwardDqConfig, traits: Traits) -> Kernel:
    """The dQ kernel for one config; see the module's docstring."""
    out_storage = f32 if traits.float32_out else MMA_ELEMENTS["sm80", traits.dtype].storage
    channels = channels_of(config, traits, 2)
    parts = _make_walk(config, traits)
    produce = _make_produce(config, traits, channels, *parts)
    consume = _make_consume(config, traits, channels, *parts)

    @device_function
    def assist(smem, barriers, given):
        """Nothing is left to do."""

    run_block = make_run_block(config, channels, produce, assist, consume)
    is_idle = blocks.make_is_idle(traits)

    def backward_dq(
        q_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim)
        k_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim)
        v_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim_v)
        do_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dq: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        mask: mask_of(traits),
        shape: mapped_shape_of(traits),
        scores: scores_of(traits.program),
    ):
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        given = statistics_log2, (dq,), mask, shape, scores
        run_block((q_map, k_map, v_map, do_map), given)

    return Kernel(config.family, backward_dq, config.num_threads, config.smem_bytes(traits))


def _make_walk(config: Sm90BackwardDqConfig, traits: Traits):
    """(walk_of, tile_at): the block's place, its sequence, and the steps of keys that it sees."""
    tile_m, tile_n = config.tile_m, config.tile_n
    place_of_queries = blocks.make_place_of_queries(tile_m, traits)
    sequence_of, steps_of = sequences.make_sequence_of(traits), make_steps_of(traits, tile_n)

    @device_function
    def walk_of(mask, shape):
        place = place_of_queries(mov_ctaid_x(), shape, mask)
        sequence = sequence_of(place, shape, mask)
        last_query = last_of(place.start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(place.start, last_query, tile_n, sequence)
        steps = steps_of(mask, place.batch, place.head, place.start, tiles)
        return place, sequence, steps

    return walk_of, make_tile_at(traits, tile_n)


def _make_produce(config: Sm90BackwardDqConfig, traits: Traits, channels, walk_of, tile_at):
    """produce(smem, barriers, maps, given): fetch Q and dO, then K and V tile by tile."""
    OWNED, K, V = channels
    q, do, k, v = (matrix_of(config, traits, name) for name in ("q", "do", "k", "v"))
    fetch_q, fetch_do = make_fetch(q, EVICT_FIRST), make_fetch(do, EVICT_FIRST)
    fetch_k, fetch_v = make_fetch(k, EVICT_LAST), make_fetch(v, EVICT_LAST)
    owned_bytes, k_bytes, v_bytes = u32(q.n_bytes + do.n_bytes), u32(k.n_bytes), u32(v.n_bytes)
    tile_n, origins_of = config.tile_n, make_origins_of_gradients(traits)

    @device_function
    def produce(smem, barriers, maps, given):
        q_map, k_map, v_map, do_map = maps
        _, _, mask, shape, _ = given
        place, sequence, (begin, end) = walk_of(mask, shape)
        start, head, head_kv = place.start, place.head, place.head_kv
        of_q, of_k, of_v, of_do = origins_of(place, sequence, shape)
        prefetch_tensormap(q_map)
        prefetch_tensormap(k_map)
        prefetch_tensormap(v_map)
        prefetch_tensormap(do_map)
        # Without keys nobody waits for Q and dO.
        if begin < end:
            # Hazard: Q and dO would count as full before all of their slabs have arrived.
            OWNED.expect(barriers, 0, owned_bytes)
            own, at_q, at_do = i32(0), i32(start + of_q.row), i32(start + of_do.row)
            fetch_q(smem, barriers, OWNED.full, q_map, own, at_q, head, of_q.entry)
            fetch_do(smem, barriers, OWNED.full, do_map, own, at_do, head, of_do.entry)
        # Buffers are empty at first, as if a phase of parity 1 had ended.
        stage, parity = i32(0), u32(1)
        for step in range(begin, end):
            tile, _ = tile_at(mask, step)
            at_k, at_v = i32(tile * tile_n + of_k.row), i32(tile * tile_n + of_v.row)
            # Hazard: this K would overwrite the one that a warpgroup still multiplies.
            K.claim(barriers, stage, parity)
            # Hazard: K would count as full before all of its slabs have arrived.
            K.expect(barriers, stage, k_bytes)
            fetch_k(smem, barriers, K.full + stage, k_map, stage, at_k, head_kv, of_k.entry)
            # Hazard: this V would overwrite the one that a warpgroup still multiplies.
            V.claim(barriers, stage, parity)
            # Hazard: V would count as full before all of its slabs have arrived.
            V.expect(barriers, stage, v_bytes)
            fetch_v(smem, barriers, V.full + stage, v_map, stage, at_v, head_kv, of_v.entry)
            stage, parity = K.following(stage, parity)

    return produce


def _make_consume(config: Sm90BackwardDqConfig, traits: Traits, channels, walk_of, tile_at):
    """consume(smem, barriers, given): dQ of this warpgroup's 64 rows."""
    OWNED, K, V = channels
    tile_m, tile_n, dtype = config.tile_m, config.tile_n, traits.dtype
    n_tiles, dq_tiles = tile_n // 8, traits.head_dim // 8
    n_scores, n_packed, n_dq = 4 * n_tiles, 2 * n_tiles, 4 * dq_tiles
    q_of, do_of, k_of, v_of = (
        make_operand_of(matrix_of(config, traits, name)) for name in ("q", "do", "k", "v")
    )
    # Operands count in units of 16 bytes.
    group_step = WARPGROUP_ROWS * SLAB_BYTES >> 4
    begin_s = products.make_product_nt(dtype, tile_m, tile_n, tile_n, traits.head_dim)
    begin_dp = products.make_product_nt(dtype, tile_m, tile_n, tile_n, traits.head_dim_v)
    begin_dq = products.make_product_pn(dtype, tile_n, traits.head_dim)
    wait_for_s, wait_for_dp = (make_wgmma_wait_group(i, n_scores) for i in (1, 0))
    wait_for_dq = make_wgmma_wait_group(0, n_dq)
    apply_functions = make_apply_functions(1, n_tiles, traits, True, traits.bends_scores)
    mask_scores, pack = make_mask_scores(1, n_tiles), products.make_pack(dtype, n_tiles)
    probabilities, bend = make_probabilities_by_row(n_tiles), make_bend(n_tiles, traits)
    gradients, sums_of_rows = make_gradients_by_row(n_tiles), make_sums_of_rows(n_tiles)
    draw_kept, drop = make_draw_kept(n_tiles, traits, True), make_drop(n_tiles, traits)
    n_kept = words_of_kept(n_tiles, traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    args_of_head = features.make_args_of_head(traits)
    element = MMA_ELEMENTS["sm80", dtype]
    store_as = traits.vectorized, traits.float32_out, addresses.row_of_head, traits.float32_out
    store_dq = copies.make_store_rows(element, 1, dq_tiles, *store_as)
    bends, has_functions = traits.shapes_scores, traits.has_functions
    n_slopes = n_scores if traits.bends_scores else 1

    @device_function
    def consume(smem, barriers, given):
        statistics, (dq,), mask, shape, scores = given
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        packed = cuda.local.array(n_packed, u32)
        kept = cuda.local.array(n_kept, u32)
        dq_acc = cuda.local.array(n_dq, f32)
        lses = cuda.local.array(2, f32)
        deltas = cuda.local.array(2, f32)
        place, sequence, (begin, end) = walk_of(mask, shape)
        m_start, head, _, batch, _ = place[:5]
        args = args_of_head(scores, batch, head)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        row = i32(m_start + accumulator_row(MMA_ROWS))
        for r in range(2):
            i = row + ROW_STEP * r
            # A row past the end is like one that sees no key: its P is zero.
            lses[r] = f32(math.inf)
            deltas[r] = f32(0)
            if i < sequence.seqlen_q:
                lses[r] = statistics.lse[first_query + i]
                deltas[r] = statistics.delta[first_query + i]
        for i in range(n_dq):
            dq_acc[i] = f32(0)
        if begin < end:
            # Hazard: products would read Q and dO while their bytes are still on their way.
            OWNED.wait(barriers, 0, u32(0))
        stage, parity = i32(0), u32(0)
        for step in range(begin, end):
            # Computed again in each tile: kept, descriptors would take registers.
            group, start = group_of_thread(), mov_shared_address(smem, 0)
            q_mine = products.advance(q_of(start, 0), group, group_step)
            do_mine = products.advance(do_of(start, 0), group, group_step)
            k_now = k_of(start, stage)
            v_now = v_of(start, stage)
            # S = Q K^T, dP = dO V^T
            # Hazard: S would be made of a K that has not arrived.
            K.wait(barriers, stage, parity)
            begin_s(s_acc, q_mine, k_now)
            # Hazard: dP would be made of a V that has not arrived.
            V.wait(barriers, stage, parity)
            begin_dp(dp_acc, do_mine, v_now)
            tile, is_full = tile_at(mask, step)
            n_start = i32(tile * tile_n)
            i = i32(m_start + accumulator_row(MMA_ROWS))
            draw_kept(kept, i, i32(n_start + accumulator_column()), args.drawn)
            # Hazard: the product still writes S.
            wait_for_s(s_acc)
            if has_functions:
                i = i32(m_start + accumulator_row(MMA_ROWS))
                j = i32(n_start + accumulator_column())
                corner = Corner(i, j, sequence, is_full)
                apply_functions(s_acc, slopes, corner, scores.scale, scores, args)
            if n_start < whole.first or n_start > whole.last:
                i = i32(m_start + accumulator_row(MMA_ROWS))
                j = i32(n_start + accumulator_column())
                mask_scores(s_acc, i, j, sequence.seqlen_k, sequence, 1)
            probabilities(s_acc, lses, scale_log2)
            # The sums are taken before `bend`: P is not negative, P times a slope may be.
            above, below = sums_of_rows(s_acc)
            softmax_before_wait(above, below)
            bend(s_acc, slopes)
            # Hazard: the product still writes dP, and reads V, which is given back.
            wait_for_dp(dp_acc)
            V.release(barriers, stage)
            drop(dp_acc, kept)
            # dS = P * (softmax_scale dP - delta), dQ += dS K
            gradients(s_acc, dp_acc, deltas, scores.softmax_scale)
            pack(packed, dp_acc)
            begin_dq(dq_acc, packed, k_now)
            # Hazard: the product still reads dS, and K, which is given back.
            wait_for_dq(dq_acc)
            K.release(barriers, stage)
            stage, parity = K.following(stage, parity)

        row = i32(m_start + accumulator_row(MMA_ROWS))
        dq_base = first_of_rows(dq, batch, head, sequence.first_q)
        store_dq(dq_acc, dq, dq_base, row, sequence.seqlen_q, shape.head_dim)

    return consume
