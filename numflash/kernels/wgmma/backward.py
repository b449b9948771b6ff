"""Backward on Hopper in one kernel: dK, dV and dQ from five products a tile, not seven.

A block owns tile_n rows of K and V, 64 to a warpgroup, and walks over Q and dO in tiles of tile_m,
as `backward_dkdv` does. A warpgroup holds dS^T of its 64 keys in registers. It also stores it to
shared memory, transposed: there dS is operand A of dQ = dS K. Warpgroups share dQ of a tile by its
columns (with tile_m 64, where each gets whole slabs of head_dim), or by its queries (64 for each).
Where neither is possible the first warpgroup computes all of dQ, in a loop of its own.

dQ is a sum over all blocks of keys, in float32 in global memory. A warpgroup leaves its part in
shared memory, in the order of its registers. One thread (`add_dq`) adds the tile by a bulk
reduction when it is the block's turn (`tiles.wgmma.turns_of_blocks`). The first block of a tile
stores it instead, so the sums need not be zero before. Sums have the same bits in every run.
`reduce_dq` makes dQ of them.

All of a tile's other work lies under a product of its own warpgroup:

    S^T = K Q^T          beside it dQ of the tile before goes to shared memory
    dP^T = V dO^T        P from S
    dV += P^T dO         dS from P and dP; its transpose goes to shared memory
    dK += dS^T Q         all warpgroups meet: dS is complete
    dQ = dS K

The main loop in machine code, a warpgroup and a tile (bfloat16, head_dim 128, 64 x 128):

     32 HGMMA            S^T, dP^T, dV, dK and this warpgroup's half of dQ: 1280 clocks
     32 MUFU, FFMA       P from S and lse; 8 LDS for lse and delta
     32 FFMA, FMUL       dS from P, dP and delta; 32 F2FP
      4 STSM, 8 STS      dS transposed, and dQ of the tile before
    182 others           descriptors of products most of all; 394 in all

At head_dim 64, in tiles of 64 x 192, the warpgroup with dQ issues 377 for 896 clocks, each of the
other two 296 for 512.

Tiles may be those of lists: of sequences with lengths of their own, or of a block mask.

A block has one tile of keys, or with `-persistent` draws one after another (`places`), and fetches
the next K, V, Q and dO while it stores dK and dV.

No wait is part of a circle. `add_dq` waits for dQ of its own block, and for the turns of blocks
that began before it, or of places that were drawn before. Warpgroups wait until `add_dq` has read
the tile before, or with two buffers of dQ the one before that. The warps that fetch wait only for
warpgroups; who draws the next place waits until `add_dq` is at this one.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 2; FlashAttention-3, arXiv 2407.08608.
"""

