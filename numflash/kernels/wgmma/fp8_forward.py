"""Forward on 8-bit floats on Hopper: O = softmax(softmax_scale Q K^T) V of e4m3 codes.

The walk is that of `forward`, the numerics are those of `kernels.mma.fp8_forward`: P is e4m3 in
units of its tile's largest score, and what a tile adds to O is multiplied by itself, into
accumulators `part_acc` of its own, and added in float32 with its weight. So it does not matter
that FP8 tensor cores are reported to add up with 14 bits, and the scales of V cost nothing.

e4m3 products read both operands along k, which for P V are the keys: V comes with tokens
innermost, in the order in which P leaves the accumulators. Results of more than 128 columns are
added in parts of 64. A tile of keys has one scale of K and one of V; where they change within,
`kernels.mma.fp8_forward` runs.

A tile of 128 keys costs a warpgroup, at head_dim 128 with overlap and pingpong, 512 clocks of the
tensor cores (8 QGMMA), 528 of the special-function units (66 exponentials, two of them for the
weights) and 501 instructions of each scheduler, 64 FFMA of them to add the tile's share to O: what
16 bits leave free is about used up. No GPU has timed it yet.

Source: FlashAttention-3, arXiv 2407.08608, section 3.3.
"""

from numflash.configs.traits import Traits
from numflash.configs.wgmma import WARPGROUP_ROWS, Sm90Fp8ForwardConfig
from numflash.kernels.arguments import Descales, Layout, Mask, Part, Pointer, Scores, Shape
from numflash.kernels.kernel import Kernel
from numflash.kernels.wgmma.finish import make_finish
from numflash.kernels.wgmma.producer import make_produce
from numflash.kernels.wgmma.ring import (
    Ring,
    make_init_barriers,
    make_next_stage,
    make_pass_by,
    make_register_exchange,
)
from numflash.ptx import (
    TensorMap,
    cp_async_bulk_wait_group_read,
    cuda,
    device_function,
    elect_sync,
    f32,
    i32,
    make_wgmma_wait_group,
    mbarrier_arrive,
    mbarrier_wait_parity,
    mov_shared_address,
    mov_tid_x,
    u16,
    u32,
    u64,
)
from numflash.tiles.blocks import (
    first_of_head,
    grid_of,
    make_block_place,
    make_keys_of,
    make_keys_of_part,
    make_walk,
    make_whole_keys,
    next_place,
    sequence_of,
    token_of_row,
)
from numflash.tiles.mma.fp8_operands import scale_of_key
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_mask_scores, make_scale_scores
from numflash.tiles.mma.softmax import make_scale_rows
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import make_slope_of
from numflash.tiles.wgmma.fp8 import begin_rows, make_add_part, make_pack, make_tile_softmax
from numflash.tiles.wgmma.products import (
    SLAB_BYTES,
    make_operand,
    make_product_nt,
    make_product_pt,
)
from numflash.tiles.wgmma.turns import (
    group_of_thread,
    leads,
    make_giving_back,
    make_turns,
    softmax_before_wait,
)


