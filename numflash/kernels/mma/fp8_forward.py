"""Forward on 8-bit floats: O = softmax(softmax_scale Q K^T) V of e4m3 codes and their scales.

The walk is that of `kernels.mma.forward`: a block owns tile_m rows of Q, a warp whole rows, and K
and V come in tiles of tile_n. The changes for 8 bits:

    S     the product of codes times the scales of its row and of its tile of K; with `key_scales`
          of each key
    P     rounded to e4m3 in units of its tile's largest score (`tiles.mma.fp8_softmax`), with
          `key_scales` times the scale of V of its key
    V     comes with tokens innermost, so that both products read operand B by rows, and in the
          order in which P leaves the accumulators: no shuffle and no transposition
    O     each tile's P V is summed up by itself and then added, in float32, with a weight in
          which V's scale is (`tiles.mma.fp8_products`)

Where there are no e4m3 products the codes become float16, which holds them exactly, on their way
to shared memory: the results differ only by the rounding of sums.

The main loop in machine code, a warp and a tile (head_dim 128, tile 64 x 64, sm_89): 524
instructions, of which

     64 QMMA          S = Q K^T and P V, one row of products a warp
     36 LDSM          operands from shared memory: 4 of Q, 16 of K, 16 of V
     32 MUFU, FFMA    one exponential and one multiply-add a score
     72 FMNMX, FADD   the row's maximum and sum; 4 SHFL across its four lanes
     16 F2FP          P to e4m3, four to a register
     64 FFMA          O += weight * P V, by which O needs no rescaling of its own for P's unit
      8 LDGSTS        K and V; 2 LDG for their scales, 8 LDS for those of Q and for kept values

and out of line 64 FMUL for O where a maximum has grown by 2 ** 8, and the mask. By NVIDIA's
peak rates Ada's tensor cores take 64 x 16 clocks for it (32 where sums in float32 run at half
rate), the scheduler 524. No GPU has timed it yet.

Source: FlashAttention-3, arXiv 2407.08608, section 3.3.
"""

import math

from numflash.configs import Fp8ForwardConfig, Traits
from numflash.kernels.arguments import (
    Descales,
    Layout,
    Part,
    Pointer,
    Shape,
    Tensor,
    Transposed,
    mask_of,
    scores_of,
)
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, device_function, f32, i32, i64, mov_tid_x, u8, u32
from numflash.ptx.arithmetic import bits_as_float
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.ptx.memory import ld_shared_u32, st_shared_f32, st_shared_u32
from numflash.tiles import blocks, features, sequences, steps
from numflash.tiles.addresses import first_of_head, first_of_rows, token_of_row
from numflash.tiles.blocks import grid_of
from numflash.tiles.division import quotient
from numflash.tiles.mma import copies, fp8_products, fp8_softmax, layouts, products, softmax
from numflash.tiles.mma.fp8_operands import fp8_operands, result_element, scale_of_key
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    column_operand_chunk,
    column_operand_row,
    place_of_column,
    row_operand_chunk,
    row_operand_row,
)
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.mma.softmax import row_sum_of_quad
from numflash.tiles.portable.softmax import LN_2, LOG2_E
from numflash.tiles.rows import make_end_of_row
from numflash.tiles.scores import NEG_INF, Corner
from numflash.tiles.selected import make_is_computed
from numflash.tiles.sequences import sequence_of_all