from numflash.configs import WARPGROUP_ROWS, Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.kernels.arguments import (
    Pointer,
    Statistics,
    Tensor,
    scores_of,
    turns_mask_of,
    turns_shape_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.queries import make_steps_of_heads
from numflash.kernels.wgmma.add_dq import make_add_dq, make_dq_buffer
from numflash.kernels.wgmma.channels import make_channel
from numflash.kernels.wgmma.gradient_ring import (
    channels_of,
    make_operand_of,
    make_run_block,
    matrix_of,
)
from numflash.kernels.wgmma.places import make_drawn_places, make_each, make_own_places
from numflash.kernels.wgmma.queries import make_assist, make_finish, make_produce, make_walk_of
from numflash.ptx import TensorMap, cuda, device_function, f32, i32, mov_tid_x, u32
from numflash.ptx.barriers import bar_sync
from numflash.ptx.memory import mov_shared_address, st_shared_v4_f32
from numflash.ptx.warpgroups import fence_proxy_async
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import features, steps
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import MMA_ROWS, accumulator_row
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.sequences import (
    Whole,
    last_of,
    seen_from_keys,
    tiles_seen_whole,
)
from numflash.tiles.unrolled import make_unrolled
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
from numflash.tiles.wgmma.transposition import make_place_in_slabs, make_store_transposed
from numflash.tiles.wgmma.turns import WARPGROUP, group_of_thread
from numflash.tiles.wgmma.turns_of_blocks import make_place_of_last_keys

# The named barrier at which all warpgroups meet when dS of a tile is complete.
_COMPLETE = 1


def make_backward_kernel(config: Sm90BackwardConfig, traits: Traits) -> Kernel:
    """The backward kernel for one config; see the module's docstring."""
    out_storage = f32 if traits.float32_out else MMA_ELEMENTS["sm80", traits.dtype].storage
    channels = _channels_of(config, traits)
    walk_of = make_walk_of(config, traits, make_place_of_last_keys(config.tile_n, traits))
    places = make_own_places(traits)
    if config.persistent:
        places = make_drawn_places(config, traits, _end_of(channels[-1]))
    of_walk = channels[:4], walk_of, places
    run_block = make_run_block(
        config,
        (*channels, places.channel),
        make_produce(config, traits, *of_walk),
        make_assist(config, traits, *of_walk),
        _make_consume(config, traits, channels, walk_of, places),
        make_add_dq(config, traits, channels[4], walk_of, places),
        registers=config.registers_of(traits),
    )

    def backward(
        q_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim)
        k_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim)
        v_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim_v)
        do_map: TensorMap,  # (batch, num_heads_q, seqlen_q, head_dim_v)
        statistics_log2: Statistics,  # both (batch, num_heads_q, seqlen_q)
        dk: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        dv: Tensor[out_storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        dq_sums: Pointer(f32),  # (batch, num_heads_q, tiles of queries, tile_m * head_dim)
        turns: Pointer(u32),  # the places drawn; (batch, num_heads_q, tiles of queries); all 0
        mask: turns_mask_of(traits),
        shape: turns_shape_of(traits),
        scores: scores_of(traits.program),
    ):
        if places.is_idle(shape):
            return
        results = dk, dv, dq_sums, turns
        given = statistics_log2, results, mask, shape, scores
        run_block((q_map, k_map, v_map, do_map), given)

    return Kernel(config.family, backward, config.num_threads, config.smem_bytes(traits))


def _channels_of(config: Sm90BackwardConfig, traits: Traits):
    """OWNED, Q, DO, ROWS, and DQ, which warpgroups fill and one thread empties."""
    of_rows, buffers = channels_of(config, traits, 3), config.dq_buffers(traits)
    first = of_rows[-1].empty + config.num_stages
    writers = 4 * config.dq_groups(traits)
    return *of_rows, make_channel(first, first + buffers, buffers, 1, 1, writers)


def _end_of(channel) -> int:
    """The first mbarrier behind those of a channel, whose buffers are as many as `empty` says."""
    return 2 * channel.empty - channel.full


