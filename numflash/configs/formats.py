"""The two 8-bit float formats, bit by bit: the one definition of conversions to and from them.

    e4m3    sign, 4 bits of exponent, 3 after the point; up to 448; steps of 2 ** -9 below 2 ** -6;
            no infinities, NaN is 0x7f or 0xff
    e5m2    the high half of a float16: up to 57344, with infinities and NaNs

Conversion to them rounds to nearest, ties to even, and saturates: numbers outside, infinities
included, become the largest finite number. NaN becomes 0x7f.

Source: FP8 Formats for Deep Learning, arXiv 2209.05433; PTX ISA 9.7.9.22 (cvt, .satfinite).
"""

from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

NAN_CODE = 0x7F


@dataclass(frozen=True)
class Format:
    """An 8-bit float format.

    Attributes:
        name: "e4m3" or "e5m2".
        largest: the largest finite number.
        peak: the largest of the numbers that share a scale becomes this: the power of two with
            which the widest steps begin. Numbers just below then have steps half as wide as with a
            scale that fills the range, which makes squared errors 3 % to 5 % smaller where few
            numbers share a scale.
        dtype: of NumPy arrays of it; "float8_e4m3fn" and "float8_e5m2" are PyTorch's names, too.
    """

    name: str
    largest: float
    peak: float
    dtype: np.dtype

    @cached_property
    def values(self) -> np.ndarray:
        """(256,) float32: the number that each code stands for."""
        return np.arange(256, dtype=np.uint8).view(self.dtype).astype(np.float32)

    def encode(self, x) -> np.ndarray:
        """The codes, uint8, nearest to x, which is rounded to float32 before."""
        x = np.asarray(x, np.float32)
        with np.errstate(invalid="ignore"):
            codes = np.clip(x, -self.largest, self.largest).astype(self.dtype).view(np.uint8)
        return np.where(np.isnan(x), np.uint8(NAN_CODE), codes)

    def decode(self, codes) -> np.ndarray:
        """The float32 numbers that codes (uint8) stand for."""
        return self.values[np.asarray(codes, np.uint8)]


FORMATS: dict[str, Format] = {
    "e4m3": Format("e4m3", 448.0, 256.0, np.dtype(ml_dtypes.float8_e4m3fn)),
    "e5m2": Format("e5m2", 57344.0, 32768.0, np.dtype(ml_dtypes.float8_e5m2)),
}
"""By name."""