def make_forward_kernel(config: Fp8ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    operands = fp8_operands(config.generation, config.multiplies_codes)
    element, asynchronous = operands.element, operands.is_asynchronous
    result = result_element(config.generation, traits.dtype)
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages, is_split = config.num_stages, config.num_splits > 1
    m_tiles, n_tiles, o_tiles = config.m_tiles, tile_n // 8, traits.head_dim_v // 8
    rows, rows_per_warp = 2 * m_tiles, MMA_ROWS * m_tiles
    n_scores, n_o = 4 * m_tiles * n_tiles, 4 * m_tiles * o_tiles
    columns, columns_v = traits.head_dim, traits.head_dim_v

    offsets = config.smem_offsets(traits)
    q_smem, k_smem, v_smem = (offsets[name] for name in "qkv")
    q_scales_smem, kept_smem = offsets["q_scales"], offsets["kept"]
    k_base, v_base, k_descale_base, v_descale_base = range(kept_smem, kept_smem + 8, 2)
    whole_begin, whole_end, kept_n_end, kept_m_start = range(kept_smem + 8, kept_smem + 12)
    k_layout = TileLayout(columns // element.per_chunk, config.swizzled)
    v_layout = TileLayout(tile_n // element.per_chunk, config.swizzled)
    k_words, v_words = tile_n * k_layout.pitch, columns_v * v_layout.pitch

    place_of, keys_of = blocks.make_place_of(tile_m, traits), steps.make_keys_of(config, traits)
    tile_at = steps.make_tile_at(traits, tile_n)
    whole_keys = sequences.make_whole_keys(tile_n, tile_m)
    copy_q = operands.make_copy_rows(k_layout, tile_m, num_threads, copies.row_of_packed_heads)
    copy_k = operands.make_copy_rows(k_layout, tile_n, num_threads)
    copy_v = operands.make_copy_columns(v_layout, columns_v, num_threads)
    k_word, v_word = layouts.make_word(k_layout), layouts.make_word(v_layout)
    multiply_q_k = products.make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    accumulate_p_v = fp8_products.make_accumulate(element, m_tiles, n_tiles, o_tiles, v_layout)
    scale_s_rows = softmax.make_scale_rows(m_tiles, n_tiles)
    scale_keys = fp8_softmax.make_scale_keys(m_tiles, n_tiles)
    add_v_scales = fp8_softmax.make_add_v_scales(m_tiles, n_tiles)
    apply_functions = make_apply_functions(m_tiles, n_tiles, traits, True, False)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    tile_softmax = fp8_softmax.make_tile_softmax(m_tiles, n_tiles, o_tiles, traits.key_scales)
    scale_rows = softmax.make_scale_rows(m_tiles, o_tiles)
    end_of_row, lse_of_row = make_end_of_row(traits.features, LN_2, is_split)
    is_float32 = is_split or traits.float32_out
    store_as = (
        traits.vectorized or is_split,
        is_float32,
        copies.row_of_packed_heads,
        traits.float32_out,
    )
    store_o = copies.make_store_rows(result, m_tiles, o_tiles, *store_as)
    of_keys = fp8_softmax.KeyScales(offsets["key_scales"], tile_n)
    k_of_keys, v_log2_of_keys, v_inverse_of_keys = of_keys.k, of_keys.v_log2, of_keys.v_inverse
    args_of_head = features.make_args_of_head(traits)
    is_computed = make_is_computed(traits)
    key_scales, bends = traits.key_scales, traits.shapes_scores
    has_functions = traits.has_functions
    out_storage = f32 if is_float32 else result.storage
    # Copies that may be on their way while the next tile is used: K and V of all stages but one.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[2 * num_stages - 2]

    @device_function
    def keep(smem, position, base):
        st_shared_u32(smem, position, u32(base & 0xFFFFFFFF))
        st_shared_u32(smem, position + 1, u32(base >> 32))

    @device_function
    def kept(smem, position):
        return i64(ld_shared_u32(smem, position)) | i64(ld_shared_u32(smem, position + 1)) << 32

    @device_function
    def fetch_k(smem, k, n, stage, seqlen_k):
        tile, first = k_smem + k_words * stage, i32(n * tile_n)
        copy_k(smem, tile, k, kept(smem, k_base), first, seqlen_k, columns)

    @device_function
    def fetch_v(smem, v, n, stage):
        tile, first = v_smem + v_words * stage, i32(n * tile_n)
        base, left = kept(smem, v_base) + first, v.length - first
        copy_v(smem, tile, v, base, 0, columns_v, left)

    def forward(
        q: Tensor[u8],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[u8],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Transposed,  # (batch, num_heads_kv, head_dim_v, seqlen_k)
        out: Part[out_storage],  # (split, batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q)
        descales: Descales,
        in_fp8: Pointer(i32),  # (batch, num_heads_kv)
        mask: mask_of(traits),
        shape: Shape,
        layout: Layout,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)
        scales = cuda.local.array(rows, f32)
        weights = cuda.local.array(rows, f32)

        grid = grid_of(shape, layout)
        place = place_of(cuda.blockIdx.x, grid, shape, mask)
        m_start, head, head_kv, batch, split = place
        # Heads that are computed in 16 bits are another kernel's.
        if not is_computed(in_fp8, place, shape):
            return
        sequence = sequence_of_all(shape, mask)
        num_rows = i32(sequence.seqlen_q * layout.pack)
        q_origin = first_of_rows(q, batch, head, sequence.first_q), layout.pack
        q_descale_base = first_of_head(descales.q, batch, quotient(head, descales.q.group))
        n_begin, n_end = keys_of(place, grid, sequence, mask)

        if cuda.threadIdx.x == 0:
            # Registers are scarcer than shared memory.
            keep(smem, k_base, first_of_rows(k, batch, head_kv, sequence.first_k))
            keep(smem, v_base, first_of_head(v, batch, head_kv) + sequence.first_k)
            keep(smem, k_descale_base, first_of_head(descales.k, batch, head_kv))
            keep(smem, v_descale_base, first_of_head(descales.v, batch, head_kv))
            whole = whole_keys(m_start, grid, sequence)
            st_shared_u32(smem, whole_begin, u32(whole.first))
            st_shared_u32(smem, whole_end, u32(whole.last))
            st_shared_u32(smem, kept_n_end, u32(n_end))
            st_shared_u32(smem, kept_m_start, u32(m_start))
        # Values that one thread has stored are visible to all.
        cuda.syncthreads()
        args = args_of_head(scores, batch, head)

        # Without keys nothing would wait for Q.
        if n_begin < n_end:
            copy_q(smem, q_smem, q, q_origin, m_start, num_rows, columns)
        for stage in range(num_stages):
            n = i32(n_begin + stage)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, n_block, stage, shape.seqlen_k)
            if asynchronous:
                cp_async_commit_group()
            if stage < num_stages - 1:
                if n < n_end:
                    n_block, _ = tile_at(mask, n)
                    fetch_v(smem, v, n_block, stage)
                if asynchronous:
                    cp_async_commit_group()
        for i in range(n_o):
            o_acc[i] = f32(0)
        for r in range(rows):
            row_max[r] = NEG_INF
            row_sum[r] = f32(0)
        for row in range(cuda.threadIdx.x, tile_m, num_threads):
            # Beyond the last row any scale will do.
            i = i32(min(m_start + row, num_rows - 1))
            token = token_of_row(i, layout.pack)
            offset = q_descale_base + (i - token * layout.pack) * descales.q.packed
            scale = descales.q.data[offset + (token >> descales.q.shift)] * scores.scale
            # To base 2, unless softcap or ALiBi come first.
            if not bends:
                scale *= LOG2_E
            st_shared_f32(smem, q_scales_smem + row, scale)

        stage = i32(0)
        last_stage = i32(num_stages - 1)
        for step in range(n_begin, n_end):
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            # K of this block must have arrived, and the scales of Q. The barrier shows them to all
            # threads, and V's last readers are through with the buffer that the next V goes to.
            if asynchronous:
                wait_for_tile()
            cuda.syncthreads()
            n = i32(step + num_stages - 1)
            if n < i32(ld_shared_u32(smem, kept_n_end)):
                n_block, _ = tile_at(mask, n)
                fetch_v(smem, v, n_block, last_stage)
            if asynchronous:
                cp_async_commit_group()

            # S = Q K^T. A lane's position in the operands is computed again for each tile.
            thread = mov_tid_x()
            lane, q_row_of_lane = thread % 32, thread // 32 * rows_per_warp
            q_row_of_lane += row_operand_row(lane)
            q_mine = i32(q_smem + k_word(q_row_of_lane, row_operand_chunk(lane)))
            k_mine = i32(k_smem + k_word(column_operand_row(lane), column_operand_chunk(lane)))
            multiply_q_k(s_acc, smem, q_mine, i32(k_mine + k_words * stage))

            k_scale, v_scale = f32(1), f32(1)
            if key_scales:
                for i in range(mov_tid_x(), tile_n, num_threads):
                    key, at = i32(min(n_start + i, shape.seqlen_k - 1)), place_of_column(i)
                    k_scale = scale_of_key(descales.k, kept(smem, k_descale_base), key)
                    v_scale = scale_of_key(descales.v, kept(smem, v_descale_base), key)
                    st_shared_f32(smem, k_of_keys + at, k_scale)
                    st_shared_f32(smem, v_log2_of_keys + at, f32(math.log(v_scale)) * LOG2_E)
                    st_shared_f32(smem, v_inverse_of_keys + at, f32(1) / v_scale)
                k_scale, v_scale = f32(1), f32(1)
            else:
                k_scale = scale_of_key(descales.k, kept(smem, k_descale_base), n_start)
                v_scale = scale_of_key(descales.v, kept(smem, v_descale_base), n_start)

            # V and scales of this block must have arrived, for all threads, and all have read K,
            # whose buffer the next K goes to.
            if asynchronous:
                wait_for_tile()
            cuda.syncthreads()
            n = i32(step + num_stages)
            if n < i32(ld_shared_u32(smem, kept_n_end)):
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, n_block, stage, shape.seqlen_k)
            if asynchronous:
                cp_async_commit_group()

            j = accumulator_column()
            if key_scales:
                scale_keys(s_acc, smem, k_of_keys + place_of_column(j))
            row = q_scales_smem + accumulator_row(rows_per_warp)
            for r in range(rows):
                scales[r] = bits_as_float(ld_shared_u32(smem, row + ROW_STEP * r)) * k_scale
            if bends:
                scale_s_rows(s_acc, scales)
                for r in range(rows):
                    scales[r] = LOG2_E
            if has_functions:
                i = i32(ld_shared_u32(smem, kept_m_start) + accumulator_row(rows_per_warp))
                corner = Corner(i, i32(n_start + j), sequence, is_full)
                apply_functions(s_acc, s_acc, corner, f32(1), scores, args)
            first_whole = i32(ld_shared_u32(smem, whole_begin))
            last_whole = i32(ld_shared_u32(smem, whole_end))
            if n_start < first_whole or n_start > last_whole:
                i = i32(ld_shared_u32(smem, kept_m_start) + accumulator_row(rows_per_warp))
                mask_scores(s_acc, i, i32(n_start + j), sequence.seqlen_k, sequence, layout.pack)

            # P = softmax(S), O += P V
            if key_scales:
                add_v_scales(s_acc, scales, smem, v_log2_of_keys + place_of_column(j))
                for r in range(rows):
                    scales[r] = f32(1)
            v_inverse = v_inverse_of_keys + place_of_column(j)
            tile_softmax(s_acc, row_max, row_sum, o_acc, scales, weights, smem, v_inverse)
            for r in range(rows):
                weights[r] *= v_scale
            lane = mov_tid_x() % 32
            v_mine = i32(v_smem + v_word(column_operand_row(lane), column_operand_chunk(lane)))
            accumulate_p_v(o_acc, s_acc, smem, i32(v_mine + v_words * stage), weights)
            last_stage = stage
            stage = i32(stage + 1 if stage + 1 < num_stages else 0)

        # The place is computed again, so that no register keeps it through the loop.
        place = place_of(cuda.blockIdx.x, grid_of(shape, layout), shape, mask)
        m_start, head, _, batch, split = place
        head_of_batch = batch * shape.num_heads_q + head
        row = i32(m_start + accumulator_row(rows_per_warp))
        num_heads = shape.batch_size * shape.num_heads_q
        for r in range(rows):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            token = token_of_row(i, layout.pack)
            packed, top = i - token * layout.pack, row_max[r]
            row_sum[r], top, total = end_of_row(top, total, scores.features, batch, head + packed)
            if accumulator_column() == 0 and i < num_rows:
                part = i64(split) * num_heads + head_of_batch + packed
                lse[part * shape.seqlen_q + token] = lse_of_row(top, total)
        scale_rows(o_acc, row_sum)
        out_base = split * out.split + first_of_rows(out, batch, head, sequence.first_q)
        store_o(o_acc, out, (out_base, layout.pack), row, num_rows, shape.head_dim_v)

    return Kernel(config.family, forward, num_threads, config.smem_bytes(traits))
