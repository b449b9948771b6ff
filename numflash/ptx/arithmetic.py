"""Arithmetic and conversions of single values.

Every instruction turns a NaN into the same NaN: 0x7fffffff, as float16 and bfloat16 0x7fff. Moves
keep every bit, and the conversion to tf32 cuts a NaN off.
"""

import math
from functools import cache

import numpy as np

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import f32, i32, u16, u32


@instruction("ex2.approx.ftz.f32 <ret>, <x>;", sm=75)
def ex2_approx_ftz_f32(x: f32) -> f32:
    """2 ** x, to 2 ulp; 0 for -inf and for results below the normal range. PTX ISA 9.7.3.22."""
    x = float(x)
    if x < -126.0:
        return _ZERO
    if x < 128.0:
        _CELL[0] = 2.0**x
        return _CELL[0]
    return _INF if x == x else _NAN


@instruction("max.f32 <ret>, <a>, <b>;", sm=75)
def max_f32(a: f32, b: f32) -> f32:
    """The larger of a and b, +0 above -0; the other one where one is NaN. PTX ISA 9.7.3.12."""
    if a > b:
        return a
    if b > a:
        return b
    if a == b:
        return a if a else a + b
    return a if a == a else b if b == b else _NAN


@instruction("min.f32 <ret>, <a>, <b>;", sm=75)
def min_f32(a: f32, b: f32) -> f32:
    """The smaller of a and b, -0 below +0; the other one where one is NaN. PTX ISA 9.7.3.11."""
    return -max_f32(-a, -b) if a == a or b == b else _NAN


@instruction("mul.rn.f32 <ret>, <a>, <b>;", sm=75)
def mul_rn_f32(a: f32, b: f32) -> f32:
    """a * b, rounded before it is added to something: never part of an fma. PTX ISA 9.7.3.5."""
    product = f32(a) * f32(b)
    return product if product == product else _NAN


@instruction("fma.rn.f32 <ret>, <a>, <b>, <c>;", sm=75)
def fma_rn_f32(a: f32, b: f32, c: f32) -> f32:
    """a * b + c, rounded once. PTX ISA 9.7.3.6.

    Kernels are linked without contraction (`machine_code.compiler`): only `fma_rn_f32` is an fma.
    """
    product, addend = float(a) * float(b), float(c)  # float64 holds the product of two float32
    total = product + addend
    if total - product != addend or total - addend != product:
        return _round_inexact(product, addend, total)
    _CELL[0] = total  # three times as fast as f32(total)
    return _CELL[0]


@instruction("lg2.approx.ftz.f32 <ret>, <x>;", sm=75)
def lg2_approx_ftz_f32(x: f32) -> f32:
    """The logarithm of x to base 2, to 2 ** -22; -inf for 0 and subnormals. PTX ISA 9.7.3.21."""
    return _flushed(np.log2(_flushed(x)))


@instruction("div.full.ftz.f32 <ret>, <a>, <b>;", sm=75)
def div_full_ftz_f32(a: f32, b: f32) -> f32:
    """a / b, to 2 ulp; subnormals are 0. PTX ISA 9.7.3.8."""
    return _flushed(_flushed(a) / _flushed(b))


@instruction("sqrt.approx.ftz.f32 <ret>, <x>;", sm=75)
def sqrt_approx_ftz_f32(x: f32) -> f32:
    """The square root of x, to 2 ** -23 of it. PTX ISA 9.7.3.17."""
    return _flushed(np.sqrt(_flushed(x)))


@instruction("rsqrt.approx.ftz.f32 <ret>, <x>;", sm=75)
def rsqrt_approx_ftz_f32(x: f32) -> f32:
    """1 / the square root of x, to 2 ** -22 of it; infinite for subnormals. PTX ISA 9.7.3.18."""
    return _flushed(f32(1) / np.sqrt(_flushed(x)))


@instruction("sin.approx.ftz.f32 <ret>, <x>;", sm=75)
def sin_approx_ftz_f32(x: f32) -> f32:
    """The sine of x, to 2 ** -20.5 between -pi and pi. PTX ISA 9.7.3.19."""
    return _flushed(np.sin(_flushed(x)))


@instruction("cos.approx.ftz.f32 <ret>, <x>;", sm=75)
def cos_approx_ftz_f32(x: f32) -> f32:
    """The cosine of x, to 2 ** -20.5 between -pi and pi. PTX ISA 9.7.3.20."""
    return _flushed(np.cos(_flushed(x)))


