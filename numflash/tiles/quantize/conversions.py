"""Conversions to and from 8-bit floats in the registers of a thread.

Each factory takes a generation: "sm89" has instructions for it, "sm75" and "sm80" do it by
arithmetic. All give the bits that `numflash.configs.formats` defines.

By arithmetic x is rounded to m bits after the point by adding 2 ** (23 - m) times its power of
two, or times the smallest normal power of two where x is smaller: the last bit of the sum is the
last bit of the result. So it is rounded once, to nearest, ties to even.
"""

from collections.abc import Callable
from functools import cache

from numflash.ptx import (
    bits_as_float,
    cvt_f32_f16,
    cvt_rn_f16x2_e4m3x2,
    cvt_rn_f16x2_f32,
    cvt_rn_satfinite_e4m3x2_f32,
    cvt_rn_satfinite_e5m2x2_f32,
    device_function,
    f32,
    float_as_bits,
    fma_rn_f32,
    lop3_select_b32,
    max_f32,
    min_f32,
    mov_b32_halves,
    mul_rn_f16x2,
    prmt_b32,
    u16,
    u32,
)

GENERATIONS = ("sm75", "sm80", "sm89")
# format -> bits after the point, exponent of the smallest normal number, largest number.
_FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}
_ENCODE_TWO = {"e4m3": cvt_rn_satfinite_e4m3x2_f32, "e5m2": cvt_rn_satfinite_e5m2x2_f32}
_EXPONENT = u32(0x7F800000)
_EACH_SIGN = u32(0x80808080)
_NOT_SIGNS = u32(0x7F7F7F7F)


@cache
def make_encode(format: str, generation: str) -> Callable:
    """encode_four(a, b, c, d): four float32 to a register of four codes, a's in the lowest byte.

    Nearest, ties to even; numbers outside saturate; NaN becomes 0x7f; zeros keep their sign.
    Machine code: 2 instructions on sm_89 and later, 37 by arithmetic.
    """
    if generation == "sm89":
        encode_two = _ENCODE_TWO[format]

        @device_function
        def encode_four(a, b, c, d):
            return mov_b32_halves(encode_two(b, a), encode_two(d, c))

        return encode_four

    encode_one = _make_encode_magnitude(*_FORMATS[format])

    @device_function
    def encode_four(a, b, c, d):
        low = prmt_b32(encode_one(a), encode_one(b), u32(0x40))
        high = prmt_b32(encode_one(c), encode_one(d), u32(0x40))
        codes = prmt_b32(low, high, u32(0x5410))
        low = prmt_b32(float_as_bits(a), float_as_bits(b), u32(0x73))
        high = prmt_b32(float_as_bits(c), float_as_bits(d), u32(0x73))
        codes |= prmt_b32(low, high, u32(0x5410)) & _EACH_SIGN
        if a != a or b != b or c != c or d != d:
            codes = _nan_code(codes, a, u32(0))
            codes = _nan_code(codes, b, u32(8))
            codes = _nan_code(codes, c, u32(16))
            codes = _nan_code(codes, d, u32(24))
        return u32(codes)

    return encode_four


def _make_encode_magnitude(digits: int, smallest: int, largest: float) -> Callable:
    """encode(x): the code of |x|, which is at most the largest number; a NaN becomes some code."""
    limit, least = f32(largest), f32(2.0**smallest)
    shift = u32(23 - digits)
    to_last_bit = f32(2.0 ** (23 - digits))
    # The sum's bits less those of its power of two are a multiple of the last bit, below twice
    # 2 ** digits; a code's exponent counts from the smallest normal number.
    bias = u32((23 - digits << 23) + (127 + smallest << digits))

    @device_function
    def encode(x):
        magnitude = min_f32(abs(x), limit)
        power = max_f32(bits_as_float(u32(float_as_bits(magnitude) & _EXPONENT)), least)
        total = float_as_bits(fma_rn_f32(power, to_last_bit, magnitude))
        exponent = float_as_bits(power)
        return u32(total - exponent + (exponent >> shift) - bias)

    return encode


