"""Codes of e4m3 on their way to the tensor cores: as they are, or as float16, which is exact.

    sm89         products of e4m3, 32 keys deep; tiles in shared memory are copied as they are
    sm89-half    products of float16; codes are converted on their way to shared memory
    sm80, sm75   the same, with conversions by arithmetic

P is e4m3 in all of them. V lies with tokens innermost (`numflash.reference.tokens_innermost`), in
the order in which four neighbouring codes of P leave the accumulators of a thread; as float16 the
tokens are put back in order while they are converted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    i32,
    ld_global_v4_u32,
    ldmatrix_x4,
    mma_m16n8k32_e4m3,
    mov_tid_x,
    st_shared_v4_u32,
    u8,
    u32,
)
from numflash.tiles.addresses import row_of_head
from numflash.tiles.mma.copies import make_copy_tile
from numflash.tiles.mma.elements import MMA_ELEMENTS, MmaElement
from numflash.tiles.mma.layouts import TileLayout, make_word
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize.conversions import make_decode_halves, make_encode, make_round_to_e4m3

CODES_PER_CHUNK = 16


@dataclass(frozen=True)
class Fp8Operands:
    """e4m3 on one generation of tensor cores.

    Attributes:
        element: the product, and how its operands are read from shared memory.
        is_asynchronous: whether copies to shared memory run ahead.
        make_copy_rows: (layout, rows, num_threads, address): copies of Q and K, as
            `mma.copies.make_copy_tile`.
        make_copy_columns: the same for V, whose rows are the columns of the result.
    """

    element: MmaElement
    is_asynchronous: bool
    make_copy_rows: Callable
    make_copy_columns: Callable


@cache
def fp8_operands(generation: str, multiplies_codes: bool) -> Fp8Operands:
    """The operands of a config."""
    if multiplies_codes:
        element = _codes_element(generation)

        def make_copy(layout, rows, num_threads, address=row_of_head):
            return make_copy_tile(element, layout, rows, num_threads, True, True, address)

        return Fp8Operands(element, True, make_copy, make_copy)
    product = "sm75" if generation == "sm75" else "sm80"
    element = _half_element(MMA_ELEMENTS[product, "float16"], generation)
    decode = make_decode_halves(generation)

    def make_copy_rows(layout, rows, num_threads, address=row_of_head):
        return _make_copy_decoded(decode, layout, rows, num_threads, address, False)

    def make_copy_columns(layout, rows, num_threads):
        return _make_copy_decoded(decode, layout, rows, num_threads, row_of_head, True)

    return Fp8Operands(element, False, make_copy_rows, make_copy_columns)


@cache
def result_element(generation: str, dtype: str) -> MmaElement:
    """The 16-bit type that results are stored as."""
    product = "sm75" if generation == "sm75" else "sm80"
    float16 = MMA_ELEMENTS[product, "float16"]
    if (product, dtype) in MMA_ELEMENTS:
        return MMA_ELEMENTS[product, dtype]
    from_f32 = ELEMENTS[dtype].from_f32

    @device_function
    def pack_two(low, high):
        return u32(from_f32(low)) | u32(from_f32(high)) << 16

    return replace(float16, pack_two=pack_two)


@device_function
def scale_of_key(descale, base, key):
    """A key's scale; `descale` has `data`, where its head begins at `base`, and `shift`."""
    return descale.data[base + (key >> descale.shift)]


def _codes_element(generation: str) -> MmaElement:
    encode_four = make_encode("e4m3", generation)

    @device_function
    def pack(frag, acc, first):
        # Of each 16 keys a thread has two in either of two products: the order of V's tokens.
        for half in range(2):
            i = first + 8 * half
            frag[2 * half] = encode_four(acc[i], acc[i + 1], acc[i + 4], acc[i + 5])
            frag[2 * half + 1] = encode_four(acc[i + 2], acc[i + 3], acc[i + 6], acc[i + 7])

    return MmaElement(u8, CODES_PER_CHUNK, 32, 2, mma_m16n8k32_e4m3, ldmatrix_x4, pack, None)


def _half_element(float16: MmaElement, generation: str) -> MmaElement:
    round_two = make_round_to_e4m3(generation)

    @device_function
    def pack(frag, acc, first):
        for i in range(4):
            frag[i] = round_two(acc[first + 2 * i], acc[first + 2 * i + 1])

    return MmaElement(u8, 8, 16, 2, float16.mma, float16.load_frag, pack, None)


def _make_copy_decoded(decode, layout: TileLayout, rows, num_threads, address, in_stored_order):
    """copy_tile as `mma.copies.make_copy_tile` makes it, from codes to a tile of float16.

    `in_stored_order`: each 16 codes are 16 tokens in the order in which V is stored.
    """
    code_chunks, word = layout.chunks // 2, make_word(layout)
    passes = -(-rows * code_chunks // num_threads)
    is_exact = rows * code_chunks % num_threads == 0

    @device_function
    def copy_tile(smem, tile, source, origin, first, end, num_columns):
        codes = cuda.local.array(4, u32)
        low = cuda.local.array(4, u32)
        high = cuda.local.array(4, u32)
        pair = cuda.local.array(2, u32)
        thread = mov_tid_x()
        for p in range(passes):
            i = i32(thread + p * num_threads)
            row, chunk = i // code_chunks, i % code_chunks
            source_row, column = i32(first + row), CODES_PER_CHUNK * chunk
            offset = address(source, origin, source_row)
            codes[0], codes[1], codes[2], codes[3] = u32(0), u32(0), u32(0), u32(0)
            if source_row < end and column < num_columns:
                ld_global_v4_u32(codes, source.data, offset + column)
            if in_stored_order:
                # A word holds keys 2 t, 2 t + 1 and 2 t + 8, 2 t + 9.
                for t in range(4):
                    decode(codes[t], pair)
                    low[t], high[t] = pair[0], pair[1]
            else:
                decode(codes[0], low[0:2])
                decode(codes[1], low[2:4])
                decode(codes[2], high[0:2])
                decode(codes[3], high[2:4])
            if is_exact or row < rows:
                st_shared_v4_u32(smem, tile + word(row, 2 * chunk), low)
                st_shared_v4_u32(smem, tile + word(row, 2 * chunk + 1), high)

    return copy_tile
