"""Arithmetic and conversions of single values."""

import numpy as np

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import f32, u16, u32


@instruction("ex2.approx.ftz.f32 <ret>, <x>;", sm=75)
def ex2_approx_ftz_f32(x: f32) -> f32:
    """2 ** x, to 2 ulp; 0 for -inf and for results below the normal range. PTX ISA 9.7.3.22."""
    y = np.exp2(f32(x))
    return f32(0) if y < _SMALLEST_NORMAL else y


@instruction("max.f32 <ret>, <a>, <b>;", sm=75)
def max_f32(a: f32, b: f32) -> f32:
    """The larger of a and b; the other one where one is NaN. PTX ISA 9.7.3.12."""
    return a if a > b or b != b else b


@instruction("cvt.f32.f16 <ret>, <bits>;", sm=75)
def cvt_f32_f16(bits: u16) -> f32:
    """The float32 that equals a float16, given by its bits. PTX ISA 9.7.9.22."""
    return f32(u16(bits).view(np.float16))


@instruction("cvt.rn.f16.f32 <ret>, <x>;", sm=75)
def cvt_rn_f16_f32(x: f32) -> u16:
    """The bits of the float16 nearest to x, ties to even. PTX ISA 9.7.9.22."""
    return np.float16(x).view(u16)


@instruction("mov.b32 <ret>, <x>;", sm=75)
def float_as_bits(x: f32) -> u32:
    """The bits of x. PTX ISA 9.7.9.1."""
    return f32(x).view(u32)


@instruction("mov.b32 <ret>, <bits>;", sm=75)
def bits_as_float(bits: u32) -> f32:
    """The float32 with these bits. PTX ISA 9.7.9.1."""
    return u32(bits).view(f32)


_SMALLEST_NORMAL = np.finfo(np.float32).tiny
