"""Backward for K and V on Hopper: dV = P^T dO and dK = dS^T Q.

A block owns tile_n rows of K and V, 64 to a warpgroup, and walks over Q and dO in tiles of tile_m,
for every query head of the group that shares the key-value head. One thread fetches them by bulk
copies, and warps beside it lse and delta. A warpgroup works on transposed tiles, S^T = K Q^T,
whose rows are its own keys: P^T and dS^T are operands A of dV and dK in registers, and a mask is
the same band seen from the other side. With `-roles` warpgroups multiply as in `roles`.

Each product is issued as soon as its operands are there, and all of a tile's other work lies under
one:

    S^T = K Q^T
    dP^T = V dO^T        meanwhile P from S, once S is there
    dV += P^T dO         meanwhile dS from P and dP
    dK += dS^T Q

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2; FlashAttention-3, arXiv 2407.08608.
"""

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardDkDvConfig
from numflash.kernels.arguments import Statistics, Tensor, mapped_shape_of, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.queries import make_steps_of_heads
from numflash.kernels.wgmma import roles
from numflash.kernels.wgmma.gradient_ring import (
    channels_of,
    make_operand_of,
    make_run_block,
    matrix_of,
)
from numflash.kernels.wgmma.places import make_own_places
from numflash.kernels.wgmma.queries import make_assist, make_finish, make_produce, make_walk_of
from numflash.ptx import TensorMap, cuda, device_function, f32, i32, mov_ctaid_x, mov_tid_x, u32
from numflash.ptx.memory import mov_shared_address
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import features, steps
from numflash.tiles.mma.elements import MMA_ELEMENTS
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
from numflash.tiles.wgmma.products import SLAB_BYTES
from numflash.tiles.wgmma.scores import (
    OwnedKeys,
    make_draw_by_column,
    make_shape_scores_by_column,
)
from numflash.tiles.wgmma.turns import group_of_thread


def make_backward_dkdv_kernel(config: Sm90BackwardDkDvConfig, traits: Traits) -> Kernel:
    """The dK and dV kernel for one config; see the module's docstring."""
    out_storage = f32 if traits.float32_out else MMA_ELEMENTS["sm80", traits.dtype].storage
    channels = channels_of(config, traits, 4 if config.roles else 3)
    walk_of, places = make_walk_of(config, traits), make_own_places(traits)
    make_consume = roles.make_consume if config.roles else _make_consume
    run_block = make_run_block(
        config,
        channels,
        make_produce(config, traits, channels, walk_of, places),
        make_assist(config, traits, channels, walk_of, places),
        make_consume(config, traits, channels, walk_of),
        registers=config.registers_of(traits),
    )

    def backward_dkdv(
        q_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim)
        k_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim)
        v_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim_v)
        do_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dk: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        dv: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        mask: mask_of(traits),
        shape: mapped_shape_of(traits),
        scores: scores_of(traits.program),
    ):
        if places.is_idle(shape):
            return
        given = statistics_log2, (dk, dv), mask, shape, scores
        run_block((q_map, k_map, v_map, do_map), given)

    return Kernel(config.family, backward_dkdv, config.num_threads, config.smem_bytes(traits))