def make_fp8_forward_kernel(config: Sm90Fp8ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    ring, tile_n = Ring.of(config, traits), config.tile_n
    tiles_per_stage = config.stage_n // tile_n
    last_of_stage = tiles_per_stage - 1
    num_groups, is_split, overlap = config.num_warpgroups, config.num_splits > 1, config.overlap
    num_consumers = 128 * num_groups
    n_tiles, o_tiles = tile_n // 8, traits.head_dim_v // 8
    n_scores, n_p, n_o = 4 * n_tiles, n_tiles, 4 * o_tiles
    part_columns = config.part_columns(traits)
    num_parts, n_part = traits.head_dim_v // part_columns, part_columns // 2
    n_cap_slopes = n_scores if traits.softcap else 1
    bends, slope_of = traits.softcap or traits.alibi, make_slope_of(traits.alibi)
    out_storage = f32 if is_split else u16

    q_smem, k_smem, v_smem = ring.q, ring.k, ring.v
    # Operands count in units of 16 bytes.
    q_step, k_step, v_step = ring.q_words >> 2, ring.k_words >> 2, ring.v_words >> 2
    part_step = part_columns * SLAB_BYTES >> 4
    k_tile_step, v_tile_step = tile_n * SLAB_BYTES >> 4, tile_n >> 4
    q_full, q_empty = ring.q_full, ring.q_empty
    k_full, k_empty, v_full, v_empty = ring.k_full, ring.k_empty, ring.v_full, ring.v_empty
    o_replaces_q = ring.o_replaces_q

    init_barriers = make_init_barriers(ring, num_groups, config.num_stages)
    next_stage = make_next_stage(config.num_stages)
    give_registers, take_registers = make_register_exchange(config)
    produce, finish = make_produce(config, traits), make_finish(config, traits)
    walk, block_place = make_walk(config.tile_m), make_block_place(config.tile_m)
    keys_of, keys_of_part = make_keys_of(config), make_keys_of_part(config, WARPGROUP_ROWS)
    whole_keys = make_whole_keys(tile_n, WARPGROUP_ROWS)
    take_turn, pass_turn, give_first_turn = make_turns(num_groups if config.pingpong else 1)
    pass_by = make_pass_by(ring, config.num_stages, take_turn, pass_turn, tiles_per_stage)
    gives_back, gather = make_giving_back(ring.arrivals)

    operand = make_operand(0)
    begin_q_k = make_product_nt("e4m3", WARPGROUP_ROWS, config.stage_n, tile_n, traits.head_dim)
    begin_p_v = make_product_pt(tile_n, part_columns, traits.head_dim_v)
    wait_for_s, wait_for_next_s = (make_wgmma_wait_group(i, n_scores) for i in range(2))
    wait_for_part = make_wgmma_wait_group(0, n_part)
    add_part = make_add_part(part_columns // 8)
    scale_s_rows, scale_rows = make_scale_rows(1, n_tiles), make_scale_rows(1, o_tiles)
    scale_scores = make_scale_scores(1, n_tiles, traits.softcap, traits.alibi)
    mask_scores = make_mask_scores(1, n_tiles)
    tile_softmax, pack_p = make_tile_softmax(n_tiles), make_pack(n_tiles)

    @device_function
    def k_of(k_first, stage, tile):
        """Operand K of one of the tiles of a stage."""
        return u32(k_first + stage * k_step + tile * k_tile_step)

    @device_function
    def v_of(v_first, stage, tile):
        """Operand V of one of the tiles of a stage."""
        return u32(v_first + stage * v_step + tile * v_tile_step)

    @device_function
    def key_of_scales(n_start, seqlen_k):
        """A key whose scales are those of a tile; the last tile of a stage may be beyond all."""
        if last_of_stage:
            return i32(min(n_start, seqlen_k - 1))
        return n_start

    @device_function
    def q_of_group(q_first):
        """Operand Q of this warpgroup, computed anew: its many steps would be kept otherwise."""
        return u32(q_first + group_of_thread() * q_step)

    @device_function
    def add_tile(o_acc, part_acc, p_frag, v_operand, weights):
        """O += weights * (P V), begun and waited for."""
        for part in range(num_parts):
            begin_p_v(part_acc, p_frag, u32(v_operand + part * part_step))
            wait_for_part(part_acc)
            add_part(o_acc, n_part * part, part_acc, weights)

    @device_function
    def shape_scores(s_acc, cap_slopes, scales, m_start, n_start, whole, edges, scores, slope):
        """Softcap, ALiBi, and the mask where an edge crosses the tile."""
        end, mask, pack = edges
        if bends:
            scale_s_rows(s_acc, scales)
            i = i32(m_start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            unscaled = Scores(f32(1), scores.softcap, scores.softmax_scale, scores.alibi)
            scale_scores(s_acc, cap_slopes, i, j, scores.alibi.shift, unscaled, slope)
            scales[0], scales[1] = LOG2_E, LOG2_E
        if n_start < whole[0] or n_start > whole[1]:
            i = i32(m_start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            mask_scores(s_acc, i, j, end, mask, pack)

    def forward(
        out: Part[out_storage],
        lse: Pointer(f32),
        descales: Descales,
        q_map: TensorMap,
        k_map: TensorMap,
        v_map: TensorMap,
        out_map: TensorMap,
        mask: Mask,
        shape: Shape,
        layout: Layout,
        scores: Scores,
    ):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(0, u64, alignment=1024)
        init_barriers(barriers)
        cuda.syncthreads()

        grid = grid_of(shape, layout)
        band = sequence_of(shape, mask)
        places = walk(grid)
        if mov_tid_x() >= num_consumers:
            give_registers()
            if mov_tid_x() < num_consumers + 32 and elect_sync() != 0:
                maps = q_map, k_map, v_map
                produce(smem, barriers, maps, places, grid, band, shape)
            return

        take_registers()
        s_acc = cuda.local.array(n_scores, f32)
        p_frag = cuda.local.array(n_p, u32)
        part_acc = cuda.local.array(n_part, f32)
        o_acc = cuda.local.array(n_o, f32)
        cap_slopes = cuda.local.array(n_cap_slopes, f32)
        row_max = cuda.local.array(2, f32)
        row_sum = cuda.local.array(2, f32)
        limits = cuda.local.array(2, f32)
        units = cuda.local.array(2, f32)
        rows = row_max, row_sum, limits, units
        q_scales = cuda.local.array(2, f32)
        scales = cuda.local.array(2, f32)
        factors = cuda.local.array(2, f32)
        weights = cuda.local.array(2, f32)
        next_weights = cuda.local.array(2, f32)
        group = group_of_thread()
        q_first = operand(mov_shared_address(smem, q_smem))
        k_first = operand(mov_shared_address(smem, k_smem))
        v_first = operand(mov_shared_address(smem, v_smem))
        results = out, lse, out_map
        give_first_turn(group)

        place, step, num_places = places
        stage, parity, q_parity = i32(0), u32(0), u32(0)
        while place < num_places:
            m_start, head_of_batch, split = block_place(place, grid)
            n_begin, n_end = keys_of(m_start, split, grid, band)
            # Of those stages of keys the ones that this warpgroup's rows see, and see whole.
            row = i32(m_start + WARPGROUP_ROWS * group)
            first, end = keys_of_part(row, n_begin, n_end, grid, band)
            whole = whole_keys(row, grid, band)
            batch = token_of_row(head_of_batch, shape.num_heads_q)
            head = i32(head_of_batch - batch * shape.num_heads_q)
            head_kv = token_of_row(head, shape.group_size)
            k_scales = first_of_head(descales.k, batch, head_kv)
            v_scales = first_of_head(descales.v, batch, head_kv)
            slope = slope_of(scores.alibi, batch, head)
            base = first_of_head(descales.q, batch, token_of_row(head, descales.q.group))
            for r in range(2):
                # Beyond the last row any will do.
                i = m_start + accumulator_row(MMA_ROWS) + ROW_STEP * r
                i = i32(min(i, grid[0] - 1))
                token = token_of_row(i, layout.pack)
                offset = base + (i - token * layout.pack) * descales.q.packed
                q_scales[r] = descales.q.data[offset + (token >> descales.q.shift)] * scores.scale
                # To base 2, unless S is bent before.
                if not bends:
                    q_scales[r] *= LOG2_E
            edges = shape.seqlen_k, mask, layout.pack
            for i in range(n_o):
                o_acc[i] = f32(0)
            begin_rows(rows)
            mbarrier_wait_parity(barriers, q_full + group, q_parity)
            q_parity = u32(q_parity ^ u32(1))

            stage, parity = pass_by(barriers, group, n_begin, first, stage, parity)
            if first < end:
                # The first tile of keys: S = Q K^T, P = softmax(S).
                n_start = i32(first * tiles_per_stage * tile_n)
                key = key_of_scales(n_start, shape.seqlen_k)
                k_scale = scale_of_key(descales.k, k_scales, key)
                v_scale = scale_of_key(descales.v, v_scales, key)
                take_turn(group)
                mbarrier_wait_parity(barriers, k_full + stage, parity)
                tile = i32(0)
                begin_q_k(s_acc, q_of_group(q_first), k_of(k_first, stage, tile))
                pass_turn(group)
                wait_for_s(s_acc)
                if tile == last_of_stage and gives_back():
                    mbarrier_arrive(barriers, k_empty + stage)
                scales[0], scales[1] = q_scales[0] * k_scale, q_scales[1] * k_scale
                shape_scores(
                    s_acc, cap_slopes, scales, m_start, n_start, whole, edges, scores, slope
                )
                tile_softmax(s_acc, rows, factors, scales, weights)
                weights[0] *= v_scale
                weights[1] *= v_scale
                pack_p(p_frag, s_acc)

                for n in range(first * tiles_per_stage + 1, end * tiles_per_stage):
                    # S = Q K^T of this tile of keys, O += weights * (P V) of the one before.
                    v_stage, v_parity, v_tile = stage, parity, tile
                    if tile == last_of_stage:
                        tile = i32(0)
                        stage, parity = next_stage(stage, parity)
                    else:
                        tile = i32(tile + 1)
                    n_start = i32(n * tile_n)
                    key = key_of_scales(n_start, shape.seqlen_k)
                    k_scale = scale_of_key(descales.k, k_scales, key)
                    v_scale = scale_of_key(descales.v, v_scales, key)
                    take_turn(group)
                    if overlap:
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(s_acc, q_of_group(q_first), k_of(k_first, stage, tile))
                    mbarrier_wait_parity(barriers, v_full + v_stage, v_parity)
                    if overlap:
                        begin_p_v(part_acc, p_frag, v_of(v_first, v_stage, v_tile))
                        pass_turn(group)
                        wait_for_next_s(s_acc)
                    else:
                        v_operand = v_of(v_first, v_stage, v_tile)
                        add_tile(o_acc, part_acc, p_frag, v_operand, weights)
                        if v_tile == last_of_stage and gives_back():
                            mbarrier_arrive(barriers, v_empty + v_stage)
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(s_acc, q_of_group(q_first), k_of(k_first, stage, tile))
                        pass_turn(group)
                        wait_for_s(s_acc)
                    if tile == last_of_stage and gives_back():
                        mbarrier_arrive(barriers, k_empty + stage)

                    # P = softmax(S)
                    scales[0], scales[1] = q_scales[0] * k_scale, q_scales[1] * k_scale
                    shape_scores(
                        s_acc, cap_slopes, scales, m_start, n_start, whole, edges, scores, slope
                    )
                    has_grown = tile_softmax(s_acc, rows, factors, scales, next_weights)
                    if overlap:
                        softmax_before_wait(smem, 0, row_sum[0], row_sum[1])
                        wait_for_part(part_acc)
                        if gives_back():
                            mbarrier_arrive(barriers, v_empty + v_stage)
                        add_part(o_acc, 0, part_acc, weights)
                    if has_grown:
                        scale_rows(o_acc, factors)
                    weights[0], weights[1] = next_weights[0] * v_scale, next_weights[1] * v_scale
                    pack_p(p_frag, s_acc)

                mbarrier_wait_parity(barriers, v_full + stage, parity)
                add_tile(o_acc, part_acc, p_frag, v_of(v_first, stage, tile), weights)
                if gives_back():
                    mbarrier_arrive(barriers, v_empty + stage)
                stage, parity = next_stage(stage, parity)
            else:
                # No product has held threads together: one may not have seen Q yet.
                gather(group)

            # Where this tile of rows lies is found out once more: registers are scarce above.
            m_start, _, split = block_place(place, grid)
            n_begin, n_end = keys_of(m_start, split, grid, band)
            stage, parity = pass_by(barriers, group, end, n_end, stage, parity)
            if not o_replaces_q and gives_back():
                mbarrier_arrive(barriers, q_empty + group)
            finish(
                o_acc,
                row_max,
                row_sum,
                f32(1),
                smem,
                results,
                place,
                grid,
                shape,
            )
            if o_replaces_q and leads():
                # Q has been read, and so has O, which took its place.
                cp_async_bulk_wait_group_read()
                mbarrier_arrive(barriers, q_empty + group)
            place, step = next_place(place, step)
        if leads():
            cp_async_bulk_wait_group_read()

    return Kernel(config.family, forward, config.num_threads, config.smem_bytes(traits))
