"""Element types: how float16, bfloat16 and float32 lie in memory, and as float32 in registers.

Sixteen-bit elements travel as raw bits, which every GPU and every compiler version can load. The
conversions to float32 are exact; those from float32 round to nearest, ties to even.
"""

from collections.abc import Callable
from dataclasses import dataclass

from numflash.ptx import (
    bits_as_float,
    cuda,
    cvt_f32_f16,
    cvt_rn_f16_f32,
    device_function,
    f32,
    float_as_bits,
    ld_global_v4_f32,
    ld_global_v4_u32,
    st_global_v2_u32,
    st_global_v4_f32,
    u16,
    u32,
)


@dataclass(frozen=True)
class Element:
    """One element type.

    Attributes:
        storage: the scalar type in memory: f32, or u16 for the bits of a 16-bit float.
        vector: elements in 16 bytes.
        to_f32: storage -> f32.
        from_f32: f32 -> storage.
        load_vector: (values, source, offset): values[:vector] = the 16 bytes at source[offset].
        store_four: (target, offset, values): target[offset : offset + 4] = values[:4].
    """

    storage: type
    vector: int
    to_f32: Callable
    from_f32: Callable
    load_vector: Callable
    store_four: Callable


@device_function
def _same(x):
    return x


@device_function
def _load_four_f32(values, source, offset):
    ld_global_v4_f32(values, source, offset)


@device_function
def _store_four_f32(target, offset, values):
    st_global_v4_f32(target, offset, values)


@device_function
def _bf16_to_f32(bits):
    return bits_as_float(u32(bits) << 16)


@device_function
def _bf16_from_f32(x):
    # Integer arithmetic, because the conversion instruction begins with sm_80.
    bits = float_as_bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's mantissa into an infinity.
    return u16(rounded if x == x else 0x7FFF)


def _sixteen_bit(to_f32: Callable, from_f32: Callable) -> Element:
    @device_function
    def load_vector(values, source, offset):
        words = cuda.local.array(4, u32)
        ld_global_v4_u32(words, source, offset)
        for i in range(4):
            values[2 * i] = to_f32(u16(words[i] & 0xFFFF))
            values[2 * i + 1] = to_f32(u16(words[i] >> 16))

    @device_function
    def store_four(target, offset, values):
        words = cuda.local.array(2, u32)
        for i in range(2):
            low = u32(from_f32(values[2 * i]))
            high = u32(from_f32(values[2 * i + 1]))
            words[i] = low | (high << 16)
        st_global_v2_u32(target, offset, words)

    return Element(u16, 8, to_f32, from_f32, load_vector, store_four)


ELEMENTS: dict[str, Element] = {
    "float32": Element(f32, 4, _same, _same, _load_four_f32, _store_four_f32),
    "float16": _sixteen_bit(cvt_f32_f16, cvt_rn_f16_f32),
    "bfloat16": _sixteen_bit(_bf16_to_f32, _bf16_from_f32),
}
"""dtype name -> Element."""

__all__ = ["ELEMENTS", "Element"]
