"""Quantisation: codes and scales of float16, bfloat16 or float32, in one pass over them.

A block owns block_tokens tokens of one head. Its threads load all of them to registers before
anything else, so that many bytes are in flight, rotate rows, find the maximum of the numbers that
share a scale, and store codes: by rows, or with the tokens innermost. With scale "given" the
maximum comes from an array (`amax`). With statistics the sums of x ** 2 and of (x - descale code)
** 2 over the block are stored too. `codes` is another kernel: it lays existing codes out again.

In machine code, a thread and element (bfloat16, head_dim 128, blocks of 128, rotated, sm_90a):

    1      to float32
    1.5    sign: a mask, used in two rows, and an exclusive or
    7      butterflies, FADD, or FFMA where they go over lanes
    2      SHFL
    2      FMUL: the transform's factor, the scale
    1      FMNMX
    1/2    F2FP: two codes
    1/4    LDG of 16 bytes, all before the first use, and STG of 8
    4      addresses, bounds, two divisions, the block's maximum: 250 a thread of 64 elements

Without the rotation 1, 1, 1 and 1/2 of these remain; transposing adds 1/2 PRMT, 1/2 SEL and 1/4
STS, and stores 16 bytes at a time.

The operations are those of `numflash.reference.quantize_fp8`, so that results have the same bits.

Source: FlashAttention-3, arXiv 2407.08608, section 3.3.
"""

from collections.abc import Callable
from functools import cache

from numflash.configs import QuantizeConfig, Traits
from numflash.configs.formats import FORMATS
from numflash.kernels.arguments import Pointer, Tensor
from numflash.kernels.kernel import Kernel
from numflash.kernels.quantize.amax import (
    SMALLEST_AMAX,
    make_load_values,
    make_measure_kernel,
    rows_of,
)
from numflash.kernels.quantize.arguments import Grouped, Signs, Sizes
from numflash.ptx import cuda, device_function, f32, i32, i64, u8, u16, u32
from numflash.ptx.arithmetic import cvt_f32_f16, fma_rn_f32, max_f32
from numflash.ptx.memory import st_global_v2_u32, st_global_v4_u32
from numflash.tiles.addresses import first_of_head
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import quotient, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize import conversions, transposition
from numflash.tiles.quantize.rows import (
    Rows,
    make_decode,
    make_largest,
    make_load_rows,
    make_max_of_block,
    make_max_of_lanes,
    make_place_of_thread,
    make_sums_of_block,
    make_tokens,
)
from numflash.tiles.unrolled import make_unrolled


def make_quantize_kernel(config: QuantizeConfig, traits: Traits) -> Kernel:
    """The kernel for one config; see the module's docstring, and `amax` for `measure`."""
    why = config.misfit(traits)
    if why is not None:
        raise ValueError(f"quantize config {config} for {traits}: {why}")
    if config.measure:
        return make_measure_kernel(config, traits)
    if config.codes:
        return _make_relayout_kernel(config, traits)
    rows = rows_of(config, traits)
    n_rows, lanes, columns = rows.rows, rows.lanes, rows.columns
    row_elements, row_codes = rows.chunks * columns, rows.chunks * columns // 4
    storage, block_tokens = ELEMENTS[traits.dtype].storage, config.block_tokens
    num_warps, scratch = config.num_warps, config.tile_words(traits)
    transposed, has_statistics = config.transposed, config.statistics
    is_block, is_token = config.scale == "block", config.scale == "token"
    n_values, n_codes = n_rows * row_elements, n_rows * row_codes
    n_scales = n_rows if is_token else 1

    load_values = make_load_values(config, traits)
    first_token_of_row, _ = make_tokens(rows)
    place_of_thread = make_place_of_thread(lanes)
    find_amaxes = _make_find_amaxes(config, rows)
    largest_of_thread = make_largest(n_values)
    max_of_block, sums_of_block = make_max_of_block(num_warps), make_sums_of_block(num_warps)
    encode_rows = _make_encode_rows(config, rows)
    store_codes = _make_store_codes(config, traits, rows)
    peak = f32(FORMATS[config.format].peak)

    def quantize(
        x: Tensor[storage],  # (batch, seqlen, num_heads, head_dim)
        amax: Grouped,  # (batch, num_heads, groups of tokens)
        data: Pointer(u8),
        descale: Pointer(f32),
        statistics: Pointer(f32),  # (batch, num_heads, blocks of tokens, 2)
        sizes: Sizes,
        signs: Signs,
    ):
        values = cuda.local.array(n_values, f32)
        codes = cuda.local.array(n_codes, u32)
        amaxes = cuda.local.array(n_scales, f32)
        smem = cuda.shared.array(0, f32)

        # With the tokens innermost their number is a multiple of 64, filled up with code 0.
        stored = tiles_of(sizes.seqlen, 64) * 64 if transposed else sizes.seqlen
        num_blocks = tiles_of(stored, block_tokens)
        # The compiler reads `blockIdx` again where it needs it, but would keep `mov_ctaid_x`.
        block, head, batch = place_in_heads(cuda.blockIdx.x, num_blocks, sizes.num_heads)
        row, lane = place_of_thread()
        token = i32(block * block_tokens + first_token_of_row(row))
        base = first_of_head(x, batch, head)
        load_values(values, x, base, token, sizes, lane, signs)

        num_scaled = tiles_of(sizes.seqlen, block_tokens)
        head_of_batch = i64(batch) * sizes.num_heads + head
        place = head_of_batch * num_scaled + block
        if is_token:
            find_amaxes(0, amaxes, values, descale, head_of_batch, token, sizes.seqlen, lane)
        elif is_block:
            amaxes[0] = max_of_block(largest_of_thread(values), smem, scratch)
            amaxes[0] = max_f32(amaxes[0], SMALLEST_AMAX)
            if cuda.threadIdx.x == 0 and block < num_scaled:
                descale[place] = amaxes[0] / peak
        else:
            offset = first_of_head(amax, batch, head)
            group = quotient(block * block_tokens, amax.tokens)
            amaxes[0] = amax.data[offset + group]

        sums = cuda.local.array(2, f32)
        sums[0], sums[1] = f32(0), f32(0)
        scale = peak / amaxes[0]
        encode_rows(0, codes, values, amaxes, scale, sums)
        store_codes(codes, data, batch, head, token, block, sizes)
        if has_statistics and block < num_scaled:
            sums_of_block(sums[0], sums[1], smem, scratch + num_warps, statistics, 2 * place)

    return Kernel(config.family, quantize, config.num_threads, config.smem_bytes(traits))


