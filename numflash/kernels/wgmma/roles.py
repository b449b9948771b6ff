"""dK and dV by roles: two warpgroups on the same 64 keys, for head dims above 128.

A thread has registers for dK or for dV of 64 keys and 256 columns, not for both. So each
warpgroup owns one of them:

    the first warpgroup             the second
    S^T = K Q^T                     dP^T = V dO^T
    P from S
    dV += P^T dO                    dS from P and dP
        beside it P is left ------> dK += dS^T Q

P goes through shared memory (`tiles.wgmma.handover`), by the channel `P`. It has a buffer for each
stage of Q and dO, and is given back with that Q. Each warpgroup waits for its own products at
once; meanwhile the products of the other run. The second is half a tile behind, because it needs
P: the first computes exponentials under the second's dP^T, the second computes dS under the
first's dV.

The branch on the warpgroup's number stands before two loops. Within one loop products would stand
under a branch, and the assembler would serialise them.

The loops in machine code, a warp and a tile (bfloat16, tile 64 x 64, head_dim 256, sm_90a). For
both together the tensor cores take 2048 clocks, and shared memory, by the model, some 2240:

                        first   second
    instructions issued   252      285      with softcap 420 and 257, with dropout 753 and 332
    HGMMA                  20       20      16 of S or dP, 4 of dV or dK, each 64 x 64 or 64 x 256
    waits for products      2        2      for all that are under way
    MUFU, FFMA             32        -      P from S and lse
    FFMA, FMUL              -       32      dS from P, dP and delta
    LDS                     4        8      lse; delta and P; STS 4 of P
    registers named       208               of 240; with softcap 215; no spill
"""

from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardDkDvConfig
from numflash.kernels.mma.queries import make_steps_of_heads
from numflash.kernels.wgmma.gradient_ring import make_operand_of, matrix_of
from numflash.kernels.wgmma.queries import make_finish
from numflash.ptx import cuda, device_function, f32, i32, mov_ctaid_x, mov_tid_x, u32
from numflash.ptx.memory import mov_shared_address
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import features, steps
from numflash.tiles.mma.fragments import MMA_ROWS, accumulator_row
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.sequences import last_of, seen_from_keys, tiles_seen_whole
from numflash.tiles.wgmma import products
from numflash.tiles.wgmma.gradients import (
    make_bend,
    make_drop,
    make_gradients_by_column,
    make_pack_kept,
    make_probabilities_by_column,
    words_of_kept,
)
from numflash.tiles.wgmma.handover import (
    handover_place,
    make_hand_over_kept,
    make_leave,
    make_take,
)
from numflash.tiles.wgmma.scores import (
    OwnedKeys,
    make_draw_by_column,
    make_shape_scores_by_column,
)
from numflash.tiles.wgmma.turns import group_of_thread


def make_consume(config: Sm90BackwardDkDvConfig, traits: Traits, channels, walk_of):
    """consume(smem, barriers, given): dV by the first warpgroup, dK by the second."""
    own_dv = _make_own_dv(config, traits, channels, walk_of)
    own_dk = _make_own_dk(config, traits, channels, walk_of)

    @device_function
    def consume(smem, barriers, given):
        if group_of_thread() == 0:
            own_dv(smem, barriers, given)
        else:
            own_dk(smem, barriers, given)

    return consume


