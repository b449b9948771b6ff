"""Forward on Hopper: O = softmax(softmax_scale Q K^T) V and lse, by specialised warps.

One warp of a block, the producer, fetches tiles of Q, K and V by bulk copies into a ring of
`num_stages` buffers. The consumers are warpgroups with 64 rows of Q each, which multiply
asynchronously: S = Q K^T from shared memory, O += P V with P in registers. They meet at mbarriers
only: a buffer is full when its bytes have arrived, and empty when every warpgroup has read it.

Blocks take tile after tile of rows, those of one round in the order of the blocks and those of the
next in reverse: each has as many long as short ones where masks make them differ.

Source: FlashAttention-3, arXiv 2407.08608, Algorithms 1 and 2.
"""

import math

from numflash.configs import Traits
from numflash.configs.sm90 import Sm90ForwardConfig
from numflash.kernels.kernel import Kernel
from numflash.ptx import (
    EVICT_FIRST,
    EVICT_LAST,
    Pointer,
    TensorMap,
    cp_async_bulk_tensor_4d,
    cp_async_bulk_tensor_5d,
    cp_async_bulk_wait_group_read,
    cuda,
    device_function,
    elect_sync,
    f32,
    fence_mbarrier_init,
    i32,
    i64,
    make_setmaxnreg,
    make_wgmma_wait_group,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_ctaid_x,
    mov_nctaid_x,
    mov_shared_address,
    mov_tid_x,
    u16,
    u32,
    u64,
)
from numflash.tiles.blocks import make_block_place
from numflash.tiles.mma.copies import make_store_rows
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP, accumulator_column, accumulator_row
from numflash.tiles.mma.scores import make_mask_scores, make_scale_scores, token_of_row
from numflash.tiles.mma.softmax import make_scale_rows, row_sum_of_quad
from numflash.tiles.scores import NEG_INF, band_block_begin, band_block_end
from numflash.tiles.softmax import LN_2, LOG2_E
from numflash.tiles.wgmma.products import (
    SLAB_BYTES,
    make_operand,
    make_pack,
    make_product_nt,
    make_product_pn,
)
from numflash.tiles.wgmma.results import make_store_slabs
from numflash.tiles.wgmma.softmax import make_online_softmax
from numflash.tiles.wgmma.turns import make_turns, softmax_before_wait

_ROWS = 64  # of a warpgroup
_SLAB_ELEMENTS = SLAB_BYTES // 2
_WORD_BYTES = 4