@device_function
def _nan_code(codes, x, shift):
    """`codes` with 0x7f in the byte at bit `shift` if x is NaN."""
    return u32(codes & ~(u32(0xFF) << shift) | u32(0x7F) << shift) if x != x else u32(codes)


@cache
def make_decode_halves(generation: str) -> Callable:
    """decode(word, target): four e4m3 codes to float16, which is exact; a NaN becomes 0x7fff.

    target[0] holds those of codes 0 and 1, target[1] those of codes 2 and 3, the first one low.
    Machine code: 3 instructions on sm_89, 2 on sm_120, 11 by arithmetic.
    """
    if generation == "sm89":

        @device_function
        def decode(word, target):
            target[0] = cvt_rn_f16x2_e4m3x2(u16(word & u32(0xFFFF)))
            target[1] = cvt_rn_f16x2_e4m3x2(u16(word >> u32(16)))

        return decode

    @device_function
    def decode(word, target):
        # A code's bits, one to the right, are 2 ** -8 times its number as float16. With the top
        # bit of the exponent it is a NaN: a code that carries when 1 is added gets it.
        magnitudes = u32(word & _NOT_SIGNS)
        carries = u32(magnitudes + u32(0x01010101))
        shifted = u32(lop3_select_b32(_EACH_SIGN, carries, word) >> u32(1))
        upper = lop3_select_b32(_NOT_SIGNS, shifted, word)
        lower = u32(word << u32(7)) & _EACH_SIGN
        target[0] = mul_rn_f16x2(prmt_b32(lower, upper, u32(0x5140)), u32(0x5C005C00))
        target[1] = mul_rn_f16x2(prmt_b32(lower, upper, u32(0x7362)), u32(0x5C005C00))

    return decode


@cache
def make_decode(dtype: str, generation: str) -> Callable:
    """decode(word, target): as `make_decode_halves`, to float16 or bfloat16, both exact."""
    halves = make_decode_halves(generation)
    if dtype == "float16":
        return halves

    @device_function
    def decode(word, target):
        halves(word, target)
        for i in range(2):
            # A code has fewer digits than bfloat16: the lower halves of its float32 are zeros.
            low = float_as_bits(cvt_f32_f16(u16(target[i] & u32(0xFFFF))))
            high = float_as_bits(cvt_f32_f16(u16(target[i] >> u32(16))))
            target[i] = prmt_b32(low, high, u32(0x7632))

    return decode


@cache
def make_round_to_e4m3(generation: str) -> Callable:
    """round_two(low, high): two float32 from 0 to 448, rounded to e4m3, as two float16.

    A NaN stays a NaN, beside which the other number may come out wrong on sm75. Machine code: 2
    instructions on sm_89 and later, 9 on sm_80, 13 on sm_75.
    """
    if generation == "sm89":

        @device_function
        def round_two(low, high):
            return cvt_rn_f16x2_e4m3x2(cvt_rn_satfinite_e4m3x2_f32(high, low))

        return round_two

    digits, smallest, _ = _FORMATS["e4m3"]
    least, to_last_bit = f32(2.0**smallest), f32(2.0 ** (23 - digits))

    @device_function
    def round_one(x):
        power = max_f32(bits_as_float(u32(float_as_bits(x) & _EXPONENT)), least)
        total = fma_rn_f32(power, to_last_bit, x)
        return fma_rn_f32(-power, to_last_bit, total)

    if generation == "sm80":

        @device_function
        def round_two(low, high):
            return cvt_rn_f16x2_f32(round_one(high), round_one(low))

        return round_two

    # float16 by shifts: its conversion would take turns with the exponentials in their slow unit.
    rebias = f32(2.0**-112)

    @device_function
    def round_two(low, high):
        # Bits of a NaN spill over: `|` keeps it a NaN, where a carry could make it a number.
        low = float_as_bits(round_one(low) * rebias)
        high = float_as_bits(round_one(high) * rebias)
        return u32(low >> u32(13) | high << u32(3))

    return round_two
