"""The types of PTX as NumPy's, and numbers of its text as bits of a type."""

import struct

import numpy as np

from numflash.executor.arithmetic import bf2, f2, f4, f8, i1, i2, i4, i8, u1, u2, u4, u8
from numflash.executor.text import Immediate

LANES = 32
DTYPES = {
    **{"b8": u1, "u8": u1, "s8": i1, "b16": u2, "u16": u2, "s16": i2},
    **{"b32": u4, "u32": u4, "s32": i4, "b64": u8, "u64": u8, "s64": i8},
    **{"f16": f2, "bf16": bf2, "f32": f4, "f64": f8},
    **{"f16x2": u4, "bf16x2": u4, "tf32": u4, "e4m3x2": u2, "e5m2x2": u2},
}
"""Each type; those of several elements as the bits of their register."""
BITS = {1: u1, 2: u2, 4: u4, 8: u8}
"""By size in bytes, what a register of that size holds."""
PAIRS = {"f16x2": f2, "bf16x2": bf2}
HALVES = ("f16", "bf16")
"""Floats that are computed with as float32 and rounded."""


def filled(bits: int, dtype) -> np.ndarray:
    """32 lanes of a value that is given by its bits."""
    array = np.full(LANES, bits, BITS[dtype.itemsize]).view(dtype)
    array.flags.writeable = False
    return array


def bits_of(operand: Immediate, type_: str) -> int:
    """The bits of a number in a type."""
    dtype, text = DTYPES[type_], operand.text
    negative, digits = text.startswith("-"), text.lstrip("-")
    if digits[:2] in ("0f", "0F"):
        bits = int(digits[2:], 16) ^ (negative << 31)
        return (
            bits
            if dtype.itemsize == 4
            else _float_bits(struct.unpack("<f", bits.to_bytes(4, "little"))[0], type_)
        )
    if digits[:2] in ("0d", "0D"):
        bits = int(digits[2:], 16) ^ (negative << 63)
        return (
            bits
            if dtype.itemsize == 8
            else _float_bits(struct.unpack("<d", bits.to_bytes(8, "little"))[0], type_)
        )
    if dtype.kind in "fV" or "." in digits:
        return _float_bits(float(text), type_)
    return operand.integer()


def _float_bits(value: float, type_: str) -> int:
    dtype = DTYPES[type_]
    return int(np.array(value, dtype).view(BITS[dtype.itemsize]))


def name_of(dtype) -> str:
    """Its name in `arithmetic`."""
    return "bf2" if dtype == bf2 else f"{dtype.kind}{dtype.itemsize}"
