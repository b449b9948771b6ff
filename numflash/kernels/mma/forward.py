"""Forward on the tensor cores: O = softmax(softmax_scale Q K^T) V and lse.

A block owns tile_m rows of Q and walks over K and V in tiles of tile_n. A warp owns whole rows:
its scores S, their softmax P and its part of O stay in registers, and P goes from accumulator to
operand without leaving them. K and V of `num_stages` blocks are in shared memory or on their way:
V of a block is fetched while S is computed, K of the next while V is used.

Rows may be packed: where few queries share a key-value head with others, `pack` query heads of one
token are neighbouring rows, so that K and V are read once for all of them. Row r then is token
r // pack of head r % pack.

The keys may be split over `num_splits` blocks, which write float32 parts of O, each normalised by
itself, and their lse; `shared.combine` puts the parts together. Where sequences have lengths of
their own a list says which tiles are split, and how often (`mma.parts`, `sequences.schedule`).

K and V may be e4m3 codes, of which half as many bytes are read. They are decoded within shared
memory, which is exact, and the products do not know.

The main loop in machine code, a warp and a tile (bfloat16, head_dim 128, tile 128 x 64, sm_90a):

    256 HMMA          S = Q K^T and O += P V, two rows of products a warp
     80 LDSM          operands from shared memory: 16 of Q, 32 of K, 32 of V
     64 MUFU, FFMA    one exponential and one multiply-add a score; 4 FFMA: does a row grow?
     64 FMNMX, FADD   the row's maximum and sum; 8 SHFL and FMNMX across its four lanes
     32 F2FP          P to bfloat16
     16 LDGSTS        K and V, each with about 5 instructions for address and bounds; 2 BAR
    128 FMUL          O rescaled, only when a maximum has grown by 2 ** 8
    192 ISETP, FSEL   the mask, only on tiles that an edge crosses, with 2 divisions for the tokens

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1; Flash-Decoding for the splits.
"""

from numflash.configs import MmaForwardConfig, Traits
from numflash.kernels.arguments import (
    Layout,
    Part,
    Pointer,
    Tensor,
    kv_of,
    mask_of,
    scores_of,
    shape_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.mma.parts import make_finish_part
from numflash.ptx import cuda, f32, i32, mov_ctaid_x, u32
from numflash.ptx.async_copies import CP_ASYNC_WAIT_GROUP, cp_async_commit_group
from numflash.tiles import addresses, blocks, features, pages, sequences, steps
from numflash.tiles.addresses import first_of_rows, token_of_row
from numflash.tiles.blocks import grid_of
from numflash.tiles.division import quotient
from numflash.tiles.mma import codes, copies, dropout, elements, fragments, products, softmax
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    first_row_of_warp,
)
from numflash.tiles.mma.layouts import TileLayout
from numflash.tiles.mma.scores import make_apply_functions, make_mask_scores
from numflash.tiles.mma.softmax import row_sum_of_quad
from numflash.tiles.portable.softmax import LN_2, LOG2_E
from numflash.tiles.quantize import conversions, descales
from numflash.tiles.rows import ends_in_two_steps, make_end_of_only_part, make_end_of_row
from numflash.tiles.scores import NEG_INF, Corner
from numflash.tiles.selected import make_is_computed