def _make_relayout_kernel(config: QuantizeConfig, traits: Traits) -> Kernel:
    """Codes laid out again: filled up to the padded head_dim, and transposed where wanted."""
    rows = rows_of(config, traits)
    n_words = rows.rows * rows.chunks * rows.columns // 4
    lanes, columns, block_tokens = rows.lanes, rows.columns, config.block_tokens
    transposed = config.transposed
    load_rows = make_load_rows(rows, 1, traits.vectorized)
    first_token_of_row, _ = make_tokens(rows)
    place_of_thread = make_place_of_thread(lanes)
    store_codes = _make_store_codes(config, traits, rows)

    def quantize(
        x: Tensor[u8],  # (batch, seqlen, num_heads, head_dim)
        data: Pointer(u8),
        sizes: Sizes,
    ):
        codes = cuda.local.array(n_words, u32)
        stored = tiles_of(sizes.seqlen, 64) * 64 if transposed else sizes.seqlen
        num_blocks = tiles_of(stored, block_tokens)
        block, head, batch = place_in_heads(cuda.blockIdx.x, num_blocks, sizes.num_heads)
        row, lane = place_of_thread()
        token = i32(block * block_tokens + first_token_of_row(row))
        column = lane * columns
        base = first_of_head(x, batch, head) + column
        load_rows(codes, x, base, token, sizes.seqlen, i32(sizes.head_dim - column))
        store_codes(codes, data, batch, head, token, block, sizes)

    return Kernel(config.family, quantize, config.num_threads, config.smem_bytes(traits))


@cache
def _make_find_amaxes(config: QuantizeConfig, rows: Rows) -> Callable:
    """find_amaxes(0, amaxes, values, descale, head, token, seqlen, lane): one of each token."""
    row_elements = rows.chunks * rows.columns
    largest_of_row, max_of_lanes = make_largest(row_elements), make_max_of_lanes(rows.lanes)
    _, token_of_row = make_tokens(rows)
    peak = f32(FORMATS[config.format].peak)

    @device_function
    def find_amax(r, amaxes, values, descale, head, token, seqlen, lane):
        amaxes[0] = max_f32(max_of_lanes(largest_of_row(values)), SMALLEST_AMAX)
        t = token_of_row(token, r)
        if lane == 0 and t < seqlen:
            descale[head * seqlen + t] = amaxes[0] / peak

    return make_unrolled(find_amax, rows.rows, 1, row_elements)


