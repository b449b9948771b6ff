"""Forward on Hopper: O = softmax(softmax_scale Q K^T) V and lse, by specialised warps.

One thread of a block, the producer, fetches tiles of Q, K and V by bulk copies. The consumers are
warpgroups with 64 rows of Q each, which multiply asynchronously: S = Q K^T from shared memory,
O += P V with P in registers. They meet at the mbarriers of a ring of buffers (`ring`).

A warpgroup keeps the tensor cores busy while it computes exponentials, in two ways that a config
switches on: with `overlap` it begins the next S and O += P V together, and turns S to P while the
latter is under way; with `pingpong` warpgroups take turns, so that one multiplies while another
computes its softmax.

The main loop in machine code, a warpgroup and a tile of 128 keys (bfloat16, head_dim 128, overlap
and pingpong; `numflash-inspect forward --arch sm_90a` shows it for any config):

     16 HGMMA         1024 clocks of the SM's tensor cores: 8 for S = Q K^T, 8 for O += P V
     64 MUFU          512 clocks, at 16 exponentials a clock: all of them beside O += P V
     64 FFMA          the exponents
     66 FMNMX, FADD   the row's maximum and sum; 4 SHFL across its four lanes
     32 F2FP          P to bfloat16
    111 others        descriptors of the products, barriers, the loop
     64 FMUL          O rescaled, only when a maximum has grown by 2 ** 8
    256 ISETP, FSEL   the mask, only on tiles that an edge crosses

Each scheduler issues 423 instructions in the 1024 clocks of a turn, so two warpgroups that
alternate leave the tensor cores no reason to wait. At head_dim 64 products and exponentials take
512 clocks each and 394 instructions are issued: three warpgroups share the SM then.

Source: FlashAttention-3, arXiv 2407.08608, Algorithms 1 and 2.
"""

from numflash.configs.traits import Traits
from numflash.configs.wgmma import WARPGROUP_ROWS, Sm90ForwardConfig
from numflash.kernels.arguments import Layout, Mask, Part, Pointer, Scores, Shape
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
from numflash.tiles.mma.fragments import MMA_ROWS, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_mask_scores, make_scale_scores
from numflash.tiles.mma.softmax import make_scale_rows
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import make_slope_of
from numflash.tiles.wgmma.products import (
    SLAB_BYTES,
    make_operand,
    make_pack,
    make_product_nt,
    make_product_pn,
)
from numflash.tiles.wgmma.softmax import begin_rows, make_online_softmax
from numflash.tiles.wgmma.turns import (
    group_of_thread,
    leads,
    make_giving_back,
    make_turns,
    softmax_before_wait,
)