def make_forward_kernel(config: MmaForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    element = elements.MMA_ELEMENTS[config.generation, traits.dtype]
    tile_m, tile_n, num_threads = config.tile_m, config.tile_n, config.num_threads
    num_stages, is_split = config.num_stages, config.num_splits > 1
    m_tiles, n_tiles, o_tiles = config.m_tiles, tile_n // 8, traits.head_dim_v // 8
    rows, rows_per_warp = 2 * m_tiles, MMA_ROWS * m_tiles
    n_scores, n_o = 4 * m_tiles * n_tiles, 4 * m_tiles * o_tiles

    offsets = config.smem_offsets(traits)
    q_smem, k_smem, v_smem = (offsets[name] for name in "qkv")
    k_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    v_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    k_words, v_words = tile_n * k_layout.pitch, tile_n * v_layout.pitch

    place_of = blocks.make_place_of(tile_m, traits, is_split)
    keys_of = steps.make_keys_of(config, traits)
    tile_at, first_of_lse = steps.make_tile_at(traits, tile_n), addresses.make_first_of_lse(traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    whole_keys = sequences.make_whole_keys(tile_n, tile_m)
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (num_threads, traits.vectorized, asynchronous)
    copy_q = copies.make_copy_tile(element, k_layout, tile_m, *copy, copies.row_of_packed_heads)
    of_keys = pages.row_in_pages if traits.paged else addresses.row_of_head
    coded = traits.codes
    if coded:
        # Only codes have stages: from a stage to the next operands stay where they are.
        k_codes, v_codes = offsets["k_codes"], offsets["v_codes"]
        k_code_words, v_code_words, k_step, v_step = k_words // 2, v_words // 2, 0, 0
        copy_k = codes.make_copy_codes(k_layout, tile_n, *copy, of_keys)
        copy_v = codes.make_copy_codes(v_layout, tile_n, *copy, of_keys)
        fetch_k = copies.make_fetch_tile(copy_k, k_codes, k_code_words, tile_n)
        fetch_v = copies.make_fetch_tile(copy_v, v_codes, v_code_words, tile_n)
        decode = conversions.make_decode(traits.dtype, config.generation)
        decode_k = codes.make_decode_tile(decode, k_layout, tile_n, num_threads)
        decode_v = codes.make_decode_tile(decode, v_layout, tile_n, num_threads)
    else:
        copy_k = copies.make_copy_tile(element, k_layout, tile_n, *copy, of_keys)
        copy_v = copies.make_copy_tile(element, v_layout, tile_n, *copy, of_keys)
        fetch_k = copies.make_fetch_tile(copy_k, k_smem, k_words, tile_n)
        fetch_v = copies.make_fetch_tile(copy_v, v_smem, v_words, tile_n)
        k_step, v_step = k_words, v_words
    origin_of_keys = pages.make_origin_of_keys(traits)
    descale_of = descales.make_descale_of(traits)
    row_operand, column_operand = fragments.make_operands(k_layout)
    first_of_v, _ = elements.make_transposed_operand(element, v_layout)
    multiply_q_k = products.make_product_nt(element, m_tiles, n_tiles, k_layout, k_layout)
    multiply_p_v = products.make_product_pn(element, m_tiles, n_tiles, o_tiles, v_layout)
    apply_functions = make_apply_functions(m_tiles, n_tiles, traits, True, False)
    mask_scores = make_mask_scores(m_tiles, n_tiles)
    online_softmax = softmax.make_online_softmax(m_tiles, n_tiles, o_tiles)
    scale_rows = softmax.make_scale_rows(m_tiles, o_tiles)
    # Where sequences have lengths of their own only some tiles are split.
    has_parts, is_part = is_split and traits.ragged, is_split and not traits.ragged
    end_of_row, lse_of_row = make_end_of_row(traits.features, LN_2, is_part)
    if two_steps := ends_in_two_steps(traits):
        end_of_only_part, lse_of_row = make_end_of_only_part(traits.features, LN_2)
    is_float32 = is_part or traits.float32_out
    store_as = (
        traits.vectorized or is_part,
        is_float32,
        copies.row_of_packed_heads,
        traits.float32_out,
    )
    store_o = copies.make_store_rows(element, m_tiles, o_tiles, *store_as)
    finish_part = make_finish_part(config, traits) if has_parts else None
    kv = kv_of(traits, element.storage)
    storage, args_of_head = element.storage, features.make_args_of_head(traits)
    bends, has_functions = traits.shapes_scores, traits.has_functions
    drops = traits.drops_weights
    weigh_scores = dropout.make_weigh_scores(m_tiles, n_tiles, traits.features)
    is_computed = make_is_computed(traits)
    out_storage = f32 if is_float32 else storage
    # Copies that may be on their way while the next tile is used: K and V of all stages but one.
    wait_for_tile = CP_ASYNC_WAIT_GROUP[2 * num_stages - 2]

    def forward(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: kv,  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: kv,  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        out: Part[out_storage],  # (split, batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q)
        in_fp8: Pointer(i32),  # (batch, num_heads_kv)
        mask: mask_of(traits),
        shape: shape_of(traits),
        layout: Layout,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, u32, alignment=128)
        s_acc = cuda.local.array(n_scores, f32)
        o_acc = cuda.local.array(n_o, f32)
        row_max = cuda.local.array(rows, f32)
        row_sum = cuda.local.array(rows, f32)

        grid = grid_of(shape, layout)
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), quotient(shape.num_heads_q, layout.pack), shape):
            return
        place = place_of(mov_ctaid_x(), grid, shape, mask)
        m_start, head, head_kv, batch, split = place[:5]
        # Heads that are computed on 8-bit floats are another kernel's.
        if not is_computed(in_fp8, place, shape):
            return
        sequence = sequence_of(place, shape, mask)
        num_rows = i32(sequence.seqlen_q * layout.pack)
        q_origin = first_of_rows(q, batch, head, sequence.first_q), layout.pack
        k_from = origin_of_keys(k, place, sequence, shape)
        v_from = origin_of_keys(v, place, sequence, shape)
        args = args_of_head(scores, batch, head)
        # Of K and V that are codes a factor goes to scores, and another to O.
        scale = scores.scale * descale_of(k, batch, head_kv)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scale * LOG2_E
        # Tiles of keys that some of these rows see, and those that all of them see.
        n_begin, n_end = keys_of(place, grid, sequence, mask)
        whole = whole_keys(m_start, grid, sequence)

        # This lane's position in the operands, and of its scores in the tile.
        lane = cuda.threadIdx.x % 32
        warp_row = first_row_of_warp(rows_per_warp)
        q_mine = q_smem + row_operand(warp_row, 0, lane)
        k_mine = k_smem + column_operand(0, 0, lane)
        v_mine = v_smem + first_of_v(lane)

        # Without keys nothing would wait for Q.
        if n_begin < n_end:
            copy_q(smem, q_smem, q, q_origin, m_start, num_rows, shape.head_dim)
        for stage in range(num_stages):
            n = i32(n_begin + stage)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, k_from, n_block, stage, sequence.seqlen_k, shape.head_dim)
            if asynchronous:
                cp_async_commit_group()
            if stage < num_stages - 1:
                if n < n_end:
                    n_block, _ = tile_at(mask, n)
                    fetch_v(smem, v, v_from, n_block, stage, sequence.seqlen_k, shape.head_dim_v)
                if asynchronous:
                    cp_async_commit_group()
        for i in range(n_o):
            o_acc[i] = f32(0)
        for r in range(rows):
            row_max[r] = NEG_INF
            row_sum[r] = f32(0)

        stage = i32(0)
        last_stage = i32(num_stages - 1)
        for step in range(n_begin, n_end):
            # K of this block must have arrived. The barrier shows it to all threads, and V's last
            # readers are through with the buffer that the next V goes to. Of codes a thread
            # decodes what it has copied; all have read the last K, and that barrier is behind.
            if asynchronous:
                wait_for_tile()
            if coded:
                decode_k(smem, k_smem, k_codes + k_code_words * stage)
            cuda.syncthreads()
            n = i32(step + num_stages - 1)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_v(smem, v, v_from, n_block, last_stage, sequence.seqlen_k, shape.head_dim_v)
            if asynchronous:
                cp_async_commit_group()

            # S = Q K^T
            multiply_q_k(s_acc, smem, q_mine, k_mine + k_step * stage)

            # V of this block must have arrived, for all threads, and all have read K, whose buffer
            # the next K goes to. Of codes likewise.
            if asynchronous:
                wait_for_tile()
            if coded:
                decode_v(smem, v_smem, v_codes + v_code_words * stage)
            cuda.syncthreads()
            n = i32(step + num_stages)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                fetch_k(smem, k, k_from, n_block, stage, sequence.seqlen_k, shape.head_dim)
            if asynchronous:
                cp_async_commit_group()

            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            if has_functions:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                corner = Corner(i, j, sequence, is_full)
                apply_functions(s_acc, s_acc, corner, scale, scores, args)
            if n_start < whole.first or n_start > whole.last:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                mask_scores(s_acc, i, j, sequence.seqlen_k, sequence, layout.pack)

            # P = softmax(S), O += P V
            online_softmax(s_acc, row_max, row_sum, o_acc, scale_log2)
            if drops:
                i = i32(m_start + accumulator_row(rows_per_warp))
                j = i32(n_start + accumulator_column())
                weigh_scores(s_acc, i, j, args.drawn)
            multiply_p_v(o_acc, s_acc, smem, v_mine + v_step * stage)
            last_stage = stage
            stage = i32(stage + 1 if stage + 1 < num_stages else 0)

        of_values = descale_of(v, batch, head_kv)
        if has_parts and place.slot >= 0:
            sums = o_acc, row_max, row_sum
            finish_part(sums, (scale_log2, of_values), place, num_rows, shape, layout.pack)
            return
        row = i32(m_start + accumulator_row(rows_per_warp))
        for r in range(rows):
            i, total = i32(row + ROW_STEP * r), row_sum_of_quad(row_sum[r])
            token = token_of_row(i, layout.pack)
            packed, top = i - token * layout.pack, row_max[r] * scale_log2
            if two_steps:
                row_sum[r], row_max[r], top, total = end_of_only_part(
                    top, total, scores.features, batch, head + packed
                )
            else:
                row_sum[r], top, total = end_of_row(
                    top, total, scores.features, batch, head + packed
                )
            if accumulator_column() == 0 and i < num_rows:
                first = first_of_lse(place, packed, sequence, grid, shape)
                lse[first + token] = lse_of_row(top, total)
            row_sum[r] *= of_values
        scale_rows(o_acc, row_sum)
        if two_steps:
            scale_rows(o_acc, row_max)
        out_base = split * out.split + first_of_rows(out, batch, head, sequence.first_q)
        store_o(o_acc, out, (out_base, layout.pack), row, num_rows, shape.head_dim_v)

    return Kernel(config.family, forward, num_threads, config.smem_bytes(traits))