def _make_own_dv(config: Sm90BackwardDkDvConfig, traits: Traits, channels, walk_of):
    """own_dv(smem, barriers, given): dV of the block's keys; P of each tile goes to `own_dk`."""
    OWNED, Q, DO, ROWS, P = channels
    tile_m, tile_n, dtype = config.tile_m, config.tile_n, traits.dtype
    n_tiles, n_dv = tile_m // 8, traits.head_dim_v // 2
    n_scores, n_packed = 4 * n_tiles, 2 * n_tiles
    q_of, do_of, k_of = (
        make_operand_of(matrix_of(config, traits, name)) for name in ("q", "do", "k")
    )
    offsets, p_words = config.smem_offsets(traits), _words_of_p(config, traits)
    lse_smem, p_smem = offsets["lse"], offsets["p"]
    begin_s = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim)
    begin_dv = products.make_product_pn(dtype, tile_m, traits.head_dim_v)
    wait_for_s, wait_for_dv = (make_wgmma_wait_group(0, n) for n in (n_scores, n_dv))
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    shape_scores = make_shape_scores_by_column(tile_m, traits)
    probabilities, bend = make_probabilities_by_column(n_tiles), make_bend(n_tiles, traits)
    pack, pack_kept = products.make_pack(dtype, n_tiles), make_pack_kept(dtype, n_tiles, traits)
    draw, leave = make_draw_by_column(tile_m, traits), make_leave(n_tiles, traits)
    leave_kept, _ = make_hand_over_kept(n_tiles, traits)
    n_kept, leaves_all = words_of_kept(n_tiles, traits), traits.drops_weights
    args_of_head = features.make_args_of_head(traits)
    finish = make_finish(traits, walk_of, traits.head_dim_v)
    bends, n_slopes = traits.shapes_scores, n_scores if traits.bends_scores else 1

    @device_function
    def own_dv(smem, barriers, given):
        _, (_, dv), mask, shape, scores = given
        s_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        packed = cuda.local.array(n_packed, u32)
        packed_all = packed
        if leaves_all:
            packed_all = cuda.local.array(n_packed, u32)
        kept = cuda.local.array(n_kept, u32)
        dv_acc = cuda.local.array(n_dv, f32)
        place, sequence, walk = walk_of(mov_ctaid_x(), mask, shape)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        from_keys = seen_from_keys(sequence)
        last_key = last_of(place.start, tile_n, sequence.seqlen_k)
        whole = tiles_seen_whole(place.start, last_key, tile_m, from_keys)
        keys = OwnedKeys(place.start, whole, sequence, from_keys)
        for i in range(n_dv):
            dv_acc[i] = f32(0)
        step, head, end = first_step(walk)
        num_steps = count_steps(walk)
        if num_steps > 0:
            # Hazard: products would read K while its bytes are still on their way.
            OWNED.wait(barriers, 0, u32(0))
        stage, parity = i32(0), u32(0)
        for _ in range(num_steps):
            start = mov_shared_address(smem, 0)
            k_all, q_now, do_now = k_of(start, 0), q_of(start, stage), do_of(start, stage)
            # S^T = K Q^T
            # Hazard: S would be made of a Q that has not arrived.
            Q.wait(barriers, stage, parity)
            begin_s(s_acc, k_all, q_now)
            tile, is_full = tile_at(mask, step)
            m_start, args = i32(tile * tile_m), args_of_head(scores, place.batch, head)
            draw(kept, keys, m_start, args.drawn)
            # Hazard: lse of this tile may not be there yet.
            ROWS.wait(barriers, stage, parity)
            # Hazard: the product still writes S.
            wait_for_s(s_acc)
            shape_scores(s_acc, slopes, keys, m_start, is_full, scores, args)
            lse = lse_smem + tile_m * stage + mov_tid_x() % 4 * 4
            probabilities(s_acc, smem, lse, scale_log2)
            pack_kept(packed, s_acc, kept)
            # dV += P^T dO
            # Hazard: dV would get a dO that has not arrived.
            DO.wait(barriers, stage, parity)
            begin_dv(dv_acc, packed, do_now)
            if leaves_all:
                pack(packed_all, s_acc)
            bend(s_acc, slopes)
            # Nobody reads this buffer of P any more: this Q came after both warpgroups had
            # released the Q before it in the stage, and with it P.
            p_now = i32(p_smem + p_words * stage)
            leave(s_acc, packed_all, smem, i32(p_now + handover_place()))
            leave_kept(kept, smem, p_now)
            # Hazard: the other warpgroup would wait for this P for ever.
            P.filled(barriers, stage)
            # Hazard: the product still reads P, and dO, which is given back.
            wait_for_dv(dv_acc)
            # The products above have held the lanes together, which have read lse.
            DO.release(barriers, stage)
            Q.release(barriers, stage)
            ROWS.release(barriers, stage)
            stage, parity = Q.following(stage, parity)
            step, head, end = next_step(walk, step, head, end)
        finish(dv_acc, dv, accumulator_row(MMA_ROWS), shape.head_dim_v, mov_ctaid_x(), mask, shape)

    return own_dv


