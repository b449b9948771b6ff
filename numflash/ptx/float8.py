"""Conversions to and from 8-bit floats, two at a time. PTX ISA 9.7.9.22.

To 8 bits: the nearest number, ties to even; numbers outside, infinities included, become the
largest finite number, and a NaN becomes 0x7f. To float16: exact, and a NaN becomes 0x7fff.
"""

import numpy as np

from numflash.configs.formats import FORMATS, NAN_CODE, Format
from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import f32, u8, u16, u32


@instruction("cvt.rn.satfinite.e4m3x2.f32 <ret>, <high>, <low>;", sm=89)
def cvt_rn_satfinite_e4m3x2_f32(high: f32, low: f32) -> u16:
    """Two e4m3 in one register, each nearest to its source."""
    return _E4M3.encode(high, low)


@instruction("cvt.rn.satfinite.e5m2x2.f32 <ret>, <high>, <low>;", sm=89)
def cvt_rn_satfinite_e5m2x2_f32(high: f32, low: f32) -> u16:
    """Two e5m2 in one register, each nearest to its source."""
    return _E5M2.encode(high, low)


@instruction("cvt.rn.f16x2.e4m3x2 <ret>, <codes>;", sm=89)
def cvt_rn_f16x2_e4m3x2(codes: u16) -> u32:
    """The two float16 that equal two e4m3."""
    return _E4M3.halves(codes)


@instruction("cvt.rn.f16x2.e5m2x2 <ret>, <codes>;", sm=89)
def cvt_rn_f16x2_e5m2x2(codes: u16) -> u32:
    """The two float16 that equal two e5m2."""
    return _E5M2.halves(codes)


class _Pairs:
    """Two numbers of a format at a time, in arrays kept for them: a simulated thread's registers.

    `Format` does the same for arrays, many times as slowly for two numbers.
    """

    def __init__(self, kind: Format):
        self._largest = kind.largest
        self._floats = np.zeros(2, f32)
        self._codes = np.zeros(2, kind.dtype)
        self._bytes, self._pair = self._codes.view(u8), self._codes.view(u16)
        # The bits of the float16 that each code equals.
        x = kind.values
        self._bits = np.where(np.isnan(x), u16(0x7FFF), x.astype(np.float16).view(u16)).tolist()
        self._halves = np.zeros(1, u32)

    def encode(self, high: f32, low: f32) -> u16:
        """The codes nearest to two numbers."""
        most = self._largest
        # A NaN, which compares with nothing, comes first and stays.
        self._floats[0], self._floats[1] = (min(max(x, -most), most) for x in (low, high))
        self._codes[:] = self._floats
        if low != low:
            self._bytes[0] = NAN_CODE
        if high != high:
            self._bytes[1] = NAN_CODE
        return self._pair[0]

    def halves(self, codes: u16) -> u32:
        """The float16 that two codes equal."""
        codes = int(codes)
        self._halves[0] = self._bits[codes & 0xFF] | self._bits[codes >> 8] << 16
        return self._halves[0]


_E4M3, _E5M2 = _Pairs(FORMATS["e4m3"]), _Pairs(FORMATS["e5m2"])
