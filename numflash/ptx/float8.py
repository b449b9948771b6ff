"""Conversions to and from 8-bit floats, two at a time. PTX ISA 9.7.9.22.

To 8 bits: the nearest number, ties to even; what lies outside, infinities included, becomes the
largest finite number, and a NaN 0x7f. To float16: exact, and a NaN becomes 0x7fff.
"""

import numpy as np

from numflash.formats import FORMATS, Format
from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import f32, u8, u16, u32


@instruction("cvt.rn.satfinite.e4m3x2.f32 <ret>, <high>, <low>;", sm=89)
def cvt_rn_satfinite_e4m3x2_f32(high: f32, low: f32) -> u16:
    """Two e4m3 in one register, each nearest to its source."""
    return FORMATS["e4m3"].encode([low, high]).view(u16)[0]


@instruction("cvt.rn.satfinite.e5m2x2.f32 <ret>, <high>, <low>;", sm=89)
def cvt_rn_satfinite_e5m2x2_f32(high: f32, low: f32) -> u16:
    """Two e5m2 in one register, each nearest to its source."""
    return FORMATS["e5m2"].encode([low, high]).view(u16)[0]


@instruction("cvt.rn.f16x2.e4m3x2 <ret>, <codes>;", sm=89)
def cvt_rn_f16x2_e4m3x2(codes: u16) -> u32:
    """The two float16 that equal two e4m3."""
    return _E4M3_HALVES[u16(codes).reshape(1).view(u8)].view(u32)[0]


@instruction("cvt.rn.f16x2.e5m2x2 <ret>, <codes>;", sm=89)
def cvt_rn_f16x2_e5m2x2(codes: u16) -> u32:
    """The two float16 that equal two e5m2."""
    return _E5M2_HALVES[u16(codes).reshape(1).view(u8)].view(u32)[0]


def _halves(kind: Format) -> np.ndarray:
    """(256,) the bits of the float16 that each code equals."""
    x = kind.values
    return np.where(np.isnan(x), u16(0x7FFF), x.astype(np.float16).view(u16))


_E4M3_HALVES, _E5M2_HALVES = (_halves(FORMATS[name]) for name in ("e4m3", "e5m2"))