def make_forward_kernel(config: Sm90ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    tile_m, tile_n, num_stages = config.tile_m, config.tile_n, config.num_stages
    num_groups, is_split, overlap = config.num_warpgroups, config.num_splits > 1, config.overlap
    num_consumers = 128 * num_groups
    n_tiles, o_tiles = tile_n // 8, traits.head_dim_v // 8
    n_scores, n_p, n_o = 4 * n_tiles, 2 * n_tiles, 4 * o_tiles
    columns, columns_v, dtype = traits.head_dim, traits.head_dim_v, traits.dtype
    k_slabs, v_slabs = config.slabs(columns), config.slabs(columns_v)

    offsets = config.smem_offsets(traits)
    q_smem, k_smem, v_smem = (offsets[name] for name in "qkv")
    o_apart = config.o_is_apart(traits)
    o_smem = offsets["o"] if o_apart else q_smem
    q_words = config.tiles(traits)["q"] // num_groups
    o_words = config.tiles(traits)["o"] // num_groups if o_apart else q_words
    slab_words = SLAB_BYTES // _WORD_BYTES
    k_words, v_words = tile_n * slab_words * k_slabs, tile_n * slab_words * v_slabs
    q_bytes = u32(_ROWS * SLAB_BYTES * k_slabs)
    k_bytes, v_bytes = u32(_WORD_BYTES * k_words), u32(_WORD_BYTES * v_words)
    # mbarriers: of Q by warpgroup, of K and V by stage.
    q_full = offsets["barriers"] // 2
    q_empty = q_full + num_groups
    k_full, k_empty, v_full, v_empty = (q_empty + num_groups + num_stages * i for i in range(4))

    block_place = make_block_place(tile_m)
    q_operand = make_operand(_ROWS * SLAB_BYTES)
    tile_operand = make_operand(tile_n * SLAB_BYTES)
    begin_q_k = make_product_nt(dtype, _ROWS, tile_n, columns)
    begin_p_v = make_product_pn(dtype, tile_n, columns_v)
    wait_for_s, wait_for_next_s = (make_wgmma_wait_group(i, n_scores) for i in range(2))
    wait_for_o = make_wgmma_wait_group(0, n_o)
    pack_p = make_pack(dtype, n_tiles)
    scale_scores = make_scale_scores(1, n_tiles, traits.softcap, traits.alibi)
    mask_scores = make_mask_scores(1, n_tiles)
    online_softmax = make_online_softmax(n_tiles)
    scale_rows = make_scale_rows(1, o_tiles)
    store_slabs = make_store_slabs(dtype, o_tiles)
    store_part = make_store_rows(MMA_ELEMENTS["sm80", dtype], 1, o_tiles, True, True, packed=True)
    take_turn, pass_turn, give_first_turn = make_turns(num_groups if config.pingpong else 1)
    give_registers = make_setmaxnreg("dec", config.registers[0])
    take_registers = make_setmaxnreg("inc", config.registers[1])
    n_cap_slopes = n_scores if traits.softcap else 1
    softcapped, alibi = traits.softcap, traits.alibi
    out_storage = f32 if is_split else u16

    @device_function
    def keys_of(m_start, split, num_rows, pack, seqlen_k, band_lo, band_hi, num_splits):
        """(first, end) of the tiles of keys that a tile of rows sees, of this split's share."""
        first_token = token_of_row(m_start, pack)
        last_token = token_of_row(min(m_start + tile_m, num_rows) - 1, pack)
        n_begin = i32(band_block_begin(first_token, band_lo, tile_n))
        n_end = i32(band_block_end(last_token, band_hi, seqlen_k, tile_n))
        if is_split:
            share = i32(u32(max(0, n_end - n_begin) + num_splits - 1) // u32(num_splits))
            n_begin = i32(n_begin + split * share)
            n_end = i32(min(n_end, n_begin + share))
        return n_begin, n_end

    @device_function
    def q_of_group(q_first):
        """Operand Q of this warpgroup, computed anew: its many steps would be kept otherwise."""
        return u32(q_first + mov_tid_x() // u32(128) * u32(q_words >> 2))

    @device_function
    def next_stage(stage, parity):
        """The buffer after this one, and the parity of the phase in which it is."""
        last = stage == num_stages - 1
        return i32(0) if last else i32(stage + 1), u32(parity ^ u32(last))

    @device_function
    def fetch_slabs(smem, barriers, full, target, slabs, tensor_map, first, head, batch):
        """Begin to fetch tile_n rows of K or V."""
        for slab in range(slabs):
            cp_async_bulk_tensor_4d(
                smem,
                i32(target + slab * tile_n * slab_words),
                tensor_map,
                barriers,
                full,
                EVICT_LAST,
                i32(slab * _SLAB_ELEMENTS),
                first,
                head,
                batch,
            )

    def forward(
        out: Pointer(out_storage),
        lse: Pointer(f32),
        alibi_slopes: Pointer(f32),
        in_fp8: Pointer(i32),
        q_map: TensorMap,
        k_map: TensorMap,
        v_map: TensorMap,
        out_map: TensorMap,
        out_split: i64,
        out_batch: i64,
        out_row: i64,
        out_head: i64,
        slopes_batch: i64,
        slopes_head: i64,
        batch_size: i32,
        seqlen_q: i32,
        seqlen_k: i32,
        num_heads_q: i32,
        group_size: i32,
        head_dim_v: i32,
        band_lo: i32,
        band_hi: i32,
        bias_shift: i32,
        pack: i32,
        num_splits: i32,
        heads_in_flight: i32,
        score_scale: f32,
        softcap: f32,
    ):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(0, u64, alignment=1024)
        thread = mov_tid_x()
        if thread == 0:
            for group in range(num_groups):
                mbarrier_init(barriers, q_full + group, 1)
                mbarrier_init(barriers, q_empty + group, 1)
            for stage in range(num_stages):
                mbarrier_init(barriers, k_full + stage, 1)
                mbarrier_init(barriers, v_full + stage, 1)
                mbarrier_init(barriers, k_empty + stage, num_groups)
                mbarrier_init(barriers, v_empty + stage, num_groups)
            fence_mbarrier_init()
        cuda.syncthreads()

        num_rows = seqlen_q * pack
        num_heads = batch_size * num_heads_q
        num_m_blocks = u32(num_rows + tile_m - 1) // u32(tile_m)
        num_places = u32(num_m_blocks * (u32(num_heads) // u32(pack)) * u32(num_splits))
        place = mov_ctaid_x()
        # To the same place from the other end of the next round, and back.
        step = u32(u32(2) * (mov_nctaid_x() - place) - u32(1))

        if thread >= num_consumers:
            # The producer is one thread.
            give_registers()
            if thread < num_consumers + 32 and elect_sync() != 0:
                tokens = i32(u32(_ROWS) // u32(pack))
                stage, parity, q_parity = i32(0), u32(1), u32(1)
                while place < num_places:
                    m_start, head_of_batch, split = block_place(
                        place, num_rows, num_heads, pack, num_splits, heads_in_flight
                    )
                    batch = token_of_row(head_of_batch, num_heads_q)
                    head = i32(head_of_batch - batch * num_heads_q)
                    packed_head, head_kv = token_of_row(head, pack), token_of_row(head, group_size)
                    n_begin, n_end = keys_of(
                        m_start, split, num_rows, pack, seqlen_k, band_lo, band_hi, num_splits
                    )
                    token = token_of_row(m_start, pack)
                    for group in range(num_groups):
                        mbarrier_wait_parity(barriers, q_empty + group, q_parity)
                        mbarrier_arrive_expect_tx(barriers, q_full + group, q_bytes)
                        for slab in range(k_slabs):
                            cp_async_bulk_tensor_5d(
                                smem,
                                q_smem + group * q_words + slab * _ROWS * slab_words,
                                q_map,
                                barriers,
                                q_full + group,
                                EVICT_FIRST,
                                i32(slab * _SLAB_ELEMENTS),
                                0,
                                i32(token + group * tokens),
                                packed_head,
                                batch,
                            )
                    q_parity = u32(q_parity ^ u32(1))
                    for n in range(n_begin, n_end):
                        first = i32(n * tile_n)
                        mbarrier_wait_parity(barriers, k_empty + stage, parity)
                        mbarrier_arrive_expect_tx(barriers, k_full + stage, k_bytes)
                        target = k_smem + k_words * stage
                        fetch_slabs(
                            smem,
                            barriers,
                            k_full + stage,
                            target,
                            k_slabs,
                            k_map,
                            first,
                            head_kv,
                            batch,
                        )
                        mbarrier_wait_parity(barriers, v_empty + stage, parity)
                        mbarrier_arrive_expect_tx(barriers, v_full + stage, v_bytes)
                        target = v_smem + v_words * stage
                        fetch_slabs(
                            smem,
                            barriers,
                            v_full + stage,
                            target,
                            v_slabs,
                            v_map,
                            first,
                            head_kv,
                            batch,
                        )
                        stage, parity = next_stage(stage, parity)
                    place = u32(place + step)
                    step = u32(u32(2) * mov_nctaid_x() - step)
            return

        take_registers()
        s_acc = cuda.local.array(n_scores, f32)
        p_frag = cuda.local.array(n_p, u32)
        o_acc = cuda.local.array(n_o, f32)
        cap_slopes = cuda.local.array(n_cap_slopes, f32)
        row_max = cuda.local.array(2, f32)
        row_sum = cuda.local.array(2, f32)
        factors = cuda.local.array(2, f32)
        group = i32(thread // 128)
        leads = thread % 128 == 0
        q_first = q_operand(mov_shared_address(smem, q_smem))
        k_first = tile_operand(mov_shared_address(smem, k_smem))
        v_first = tile_operand(mov_shared_address(smem, v_smem))
        scale_log2 = LOG2_E
        if not (softcapped or alibi):
            scale_log2 = score_scale * LOG2_E
        give_first_turn(group)

        stage, parity, q_parity = i32(0), u32(0), u32(0)
        while place < num_places:
            m_start, head_of_batch, split = block_place(
                place, num_rows, num_heads, pack, num_splits, heads_in_flight
            )
            n_begin, n_end = keys_of(
                m_start, split, num_rows, pack, seqlen_k, band_lo, band_hi, num_splits
            )
            # Tiles of keys that begin between these are seen whole by all rows.
            first_whole = i32(token_of_row(min(m_start + tile_m, num_rows) - 1, pack) + band_lo)
            last_whole = i32(min(seqlen_k, token_of_row(m_start, pack) + band_hi + 1) - tile_n)
            alibi_slope = f32(0)
            if alibi:
                batch = token_of_row(head_of_batch, num_heads_q)
                head = head_of_batch - batch * num_heads_q
                alibi_slope = alibi_slopes[batch * slopes_batch + head * slopes_head]
            for i in range(n_o):
                o_acc[i] = f32(0)
            row_max[0], row_max[1] = NEG_INF, NEG_INF
            row_sum[0], row_sum[1] = f32(0), f32(0)

            mbarrier_wait_parity(barriers, q_full + group, q_parity)
            q_parity = u32(q_parity ^ u32(1))
            if n_begin < n_end:
                # S = Q K^T and P = softmax(S) of the first tile of keys.
                mbarrier_wait_parity(barriers, k_full + stage, parity)
                begin_q_k(s_acc, q_of_group(q_first), u32(k_first + stage * (k_words >> 2)))
                wait_for_s(s_acc)
                if leads:
                    mbarrier_arrive(barriers, k_empty + stage)
                n_start = i32(n_begin * tile_n)
                if softcapped or alibi:
                    i = i32(m_start + accumulator_row(MMA_ROWS))
                    j = i32(n_start + accumulator_column())
                    scale_scores(
                        s_acc, cap_slopes, i, j, bias_shift, score_scale, softcap, alibi_slope
                    )
                if n_start < first_whole or n_start > last_whole:
                    i = i32(m_start + accumulator_row(MMA_ROWS))
                    j = i32(n_start + accumulator_column())
                    mask_scores(s_acc, i, j, seqlen_k, band_lo, band_hi, pack)
                online_softmax(s_acc, row_max, row_sum, factors, scale_log2)
                pack_p(p_frag, s_acc)

                for n in range(n_begin + 1, n_end):
                    v_stage, v_parity = stage, parity
                    stage, parity = next_stage(stage, parity)
                    # The next S = Q K^T, and O += P V of the tile before.
                    take_turn(group)
                    if overlap:
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(
                            s_acc, q_of_group(q_first), u32(k_first + stage * (k_words >> 2))
                        )
                    mbarrier_wait_parity(barriers, v_full + v_stage, v_parity)
                    begin_p_v(o_acc, p_frag, u32(v_first + v_stage * (v_words >> 2)))
                    if overlap:
                        pass_turn(group)
                        wait_for_next_s(s_acc)
                    else:
                        wait_for_o(o_acc)
                        if leads:
                            mbarrier_arrive(barriers, v_empty + v_stage)
                        mbarrier_wait_parity(barriers, k_full + stage, parity)
                        begin_q_k(
                            s_acc, q_of_group(q_first), u32(k_first + stage * (k_words >> 2))
                        )
                        pass_turn(group)
                        wait_for_s(s_acc)
                    if leads:
                        mbarrier_arrive(barriers, k_empty + stage)

                    # P = softmax(S)
                    n_start = i32(n * tile_n)
                    if softcapped or alibi:
                        i = i32(m_start + accumulator_row(MMA_ROWS))
                        j = i32(n_start + accumulator_column())
                        scale_scores(
                            s_acc, cap_slopes, i, j, bias_shift, score_scale, softcap, alibi_slope
                        )
                    if n_start < first_whole or n_start > last_whole:
                        i = i32(m_start + accumulator_row(MMA_ROWS))
                        j = i32(n_start + accumulator_column())
                        mask_scores(s_acc, i, j, seqlen_k, band_lo, band_hi, pack)
                    has_grown = online_softmax(s_acc, row_max, row_sum, factors, scale_log2)
                    if overlap:
                        softmax_before_wait(smem, 0, row_sum[0], row_sum[1])
                        wait_for_o(o_acc)
                        if leads:
                            mbarrier_arrive(barriers, v_empty + v_stage)
                    pack_p(p_frag, s_acc)
                    if has_grown:
                        scale_rows(o_acc, factors)

                mbarrier_wait_parity(barriers, v_full + stage, parity)
                begin_p_v(o_acc, p_frag, u32(v_first + stage * (v_words >> 2)))
                wait_for_o(o_acc)
                if leads:
                    mbarrier_arrive(barriers, v_empty + stage)
                stage, parity = next_stage(stage, parity)

            if o_apart and leads:
                mbarrier_arrive(barriers, q_empty + group)
            # Where this tile of rows lies is found out once more: registers are scarce above.
            m_start, head_of_batch, split = block_place(
                place, num_rows, num_heads, pack, num_splits, heads_in_flight
            )
            batch = token_of_row(head_of_batch, num_heads_q)
            head = i32(head_of_batch - batch * num_heads_q)
            row = i32(m_start + accumulator_row(MMA_ROWS))
            for r in range(2):
                total = row_sum_of_quad(row_sum[r])
                # A row that sees no key has output 0 and lse -inf.
                row_sum[r] = f32(1) / total if total != f32(0) else f32(0)
                i = i32(row + ROW_STEP * r)
                if accumulator_column() == 0 and i < num_rows:
                    row_lse = NEG_INF
                    if total != f32(0):
                        row_lse = (row_max[r] * scale_log2) * LN_2 + f32(math.log(total))
                    token = token_of_row(i, pack)
                    part = i64(split) * num_heads + head_of_batch + i - token * pack
                    lse[part * seqlen_q + token] = row_lse
            scale_rows(o_acc, row_sum)
            if is_split:
                base = split * out_split + batch * out_batch + head * out_head
                store_part(o_acc, out, base, out_row, row, num_rows, head_dim_v, pack, out_head)
            else:
                token = i32(token_of_row(m_start + _ROWS * group, pack))
                store_slabs(
                    o_acc,
                    smem,
                    o_smem + o_words * group,
                    group,
                    out_map,
                    token,
                    token_of_row(head, pack),
                    batch,
                )
            if not o_apart and leads:
                # Q has been read, and so has what stood in its place.
                cp_async_bulk_wait_group_read()
                mbarrier_arrive(barriers, q_empty + group)
            place = u32(place + step)
            step = u32(u32(2) * mov_nctaid_x() - step)
        if leads:
            cp_async_bulk_wait_group_read()

    return Kernel(config.family, forward, config.num_threads, config.smem_bytes(traits))
