"""Rows of a head from global memory to the registers of a thread block, and their maxima and sums.

A row is shared by `lanes` neighbouring threads; each has `columns` neighbouring elements of every
chunk of lanes x columns. Rows go round over the threads, or, where codes are to be transposed,
fours of them do: the quads of `transposition`.

A thread loads all it will need as 32-bit words before it uses any, so that many loads are in
flight; then it makes float32 of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from numflash.ptx import (
    bits_as_float,
    cuda,
    device_function,
    f32,
    float_as_bits,
    fma_rn_f32,
    i32,
    ld_global_v4_u32,
    max_f32,
    st_shared_f32,
    u16,
    u32,
)
from numflash.tiles.division import divide
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.quantize.conversions import make_decode_halves
from numflash.tiles.quantize.transposition import first_token_of_quad
from numflash.tiles.unrolled import make_unrolled

_WORD_BYTES = 4
_INFINITY = f32(math.inf)


@dataclass(frozen=True)
class Rows:
    """The rows that the threads of a block have, and the columns of them.

    Attributes:
        lanes: neighbouring threads that share a row.
        rows: rows of which a thread has a part.
        chunks, columns: `columns` neighbouring elements in each of `chunks` chunks.
        step: rows that the block has a part of at once.
        in_quads: rows come in quads.
    """

    lanes: int
    rows: int
    chunks: int
    columns: int
    step: int
    in_quads: bool


@cache
def make_place_of_thread(lanes: int) -> Callable:
    """place_of_thread(): (row, lane) of this thread in its block."""

    @device_function
    def place_of_thread():
        return divide(cuda.threadIdx.x, lanes)

    return place_of_thread


@cache
def make_tokens(rows: Rows) -> tuple[Callable, Callable]:
    """first_token(row), token(first, r): the token of a thread's first row, and of its row r.

    Tokens count from the block's first; `row` is the thread's number divided by the lanes.
    """
    step = rows.step
    if not rows.in_quads:

        @device_function
        def first_token(row):
            return row

        @device_function
        def token(first, r):
            return i32(first + r * step)

        return first_token, token

    @device_function
    def token(first, r):
        return i32(first + r // 4 * 4 * step + r % 2 + r // 2 % 2 * 8)

    return first_token_of_quad, token


@cache
def make_load_rows(rows: Rows, element_bytes: int, vectorized: bool) -> Callable:
    """load_rows(words, source, base, token, end, left)

    The words of the thread's rows: source.data[base + source.row * t + column] for its tokens t,
    of which `token` is the first; base is that of its first column. Zeros from token `end` and
    from its element `left` of a row on.
    """
    columns, chunks, chunk_columns = rows.columns, rows.chunks, rows.lanes * rows.columns
    n_words = columns * element_bytes // _WORD_BYTES
    load_words = _make_load_words(element_bytes, columns, vectorized)
    _, token_of_row = make_tokens(rows)

    @device_function
    def load_chunk(c, words, source, offset, left):
        load_words(0, words, source, offset + chunk_columns * c, left - chunk_columns * c)

    load_chunks = make_unrolled(load_chunk, chunks, n_words)

    @device_function
    def load_row(r, words, source, base, token, end, left):
        t = token_of_row(token, r)
        load_chunks(0, words, source.data, base + t * source.row, left if t < end else i32(0))

    load_all = make_unrolled(load_row, rows.rows, n_words * chunks)

    @device_function
    def load_rows(words, source, base, token, end, left):
        load_all(0, words, source, base, token, end, left)

    return load_rows


@cache
def _make_load_words(element_bytes: int, columns: int, vectorized: bool) -> Callable:
    """load_words(0, words, source, offset, left): `columns` elements, zeros from `left` on.

    If `vectorized`, `left` is a multiple of the elements in 16 bytes.
    """
    n_words = columns * element_bytes // _WORD_BYTES
    per_word, per_vector = _WORD_BYTES // element_bytes, 16 // element_bytes

    if vectorized:

        @device_function
        def load_vector(i, words, source, offset, left):
            words[0], words[1], words[2], words[3] = u32(0), u32(0), u32(0), u32(0)
            if left > i * per_vector:
                ld_global_v4_u32(words, source, offset + i * per_vector)

        return make_unrolled(load_vector, n_words // 4, 4)

    if element_bytes == _WORD_BYTES:

        @device_function
        def load_word(i, words, source, offset, left):
            words[0] = u32(0)
            if i < left:
                words[0] = float_as_bits(source[offset + i])

    else:

        @device_function
        def load_word(i, words, source, offset, left):
            words[0] = u32(0)
            for j in range(per_word):
                if i * per_word + j < left:
                    bits = u32(source[offset + i * per_word + j])
                    words[0] |= bits << u32(8 * element_bytes * j)

    return make_unrolled(load_word, n_words, 1)


@cache
def make_to_f32(dtype: str, loads: int) -> Callable:
    """to_f32(0, values, words): the float32 of `loads` times eight elements."""
    if dtype == "float32":

        @device_function
        def eight_to_f32(_, values, words):
            for i in range(8):
                values[i] = bits_as_float(words[i])

        return make_unrolled(eight_to_f32, loads, 8, 8)
    convert = ELEMENTS[dtype].to_f32

    @device_function
    def eight_to_f32(_, values, words):
        for i in range(4):
            values[2 * i] = convert(u16(words[i] & u32(0xFFFF)))
            values[2 * i + 1] = convert(u16(words[i] >> u32(16)))

    return make_unrolled(eight_to_f32, loads, 8, 4)


@cache
def make_decode(format: str, generation: str) -> Callable:
    """decode(word, halves): four codes to float16, two in each of two words, the first one low."""
    if format == "e4m3":
        return make_decode_halves(generation)

    @device_function
    def decode(word, halves):
        # An e5m2 is the high half of a float16.
        halves[0] = u32((word & u32(0xFF)) << u32(8) | (word & u32(0xFF00)) << u32(16))
        halves[1] = u32((word & u32(0xFF0000)) >> u32(8) | word & u32(0xFF000000))

    return decode


@cache
def make_largest(n: int) -> Callable:
    """largest(values): the largest finite magnitude of n values, a multiple of 8; 0 if none."""
    any_largest = _make_largest_of_any(n)
    take_finite = make_unrolled(_take_finite, n // 8, 8)

    @device_function
    def largest(values):
        found = cuda.local.array(1, f32)
        found[0] = any_largest(values)
        if found[0] == _INFINITY:
            found[0] = f32(0)
            take_finite(0, values, found)
        return found[0]

    return largest


@device_function
def _take_finite(_, values, found):
    for i in range(8):
        # An infinity times zero is NaN, which a maximum ignores.
        found[0] = max_f32(found[0], fma_rn_f32(values[i], f32(0), abs(values[i])))


@device_function
def _largest_of_8(values):
    found = f32(0)
    for i in range(8):
        found = max_f32(found, abs(values[i]))  # ignores NaN
    return found


@cache
def _make_largest_of_any(n: int) -> Callable:
    """largest(values): the largest magnitude of n values, a multiple of 8, by halves."""
    if n == 8:
        return _largest_of_8
    half = n // 16 * 8
    first, second = _make_largest_of_any(half), _make_largest_of_any(n - half)

    @device_function
    def largest(values):
        return max_f32(first(values[:half]), second(values[half:]))

    return largest


@cache
def make_max_of_lanes(lanes: int) -> Callable:
    """max_of_lanes(x): the largest of `lanes` neighbouring threads, in all of them."""
    strides = lanes.bit_length() - 1

    @device_function
    def max_of_lanes(x):
        for s in range(strides):
            x = max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, 1 << s))
        return x

    return max_of_lanes


@cache
def make_max_of_block(num_warps: int) -> Callable:
    """max_of_block(x, smem, first): the largest of all threads, in all of them.

    smem[first : first + num_warps] is written, and read behind a barrier.
    """
    max_of_warp = make_max_of_lanes(32)

    @device_function
    def max_of_block(x, smem, first):
        x = max_of_warp(x)
        if cuda.threadIdx.x % 32 == 0:
            st_shared_f32(smem, first + cuda.threadIdx.x // 32, x)
        # The maxima of all warps must have arrived.
        cuda.syncthreads()
        for i in range(num_warps):
            x = max_f32(x, smem[first + i])
        return x

    return max_of_block


@cache
def make_sums_of_block(num_warps: int) -> Callable:
    """sums_of_block(a, b, smem, first, target, offset): two sums over all threads.

    target[offset] = sum of a, target[offset + 1] = sum of b, added in the same order every time.
    smem[first : first + 2 num_warps] is written, and read behind a barrier.
    """

    @device_function
    def sums_of_block(a, b, smem, first, target, offset):
        for s in range(5):
            a += cuda.shfl_xor_sync(FULL_WARP, a, 1 << s)
            b += cuda.shfl_xor_sync(FULL_WARP, b, 1 << s)
        if cuda.threadIdx.x % 32 == 0:
            st_shared_f32(smem, first + cuda.threadIdx.x // 32, a)
            st_shared_f32(smem, first + num_warps + cuda.threadIdx.x // 32, b)
        # The sums of all warps must have arrived.
        cuda.syncthreads()
        if cuda.threadIdx.x < 2:
            total = f32(0)
            for i in range(num_warps):
                total += smem[first + cuda.threadIdx.x * num_warps + i]
            target[offset + cuda.threadIdx.x] = total

    return sums_of_block