@instruction("tanh.approx.f32 <ret>, <x>;", sm=75)
def tanh_approx_f32(x: f32) -> f32:
    """The hyperbolic tangent of x, to 2 ** -11 of it. PTX ISA 9.7.3.23.

    In the simulator it is that of float64 with 11 bits, as far off as the instruction may be.
    """
    if x != x:
        return _NAN
    fraction, exponent = math.frexp(math.tanh(x))
    return f32(math.ldexp(np.rint(fraction * 2048), exponent - 11))


@instruction("cvt.rmi.f32.f32 <ret>, <x>;", sm=75)
def cvt_rmi_f32_f32(x: f32) -> f32:
    """The largest whole number that is at most x. PTX ISA 9.7.9.22."""
    return _one_nan(np.floor(f32(x)))


@instruction("cvt.rzi.s32.f32 <ret>, <x>;", sm=75)
def cvt_rzi_s32_f32(x: f32) -> i32:
    """x without its fraction, at most and at least what 32 bits hold; 0 of a NaN.

    PTX ISA 9.7.9.22.
    """
    x = float(x)
    return i32(min(max(x, -(2.0**31)), 2.0**31 - 1)) if x == x else i32(0)


@instruction("div.u32 <ret>, <a>, <b>;", sm=75)
def div_u32(a: u32, b: u32) -> u32:
    """a // b; with all bits set where b is 0, which PTX does not say. PTX ISA 9.7.1.8."""
    return u32(int(a) // int(b)) if b else u32(0xFFFFFFFF)


@instruction("mul.rn.f16x2 <ret>, <a>, <b>;", sm=75)
def mul_rn_f16x2(a: u32, b: u32) -> u32:
    """Products of two pairs of float16, each rounded to nearest even. PTX ISA 9.7.4.3."""
    _PAIRS_BITS[0], _PAIRS_BITS[1] = a, b
    a_low, a_high, b_low, b_high = _PAIRS.tolist()  # float64 holds the product of two float16
    _PAIRS[0], _PAIRS[1] = low, high = a_low * b_low, a_high * b_high
    if low != low:
        _HALVES_BITS[0] = 0x7FFF
    if high != high:
        _HALVES_BITS[1] = 0x7FFF
    return _PAIRS_BITS[0]


@instruction("lop3.b32 <ret>, <mask>, <a>, <b>, 0xca;", sm=75)
def lop3_select_b32(mask: u32, a: u32, b: u32) -> u32:
    """The bits of a where the mask has ones, those of b elsewhere. PTX ISA 9.7.8.6."""
    mask = int(mask)
    _BITS[0] = (int(a) & mask | int(b) & ~mask) & 0xFFFFFFFF
    return _BITS[0]


@instruction("prmt.b32 <ret>, <a>, <b>, <selector>;", sm=75)
def prmt_b32(a: u32, b: u32, selector: u32) -> u32:
    """Four of the bytes 0 to 3 of a and 4 to 7 of b, as the selector's four low digits say.

    A digit of 8 or more is the sign of the byte that it names less 8, in all bits.
    PTX ISA 9.7.9.7.
    """
    source, digits = int(a) | int(b) << 32, int(selector)
    first, second, third, fourth = _shifts(digits & 0xFFFF)
    result = (
        source >> first & 0xFF
        | (source >> second & 0xFF) << 8
        | (source >> third & 0xFF) << 16
        | (source >> fourth & 0xFF) << 24
    )
    if digits & 0x8888:
        for i in range(0, 32, 8):
            if digits >> i // 2 & 8:
                result = result & ~(0xFF << i) | (0xFF << i) * (result >> i + 7 & 1)
    _BITS[0] = result
    return _BITS[0]


@instruction("cvt.f32.f16 <ret>, <bits>;", sm=75)
def cvt_f32_f16(bits: u16) -> f32:
    """The float32 that equals a float16, given by its bits. PTX ISA 9.7.9.22."""
    _HALVES_BITS[0] = bits
    _CELL[0] = _PAIRS[0]
    x = _CELL[0]
    return x if x == x else _NAN


@instruction("cvt.rn.f16.f32 <ret>, <x>;", sm=75)
def cvt_rn_f16_f32(x: f32) -> u16:
    """The bits of the float16 nearest to x, ties to even. PTX ISA 9.7.9.22."""
    _CELL[0] = x
    x = _CELL[0]
    if x != x:
        return u16(0x7FFF)
    _PAIRS[0] = x
    return _HALVES_BITS[0]


@instruction("cvt.rn.f16x2.f32 <ret>, <high>, <low>;", sm=80)
def cvt_rn_f16x2_f32(high: f32, low: f32) -> u32:
    """Two float16 in one register, each nearest to its source, ties to even. PTX ISA 9.7.9.22."""
    low, high = cvt_rn_f16_f32(low), cvt_rn_f16_f32(high)
    return mov_b32_halves(low, high)


@instruction("cvt.rn.bf16x2.f32 <ret>, <high>, <low>;", sm=80)
def cvt_rn_bf16x2_f32(high: f32, low: f32) -> u32:
    """Two bfloat16 in one register, each nearest to its source, ties to even. PTX ISA 9.7.9.22."""
    return mov_b32_halves(_bf16_bits(low), _bf16_bits(high))


@instruction("cvt.rna.tf32.f32 <ret>, <x>;", sm=80)
def cvt_rna_tf32_f32(x: f32) -> u32:
    """The bits of the tf32 nearest to x, ties away from zero; 13 low bits are 0.

    A NaN loses its low bits, and is an infinity where it had no others: machine code tests for
    |x| < inf, adds half a unit, and cuts. PTX ISA 9.7.9.22.
    """
    _CELL[0] = x
    bits = _BITS.item()
    _BITS[0] = (bits + 0x1000 if bits & 0x7F800000 != 0x7F800000 else bits) & 0xFFFFE000
    return _BITS[0]


@instruction("mov.b32 <ret>, {<low>, <high>};", sm=75)
def mov_b32_halves(low: u16, high: u16) -> u32:
    """One register of two halves. PTX ISA 9.7.9.1."""
    _HALVES_BITS[0], _HALVES_BITS[1] = low, high
    return _PAIRS_BITS[0]


@instruction("mov.b32 <ret>, <x>;", sm=75)
def float_as_bits(x: f32) -> u32:
    """The bits of x. PTX ISA 9.7.9.1."""
    _CELL[0] = x
    return _BITS[0]


@instruction("mov.b32 <ret>, <bits>;", sm=75)
def bits_as_float(bits: u32) -> f32:
    """The float32 with these bits. PTX ISA 9.7.9.1."""
    _BITS[0] = bits
    return _CELL[0]


def _one_nan(x) -> f32:
    return x if x == x else _NAN


def _flushed(x) -> f32:
    """x as instructions with .ftz read and write it: subnormals are 0, and there is one NaN."""
    if abs(x) < _SMALLEST_NORMAL:
        return f32(math.copysign(0, x))
    return f32(x) if x == x else _NAN


def _bf16_bits(x) -> int:
    _CELL[0] = x
    bits = _BITS.item()
    return 0x7FFF if x != x else bits + 0x7FFF + (bits >> 16 & 1) >> 16


def _round_inexact(product: float, addend: float, total: float) -> f32:
    """The float32 nearest to product + addend, whose float64 `total` may be rounded or NaN.

    Where `total` lies halfway between two float32, the bits that float64 cut off decide: an odd
    last bit stands for them.
    """
    if not math.isfinite(total):
        return f32(total) if total == total else _NAN
    back = total - product
    error = (product - (total - back)) + (addend - back)
    if error and not np.float64(total).view(np.uint64) & np.uint64(1):
        total = math.nextafter(total, math.inf if error > 0 else -math.inf)
    return f32(total)


@cache
def _shifts(digits: int) -> tuple[int, ...]:
    """By how much the eight bytes of two registers are shifted for each of a selector's digits."""
    return tuple(8 * (digits >> 4 * i & 7) for i in range(4))


# Registers on the way from one type to another: several times as fast as `f32(x).view(u32)`.
_CELL = np.zeros(1, np.float32)
_BITS = _CELL.view(np.uint32)
_PAIRS = np.zeros(4, np.float16)
_PAIRS_BITS, _HALVES_BITS = _PAIRS.view(np.uint32), _PAIRS.view(np.uint16)
_ZERO, _INF = f32(0), f32(np.inf)
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_NAN = u32(0x7FFFFFFF).view(f32)