@cache
def _make_encode_rows(config: QuantizeConfig, rows: Rows) -> Callable:
    """encode_rows(0, codes, values, amaxes, scale, sums): codes, and sums for the statistics.

    `scale` is that of all rows, unless each token has its own of `amaxes`.
    """
    encode_four = conversions.make_encode(config.format, config.generation)
    decode = make_decode(config.format, config.generation)
    row_codes = rows.chunks * rows.columns // 4
    is_token, has_statistics = config.scale == "token", config.statistics
    peak = f32(FORMATS[config.format].peak)

    @device_function
    def error_of(x, code, descale):
        return fma_rn_f32(-descale, cvt_f32_f16(u16(code)), x)

    @device_function
    def sum_of_squares(a, b, c, d):
        return fma_rn_f32(b, b, a * a) + fma_rn_f32(d, d, c * c)

    @device_function
    def encode(_, codes, values, scale, descale, sums):
        a, b, c, d = values[0] * scale, values[1] * scale, values[2] * scale, values[3] * scale
        codes[0] = encode_four(a, b, c, d)
        if has_statistics:
            halves = cuda.local.array(2, u32)
            decode(codes[0], halves)
            a, b, c, d = values[0], values[1], values[2], values[3]
            sums[0] += sum_of_squares(a, b, c, d)
            a = error_of(a, halves[0] & u32(0xFFFF), descale)
            b = error_of(b, halves[0] >> u32(16), descale)
            c = error_of(c, halves[1] & u32(0xFFFF), descale)
            d = error_of(d, halves[1] >> u32(16), descale)
            sums[1] += sum_of_squares(a, b, c, d)

    encode_all = make_unrolled(encode, row_codes, 1, 4)

    @device_function
    def encode_row(r, codes, values, amaxes, scale, sums):
        i = r if is_token else 0
        if is_token:
            scale = peak / amaxes[i]
        encode_all(0, codes, values, scale, amaxes[i] / peak, sums)

    return make_unrolled(encode_row, rows.rows, row_codes, 4 * row_codes)


@cache
def _make_store_codes(config: QuantizeConfig, traits: Traits, rows: Rows) -> Callable:
    """store_codes(codes, data, batch, head, token, block, sizes): all of a block.

    All threads call it together.
    """
    n_rows, lanes, columns, chunks = rows.rows, rows.lanes, rows.columns, rows.chunks
    head_dim, n_codes = traits.head_dim, columns // 4
    row_codes, chunk_columns, eighths = chunks * n_codes, lanes * columns, columns // 8
    quad_step, block_tokens = rows.step, config.block_tokens
    _, token_of_row = make_tokens(rows)
    place_of_thread = make_place_of_thread(lanes)
    store_vector = st_global_v2_u32 if n_codes == 2 else st_global_v4_u32

    if not config.transposed:

        @device_function
        def store_chunk(c, codes, data, offset):
            store_vector(data, offset + chunk_columns * c, codes)

        store_chunks = make_unrolled(store_chunk, chunks, n_codes)

        @device_function
        def store_row(r, codes, data, batch, head, token, sizes, column):
            t = token_of_row(token, r)
            if t < sizes.seqlen:
                row = (i64(batch) * sizes.seqlen + t) * sizes.num_heads + head
                store_chunks(0, codes, data, row * head_dim + column)

        store_rows = make_unrolled(store_row, n_rows, row_codes)

        @device_function
        def store_codes(codes, data, batch, head, token, block, sizes):
            _, lane = place_of_thread()
            store_rows(0, codes, data, batch, head, token, sizes, lane * columns)

        return store_codes

    store_quad = transposition.make_store_quad(block_tokens, columns)
    store_columns = transposition.make_store_columns(block_tokens, head_dim, config.num_threads)

    @device_function
    def fill_row(r, codes, token, seqlen):
        # Padding is code 0, not the result of rotated zeros.
        if token_of_row(token, r) >= seqlen:
            fill_codes(0, codes)

    @device_function
    def fill(_, codes):
        codes[0] = u32(0)

    fill_codes = make_unrolled(fill, row_codes, 1)
    fill_rows = make_unrolled(fill_row, n_rows, row_codes)

    @device_function
    def store_chunk(c, _, codes, tile, eighth, quad):
        store_quad(tile, codes[n_codes * c :], row_codes, eighth + lanes * eighths * c, quad)

    @device_function
    def store_quads(q, codes, tile, eighth, row):
        store_chunks(0, codes, codes, tile, eighth, row + quad_step * q)

    store_chunks = make_unrolled(store_chunk, chunks, 0)
    store_all_quads = make_unrolled(store_quads, n_rows // 4, 4 * row_codes)

    @device_function
    def store_codes(codes, data, batch, head, token, block, sizes):
        tile, pieces = cuda.shared.array(0, u32), cuda.shared.array(0, f32)
        fill_rows(0, codes, token, sizes.seqlen)
        row, lane = place_of_thread()
        store_all_quads(0, codes, tile, lane * eighths, row)
        # The quads of all threads must have arrived: columns are stored across them.
        cuda.syncthreads()
        stored = i64(tiles_of(sizes.seqlen, 64)) * 64
        first_column = (i64(batch) * sizes.num_heads + head) * head_dim
        begin = i64(block) * block_tokens
        store_columns(pieces, data, first_column * stored + begin, stored, stored - begin)

    return store_codes