def _make_consume(config: Sm90BackwardDkDvConfig, traits: Traits, channels, walk_of):
    """consume(smem, barriers, given): dK and dV of this warpgroup's 64 rows."""
    OWNED, Q, DO, ROWS = channels
    tile_m, tile_n, dtype = config.tile_m, config.tile_n, traits.dtype
    n_tiles, n_dk, n_dv = tile_m // 8, traits.head_dim // 2, traits.head_dim_v // 2
    n_scores, n_packed = 4 * n_tiles, 2 * n_tiles
    q_of, do_of, k_of, v_of = (
        make_operand_of(matrix_of(config, traits, name)) for name in ("q", "do", "k", "v")
    )
    offsets = config.smem_offsets(traits)
    lse_smem, delta_smem = offsets["lse"], offsets["delta"]
    # Operands count in units of 16 bytes.
    group_step = WARPGROUP_ROWS * SLAB_BYTES >> 4
    begin_s = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim)
    begin_dp = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim_v)
    begin_dv = products.make_product_pn(dtype, tile_m, traits.head_dim_v)
    begin_dk = products.make_product_pn(dtype, tile_m, traits.head_dim)
    wait_for_s = wait_for_dp = make_wgmma_wait_group(1, n_scores)
    wait_for_dv, wait_for_dk = make_wgmma_wait_group(1, n_dv), make_wgmma_wait_group(0, n_dk)
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    draw, shape_scores = (
        make_draw_by_column(tile_m, traits),
        make_shape_scores_by_column(tile_m, traits),
    )
    pack, pack_kept = products.make_pack(dtype, n_tiles), make_pack_kept(dtype, n_tiles, traits)
    probabilities, bend = make_probabilities_by_column(n_tiles), make_bend(n_tiles, traits)
    gradients, drop = make_gradients_by_column(n_tiles), make_drop(n_tiles, traits)
    n_kept = words_of_kept(n_tiles, traits)
    args_of_head = features.make_args_of_head(traits)
    finish_dk = make_finish(traits, walk_of, traits.head_dim)
    finish_dv = make_finish(traits, walk_of, traits.head_dim_v)
    bends, n_slopes = traits.shapes_scores, n_scores if traits.bends_scores else 1

    @device_function
    def consume(smem, barriers, given):
        _, (dk, dv), mask, shape, scores = given
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        p_packed = cuda.local.array(n_packed, u32)
        ds_packed = cuda.local.array(n_packed, u32)
        kept = cuda.local.array(n_kept, u32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        place, sequence, walk = walk_of(mov_ctaid_x(), mask, shape)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        from_keys = seen_from_keys(sequence)
        last_key = last_of(place.start, tile_n, sequence.seqlen_k)
        whole = tiles_seen_whole(place.start, last_key, tile_m, from_keys)
        keys = OwnedKeys(place.start, whole, sequence, from_keys)
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)
        step, head, end = first_step(walk)
        num_steps = count_steps(walk)
        if num_steps > 0:
            # Hazard: products would read K and V while their bytes are still on their way.
            OWNED.wait(barriers, 0, u32(0))
        stage, parity = i32(0), u32(0)
        for _ in range(num_steps):
            # Computed again in each tile: kept, descriptors would take registers.
            group, start = group_of_thread(), mov_shared_address(smem, 0)
            k_mine = products.advance(k_of(start, 0), group, group_step)
            v_mine = products.advance(v_of(start, 0), group, group_step)
            q_now = q_of(start, stage)
            do_now = do_of(start, stage)
            own = i32(tile_m * stage + mov_tid_x() % 4 * 4)
            # S^T = K Q^T, dP^T = V dO^T
            # Hazard: S would be made of a Q that has not arrived.
            Q.wait(barriers, stage, parity)
            begin_s(s_acc, k_mine, q_now)
            # Hazard: dP would be made of a dO that has not arrived.
            DO.wait(barriers, stage, parity)
            begin_dp(dp_acc, v_mine, do_now)
            tile, is_full = tile_at(mask, step)
            m_start, args = i32(tile * tile_m), args_of_head(scores, place.batch, head)
            draw(kept, keys, m_start, args.drawn)
            # Hazard: lse and delta of this tile may not be there yet.
            ROWS.wait(barriers, stage, parity)
            # Hazard: the product still writes S.
            wait_for_s(s_acc)
            shape_scores(s_acc, slopes, keys, m_start, is_full, scores, args)
            # dV += P^T dO
            probabilities(s_acc, smem, i32(lse_smem + own), scale_log2)
            pack_kept(p_packed, s_acc, kept)
            begin_dv(dv_acc, p_packed, do_now)
            # dS = P * (softmax_scale dP - delta), dK += dS^T Q
            bend(s_acc, slopes)
            # Hazard: the product still writes dP.
            wait_for_dp(dp_acc)
            drop(dp_acc, kept)
            gradients(s_acc, dp_acc, smem, i32(delta_smem + own), scores.softmax_scale)
            pack(ds_packed, dp_acc)
            begin_dk(dk_acc, ds_packed, q_now)
            # Hazard: the product still reads P, and dO, which is given back.
            wait_for_dv(dv_acc)
            DO.release(barriers, stage)
            # Hazard: the product still reads dS, and Q, which is given back.
            wait_for_dk(dk_acc)
            Q.release(barriers, stage)
            # The products above have held the lanes together, which have read both statistics.
            ROWS.release(barriers, stage)
            stage, parity = Q.following(stage, parity)
            step, head, end = next_step(walk, step, head, end)

        row = accumulator_row(MMA_ROWS)
        finish_dv(dv_acc, dv, row, shape.head_dim_v, mov_ctaid_x(), mask, shape)
        finish_dk(dk_acc, dk, row, shape.head_dim, mov_ctaid_x(), mask, shape)

    return consume