def make_forward_kernel(config: Sm90ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    ring, dtype, tile_n = Ring.of(config, traits), traits.dtype, config.tile_n
    num_groups, is_split, overlap = config.num_warpgroups, config.num_splits > 1, config.overlap
    num_consumers = 128 * num_groups
    n_tiles, o_tiles = tile_n // 8, traits.head_dim_v // 8
    n_scores, n_p, n_o = 4 * n_tiles, 2 * n_tiles, 4 * o_tiles
    n_cap_slopes = n_scores if traits.softcap else 1
    bends, slope_of = traits.softcap or traits.alibi, make_slope_of(traits.alibi)
    out_storage = f32 if is_split else u16

    q_smem, k_smem, v_smem = ring.q, ring.k, ring.v
    # Operands count in units of 16 bytes.
    q_step, k_step, v_step = ring.q_words >> 2, ring.k_words >> 2, ring.v_words >> 2
    q_full, q_empty = ring.q_full, ring.q_empty
    k_full, k_empty, v_full, v_empty = ring.k_full, ring.k_empty, ring.v_full, ring.v_empty
    o_replaces_q, rows_are_long = ring.o_replaces_q, traits.head_dim > 128

    init_barriers = make_init_barriers(ring, num_groups, config.num_stages)
    next_stage = make_next_stage(config.num_stages)
    give_registers, take_registers = make_register_exchange(config)
    produce = make_produce(config, traits)
    walk, block_place = make_walk(config.tile_m), make_block_place(config.tile_m)
    keys_of, keys_of_part = make_keys_of(config), make_keys_of_part(config, WARPGROUP_ROWS)
    whole_keys = make_whole_keys(tile_n, WARPGROUP_ROWS)
    take_turn, pass_turn, give_first_turn = make_turns(num_groups if config.pingpong else 1)
    pass_by = make_pass_by(ring, config.num_stages, take_turn, pass_turn)
    gives_back, gather = make_giving_back(ring.arrivals)

    q_operand = make_operand(WARPGROUP_ROWS * SLAB_BYTES)
    tile_operand = make_operand(tile_n * SLAB_BYTES)
    begin_q_k = make_product_nt(dtype, WARPGROUP_ROWS, tile_n, tile_n, traits.head_dim)
    begin_p_v = make_product_pn(dtype, tile_n, traits.head_dim_v)
    wait_for_s, wait_for_next_s = (make_wgmma_wait_group(i, n_scores) for i in range(2))
    wait_for_o = make_wgmma_wait_group(0, n_o)
    scale_scores = make_scale_scores(1, n_tiles, traits.softcap, traits.alibi)
    mask_scores = make_mask_scores(1, n_tiles)
    online_softmax = make_online_softmax(n_tiles)
    pack_p, scale_rows = make_pack(dtype, n_tiles), make_scale_rows(1, o_tiles)
    finish = make_finish(config, traits)

    @device_function
    def q_of_group(q_first, group):
        """Operand Q of this warpgroup; of long rows computed anew, or all its steps are kept."""
        if rows_are_long:
            group = group_of_thread()
        return u32(q_first + group * q_step)

    @device_function
    def shape_scores(s_acc, cap_slopes, m_start, n_start, whole, edges, scores, slope):
        """Softcap, ALiBi, and the mask where an edge crosses the tile."""
        end, mask, pack = edges
        if bends:
            i = i32(m_start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            scale_scores(s_acc, cap_slopes, i, j, scores.alibi.shift, scores, slope)
        if n_start < whole[0] or n_start > whole[1]:
            i = i32(m_start + accumulator_row(MMA_ROWS))
            j = i32(n_start + accumulator_column())
            mask_scores(s_acc, i, j, end, mask, pack)

    def forward(
        out: Part[out_storage],
        lse: Pointer(f32),
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
        o_acc = cuda.local.array(n_o, f32)
        cap_slopes = cuda.local.array(n_cap_slopes, f32)
        row_max = cuda.local.array(2, f32)
        row_sum = cuda.local.array(2, f32)
        limits = cuda.local.array(2, f32)
        shifts = cuda.local.array(2, f32)
        rows = row_max, row_sum, limits, shifts
        factors = cuda.local.array(2, f32)
        group = group_of_thread()
        q_first = q_operand(mov_shared_address(smem, q_smem))
        k_first = tile_operand(mov_shared_address(smem, k_smem))
        v_first = tile_operand(mov_shared_address(smem, v_smem))
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        results = out, lse, out_map
        give_first_turn(group)

        place, step, num_places = places
        stage, parity, q_parity = i32(0), u32(0), u32(0)
        while place < num_places:
            m_start, head_of_batch, split = block_place(place, grid)
            n_begin, n_end = keys_of(m_start, split, grid, band)
            # Of those tiles of keys the ones that this warpgroup's rows see, and see whole.
            row = i32(m_start + WARPGROUP_ROWS * group)
            first, end = keys_of_part(row, n_begin, n_end, grid, band)
            whole = whole_keys(row, grid, band)
            batch = token_of_row(head_of_batch, shape.num_heads_q)
            head = head_of_batch - batch * shape.num_heads_q
            slope = slope_of(scores.alibi, batch, head)
            edges = shape.seqlen_k, mask, layout.pack
            for i in range(n_o):
                o_acc[i] = f32(0)
            begin_rows(rows)
            mbarrier_wait_parity(barriers, q_full + group, q_parity)
            q_parity = u32(q_parity ^ u32(1))

            stage, parity = pass_by(barriers, group, n_begin, first, stage, parity)
            if first < end:
                # The first tile of keys: S = Q K^T, P = softmax(S).
                take_turn(group)
                mbarrier_wait_parity(barriers, k_full + stage, parity)
                begin_q_k(s_acc, q_of_group(q_first, group), u32(k_first + stage * k_step))
                pass_turn(group)
                wait_for_s(s_acc)
                if gives_back():
                    mbarrier_arrive(barriers, k_empty + stage)
                n_start = i32(first * tile_n)
                shape_scores(s_acc, cap_slopes, m_start, n_start, whole, edges, scores, slope)
                online_softmax(s_acc, rows, factors, scale_log2)
                pack_p(p_frag, s_acc)

                for n in range(first + 1, end):
                    # S = Q K^T of this tile of keys, O += P V of the one before.
                    v_stage, v_parity = stage, parity
                    stage, parity = next_stage(stage, parity)
                    take_turn(group)
                    if overlap:
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(s_acc, q_of_group(q_first, group), u32(k_first + stage * k_step))
                    mbarrier_wait_parity(barriers, v_full + v_stage, v_parity)
                    begin_p_v(o_acc, p_frag, u32(v_first + v_stage * v_step))
                    if not overlap:
                        wait_for_o(o_acc)
                        if gives_back():
                            mbarrier_arrive(barriers, v_empty + v_stage)
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(s_acc, q_of_group(q_first, group), u32(k_first + stage * k_step))
                    pass_turn(group)
                    if overlap:
                        wait_for_next_s(s_acc)
                    else:
                        wait_for_s(s_acc)
                    if gives_back():
                        mbarrier_arrive(barriers, k_empty + stage)

                    # P = softmax(S)
                    n_start = i32(n * tile_n)
                    shape_scores(s_acc, cap_slopes, m_start, n_start, whole, edges, scores, slope)
                    has_grown = online_softmax(s_acc, rows, factors, scale_log2)
                    if overlap:
                        softmax_before_wait(smem, 0, row_sum[0], row_sum[1])
                        wait_for_o(o_acc)
                        if gives_back():
                            mbarrier_arrive(barriers, v_empty + v_stage)
                    pack_p(p_frag, s_acc)
                    if has_grown:
                        scale_rows(o_acc, factors)

                mbarrier_wait_parity(barriers, v_full + stage, parity)
                begin_p_v(o_acc, p_frag, u32(v_first + stage * v_step))
                wait_for_o(o_acc)
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
                scale_log2,
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
