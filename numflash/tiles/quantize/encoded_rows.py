"""Rotated rows written as e4m3 codes: what `tiles.rotary.make_turn_heads` stores them by.

With one rounding: of x * (1 / factor) in float32, where x is rotated. Each head has a factor of
its own.
"""

from numflash.ptx import (
    cuda,
    device_function,
    f32,
    i32,
    mul_rn_f32,
    st_global_v2_u32,
    u8,
    u16,
    u32,
)
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize.conversions import make_encode
from numflash.tiles.quantize.descales import descale_of
from numflash.tiles.rotary import Rotary, Stores


def make_code_stores(dtype: str, parts: Rotary, interleaved: bool, vectorized: bool) -> Stores:
    """Of codes: `out` is a record `CodedKeys`, `to` (offset of the first head, entry, that head).

    The entry and the head say whose the factors are.
    """
    pairs, (_, n_bits) = parts.pairs, parts.bits
    encode_four, to_f32 = make_encode("e4m3", "sm80"), ELEMENTS[dtype].to_f32

    @device_function
    def factor_of(out, to, h):
        return f32(1) / descale_of(out, to[1], to[2] + h)

    @device_function
    def store_codes(values, out, offset, factor):
        for i in range(pairs):
            values[i] = mul_rn_f32(values[i], factor)
        if vectorized:
            words = cuda.local.array(2, u32)
            words[0] = encode_four(values[0], values[1], values[2], values[3])
            words[1] = encode_four(values[4], values[5], values[6], values[7])
            st_global_v2_u32(out.data, offset, words)
        else:
            code = encode_four(values[0], f32(0), f32(0), f32(0))
            out.data[offset] = u8(code & u32(0xFF))

    @device_function
    def store_turned(bits, values, out, to, h, chunk, half):
        factor = factor_of(out, to, h)
        first, apart = chunk * pairs, half
        if interleaved:
            first, apart = 2 * chunk * pairs, i32(pairs)
        offset = to[0] + h * out.head + first
        store_codes(values[:pairs], out, offset, factor)
        store_codes(values[pairs:], out, offset + apart, factor)

    @device_function
    def columns_on(to, columns):
        return to[0] + columns, to[1], to[2]

    @device_function
    def store_copied(bits, out, to, h):
        values = cuda.local.array(pairs, f32)
        if vectorized:
            for i in range(n_bits):
                values[2 * i] = to_f32(u16(bits[i] & u32(0xFFFF)))
                values[2 * i + 1] = to_f32(u16(bits[i] >> u32(16)))
        else:
            values[0] = to_f32(bits[0])
        factor = factor_of(out, to, h)
        store_codes(values, out, to[0] + h * out.head, factor)

    return Stores(store_turned, columns_on, store_copied)