def _make_own_dk(config: Sm90BackwardDkDvConfig, traits: Traits, channels, walk_of):
    """own_dk(smem, barriers, given): dK of the block's keys, with the P of the other warpgroup."""
    OWNED, Q, DO, ROWS, P = channels
    tile_m, tile_n, dtype = config.tile_m, config.tile_n, traits.dtype
    n_tiles, n_dk = tile_m // 8, traits.head_dim // 2
    n_scores, n_packed = 4 * n_tiles, 2 * n_tiles
    q_of, do_of, v_of = (
        make_operand_of(matrix_of(config, traits, name)) for name in ("q", "do", "v")
    )
    offsets, p_words = config.smem_offsets(traits), _words_of_p(config, traits)
    delta_smem, p_smem = offsets["delta"], offsets["p"]
    begin_dp = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim_v)
    begin_dk = products.make_product_pn(dtype, tile_m, traits.head_dim)
    wait_for_dp, wait_for_dk = (make_wgmma_wait_group(0, n) for n in (n_scores, n_dk))
    count_steps, _, _ = make_steps_of_heads(traits, tile_m)
    pack, take = products.make_pack(dtype, n_tiles), make_take(n_tiles, traits)
    gradients, drop = make_gradients_by_column(n_tiles), make_drop(n_tiles, traits)
    _, take_kept = make_hand_over_kept(n_tiles, traits)
    n_kept = words_of_kept(n_tiles, traits)
    finish = make_finish(traits, walk_of, traits.head_dim)
    rows_before = tile_n

    @device_function
    def own_dk(smem, barriers, given):
        _, (dk, _), mask, shape, scores = given
        p_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        packed = cuda.local.array(n_packed, u32)
        kept = cuda.local.array(n_kept, u32)
        dk_acc = cuda.local.array(n_dk, f32)
        _, _, walk = walk_of(mov_ctaid_x(), mask, shape)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        num_steps = count_steps(walk)
        if num_steps > 0:
            # Hazard: products would read V while its bytes are still on their way.
            OWNED.wait(barriers, 0, u32(0))
        stage, parity = i32(0), u32(0)
        for _ in range(num_steps):
            start = mov_shared_address(smem, 0)
            v_all, q_now, do_now = v_of(start, 0), q_of(start, stage), do_of(start, stage)
            # dP^T = V dO^T
            # Hazard: dP would be made of a dO that has not arrived.
            DO.wait(barriers, stage, parity)
            begin_dp(dp_acc, v_all, do_now)
            # Hazard: P of this tile may not be there yet. Once it is, so is delta: lse came along.
            P.wait(barriers, stage, parity)
            p_now = i32(p_smem + p_words * stage)
            take(p_acc, smem, i32(p_now + handover_place()))
            take_kept(kept, smem, p_now)
            # Hazard: the product still writes dP.
            wait_for_dp(dp_acc)
            drop(dp_acc, kept)
            # dS = P * (softmax_scale dP - delta), dK += dS^T Q
            delta = delta_smem + tile_m * stage + mov_tid_x() % 4 * 4
            gradients(p_acc, dp_acc, smem, delta, scores.softmax_scale)
            pack(packed, dp_acc)
            # Hazard: dK would get a Q that has not arrived.
            Q.wait(barriers, stage, parity)
            begin_dk(dk_acc, packed, q_now)
            # Hazard: the product still reads dS, and Q, which is given back.
            wait_for_dk(dk_acc)
            # The products above have held the lanes together, which have read delta and P.
            Q.release(barriers, stage)
            DO.release(barriers, stage)
            ROWS.release(barriers, stage)
            stage, parity = Q.following(stage, parity)
        # The second warpgroup has the same rows as the first.
        row = accumulator_row(MMA_ROWS) - rows_before
        finish(dk_acc, dk, row, shape.head_dim, mov_ctaid_x(), mask, shape)

    return own_dk


def _words_of_p(config: Sm90BackwardDkDvConfig, traits: Traits) -> int:
    """Words of a buffer of P."""
    return config.tiles(traits)["p"] // config.num_stages