def _make_consume(config: Sm90BackwardConfig, traits: Traits, channels, walk_of, places):
    """consume(smem, barriers, given): dK and dV of this warpgroup's 64 rows, and its dQ."""
    OWNED, tile_m, tile_n = channels[0], config.tile_m, config.tile_n
    n_scores, n_packed = tile_m // 2, tile_m // 4
    n_dk, n_dv = traits.head_dim // 2, traits.head_dim_v // 2
    n_dq = config.dq_columns(traits) // 2
    n_slopes, n_kept = n_scores if traits.bends_scores else 1, words_of_kept(tile_m // 8, traits)
    count_steps, _, _ = make_steps_of_heads(traits, tile_m)
    all_add = config.dq_groups(traits) == config.num_warpgroups
    tiles_with, tiles_without = (
        _make_tiles(config, traits, channels, places, x) for x in (True, False)
    )
    place_in_ds = make_place_in_slabs(tile_m)
    finish_dk = make_finish(traits, walk_of, traits.head_dim)
    finish_dv = make_finish(traits, walk_of, traits.head_dim_v)

    @device_function
    def consume_place(smem, barriers, work, drawn, turn, at):
        (_, (dk, dv, _, _), mask, shape, scores), arrays = work
        dk_acc, dv_acc = arrays[6:8]
        place, sequence, walk = walk_of(drawn, mask, shape)
        last_key = last_of(place.start, tile_n, sequence.seqlen_k)
        from_keys = seen_from_keys(sequence)
        whole = tiles_seen_whole(place.start, last_key, tile_m, from_keys)
        if place.start + tile_n > sequence.seqlen_k:
            # Rows of K past the end are zeros, whose P may be infinite: every tile is masked.
            whole = Whole(whole.first, i32(-1))
        keys = OwnedKeys(place.start, whole, sequence, from_keys)
        owned = keys, place.batch, mask, place_in_ds()
        for i in range(n_dk):
            dk_acc[i] = f32(0)
        for i in range(n_dv):
            dv_acc[i] = f32(0)
        if count_steps(walk) > 0:
            # Hazard: products would read K and V while their bytes are still on their way.
            OWNED.wait(barriers, 0, turn)
            if all_add or group_of_thread() == 0:
                at, drawn, turn = tiles_with(arrays, smem, barriers, owned, at, walk, scores)
            else:
                at, drawn, turn = tiles_without(arrays, smem, barriers, owned, at, walk, scores)
        else:
            places.give_back(barriers)
        row = accumulator_row(MMA_ROWS)
        finish_dv(dv_acc, dv, row, shape.head_dim_v, drawn, mask, shape)
        finish_dk(dk_acc, dk, row, shape.head_dim, drawn, mask, shape)
        return at, turn

    consume_places = make_each(places, consume_place)

    @device_function
    def consume(smem, barriers, given):
        s_acc = cuda.local.array(n_scores, f32)
        dp_acc = cuda.local.array(n_scores, f32)
        slopes = cuda.local.array(n_slopes, f32)
        p_packed = cuda.local.array(n_packed, u32)
        ds_packed = cuda.local.array(n_packed, u32)
        dk_acc = cuda.local.array(n_dk, f32)
        dv_acc = cuda.local.array(n_dv, f32)
        dq_acc = cuda.local.array(n_dq, f32)
        kept = cuda.local.array(n_kept, u32)
        arrays = s_acc, dp_acc, slopes, p_packed, ds_packed, kept, dk_acc, dv_acc, dq_acc
        consume_places(smem, barriers, (given, arrays), (i32(0), i32(0), u32(0)))

    return consume


def _make_tiles(config: Sm90BackwardConfig, traits: Traits, channels, places, adds: bool):
    """tiles(arrays, smem, barriers, owned, at, walk, scores): all tiles of a place, at least one.

    `at` is that of the first tile, as in `_make_tile`. The result is that of the next place's,
    and this place's number and turn, which is given back.
    """
    Q = channels[1]
    count_steps, first_step, next_step = make_steps_of_heads(traits, config.tile_m)
    # The first tile has no dQ before it. With a branch on that in the loop, or with one on the
    # warpgroup, the assembler would wait for each product by itself.
    first_tile, next_tile = (_make_tile(config, traits, channels, adds, x) for x in (True, False))
    leave_dq = _make_leave_dq(config, traits, channels)

    @device_function
    def tiles(arrays, smem, barriers, owned, at, walk, scores):
        number, stage, parity = at
        step, head, end = first_step(walk)
        after = i32(number + count_steps(walk))
        first_tile(arrays, smem, barriers, owned, at, step, head, scores)
        number = i32(number + 1)
        stage, parity = Q.following(stage, parity)
        while number < after:
            step, head, end = next_step(walk, step, head, end)
            at = number, stage, parity
            next_tile(arrays, smem, barriers, owned, at, step, head, scores)
            stage, parity = Q.following(stage, parity)
            number = i32(number + 1)
        # Read again, so that no register keeps them through the walk.
        drawn, turn = places.number_of(smem), places.turn_of(smem)
        # Hazard: products must have read K and V: the next come while dK and dV are stored.
        places.give_back(barriers)
        if adds:
            dq_acc = arrays[-1]
            leave_dq(dq_acc, smem, barriers, i32(after - 1))
        return (number, stage, parity), drawn, turn

    return tiles


def _make_leave_dq(config: Sm90BackwardConfig, traits: Traits, channels):
    """leave_dq(dq_acc, smem, barriers, number): write dQ of a tile to a buffer, for `add_dq`."""
    DQ, words, n_dq = channels[4], config.tile_m * traits.head_dim, config.dq_columns(traits) // 2
    dq_smem, part = config.smem_offsets(traits)["dq"], WARPGROUP * n_dq
    dq_buffer = make_dq_buffer(config.dq_buffers(traits))

    @device_function
    def store_step(step, dq_acc, smem, first):
        st_shared_v4_f32(smem, first + 4 * WARPGROUP * step, dq_acc)

    store_steps = make_unrolled(store_step, n_dq // 4, 4)

    @device_function
    def leave_dq(dq_acc, smem, barriers, number):
        buffer, parity = dq_buffer(number)
        # Hazard: this dQ would overwrite one that a bulk copy still reads.
        DQ.claim(barriers, buffer, u32(parity ^ u32(1)))
        # Computed again in each tile: kept, it would be counted up with the buffers.
        mine = mov_tid_x() // WARPGROUP * part + mov_tid_x() % WARPGROUP * 4
        store_steps(0, dq_acc, smem, i32(dq_smem + buffer * words + mine))
        # Hazard: the bulk copy would not see these writes.
        fence_proxy_async()
        # Hazard: `add_dq` would wait for this dQ for ever.
        DQ.filled(barriers, buffer)

    return leave_dq


def _make_tile(config: Sm90BackwardConfig, traits: Traits, channels, adds: bool, is_first: bool):
    """tile(arrays, smem, barriers, owned, at, step, head, scores): the work on a tile of queries.

    `adds` says that this warpgroup computes dQ, `is_first` that no tile was before. `owned` are
    the block's `OwnedKeys`, its batch entry, the mask, and this thread's word in a buffer of dS;
    `at` are the tile's number, its stage and the parity of the stage's phase.
    """
    _, Q, DO, ROWS, _ = channels
    tile_m, tile_n, dtype = config.tile_m, config.tile_n, traits.dtype
    n_tiles, n_scores = tile_m // 8, tile_m // 2
    n_dk, n_dv = traits.head_dim // 2, traits.head_dim_v // 2
    dq_columns = config.dq_columns(traits)
    q_of, do_of, k_of, v_of = (
        make_operand_of(matrix_of(config, traits, name)) for name in ("q", "do", "k", "v")
    )
    offsets = config.smem_offsets(traits)
    lse_smem, delta_smem, ds_smem = offsets["lse"], offsets["delta"], offsets["ds"]
    ds_words, num_consumers = config.tiles(traits)["ds"] // 2, 32 * config.num_warps
    ds_step, group_step = ds_words >> 2, WARPGROUP_ROWS * SLAB_BYTES >> 4
    ds_of = products.make_operand(tile_m * SLAB_BYTES, ds_smem)
    # Two stages come in turn as the two buffers of dS do.
    alternates = config.num_stages == 2
    # From one warpgroup's dQ to the next one's in dS and in K; a single warpgroup is the first.
    by_queries = tile_m > WARPGROUP_ROWS
    ds_part = group_step if by_queries else 0
    k_step = 0 if by_queries else dq_columns // WARPGROUP_ROWS * (tile_n * SLAB_BYTES >> 4)
    begin_s = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim)
    begin_dp = products.make_product_nt(dtype, tile_n, tile_m, tile_m, traits.head_dim_v)
    begin_dv = products.make_product_pn(dtype, tile_m, traits.head_dim_v)
    begin_dk = products.make_product_pn(dtype, tile_m, traits.head_dim)
    begin_dq = products.make_product_kn(dtype, tile_m, tile_n, dq_columns)
    wait_for_s = wait_for_dp = make_wgmma_wait_group(1, n_scores)
    wait_for_dv = make_wgmma_wait_group(2 if adds else 1, n_dv)
    wait_for_dk = make_wgmma_wait_group(1 if adds else 0, n_dk)
    wait_for_dq = make_wgmma_wait_group(0, dq_columns // 2)
    draw, drops = make_draw_by_column(tile_m, traits), traits.drops_weights
    shape_scores = make_shape_scores_by_column(tile_m, traits, masks_keys=True)
    pack, pack_kept = products.make_pack(dtype, n_tiles), make_pack_kept(dtype, n_tiles, traits)
    # Statistics of 16 queries at once take two registers more.
    halves = tile_m > WARPGROUP_ROWS or traits.bends_scores
    probabilities = make_probabilities_by_column(n_tiles, halves)
    gradients = make_gradients_by_column(n_tiles, halves)
    bend, drop = make_bend(n_tiles, traits), make_drop(n_tiles, traits)
    store_ds = make_store_transposed(tile_m)
    leave_dq = _make_leave_dq(config, traits, channels)
    args_of_head, place_in_ds = features.make_args_of_head(traits), make_place_in_slabs(tile_m)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    bends, leaves_dq = traits.shapes_scores, adds and not is_first

    @device_function
    def tile(arrays, smem, barriers, owned, at, step, head, scores):
        s_acc, dp_acc, slopes, p_packed, ds_packed, kept, dk_acc, dv_acc, dq_acc = arrays
        keys, batch, mask, ds_place = owned
        number, stage, parity = at
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        # Computed again in each tile: kept, descriptors would take registers.
        group = group_of_thread()
        start = mov_shared_address(smem, 0)
        k_mine = products.advance(k_of(start, 0), group, group_step)
        v_mine = products.advance(v_of(start, 0), group, group_step)
        q_now, do_now = q_of(start, stage), do_of(start, stage)
        own = tile_m * stage + mov_tid_x() % 4 * 4
        # S^T = K Q^T
        # Hazard: S would be made of a Q that has not arrived.
        Q.wait(barriers, stage, parity)
        begin_s(s_acc, k_mine, q_now)
        if leaves_dq:
            leave_dq(dq_acc, smem, barriers, i32(number - 1))
        # dP^T = V dO^T
        # Hazard: dP would be made of a dO that has not arrived.
        DO.wait(barriers, stage, parity)
        begin_dp(dp_acc, v_mine, do_now)
        m_tile, is_full = tile_at(mask, step)
        m_start, args = i32(m_tile * tile_m), args_of_head(scores, batch, head)
        draw(kept, keys, m_start, args.drawn)
        # Hazard: lse and delta of this tile may not be there yet.
        ROWS.wait(barriers, stage, parity)
        # Hazard: the product still writes S.
        wait_for_s(s_acc)
        shape_scores(s_acc, slopes, keys, m_start, is_full, scores, args)
        # dV += P^T dO
        probabilities(s_acc, smem, lse_smem + own, scale_log2)
        pack_kept(p_packed, s_acc, kept)
        begin_dv(dv_acc, p_packed, do_now)
        # dS = P * (softmax_scale dP - delta), dK += dS^T Q
        bend(s_acc, slopes)
        # Hazard: the product still writes dP.
        wait_for_dp(dp_acc)
        drop(dp_acc, kept)
        gradients(s_acc, dp_acc, smem, delta_smem + own, scores.softmax_scale)
        pack(ds_packed, dp_acc)
        ds_now = stage if alternates else number & 1
        if drops:
            # Computed again with dropout: registers are scarce.
            ds_place = place_in_ds()
        store_ds(ds_packed, smem, ds_smem + ds_now * ds_words + ds_place)
        # Hazard: products would not see these writes.
        fence_proxy_async()
        begin_dk(dk_acc, ds_packed, q_now)
        # Hazard: dQ would be computed of a dS that another warpgroup has not written yet.
        bar_sync(_COMPLETE, num_consumers)
        if adds:
            # dQ = dS K
            ds = products.advance(ds_of(start), ds_now, ds_step)
            k_part = products.advance(k_of(start, 0), group, k_step)
            begin_dq(dq_acc, products.advance(ds, group, ds_part), k_part)
        # Hazard: the product still reads P, and dO, which is given back.
        wait_for_dv(dv_acc)
        DO.release(barriers, stage)
        # Hazard: the product still reads dS, and Q, which is given back.
        wait_for_dk(dk_acc)
        Q.release(barriers, stage)
        # The products above have held the lanes together, which have read both statistics.
        ROWS.release(barriers, stage)
        if adds:
            # Hazard: the product still writes dQ, which the next tile leaves in shared memory.
            wait_for_dq(dq_acc)

    return tile
