"""Calculations of one-lane instructions, on the 32 lanes of a warp at once.

Arguments and results are arrays of shape (32,), of the type that the instruction names, and never
changed in place. Every instruction turns a NaN into the same NaN: 0x7fffffff, as float16
and bfloat16 0x7fff, as in `numflash.ptx.arithmetic`. float64 keeps what NumPy makes of it.

Division by zero of integers, which PTX leaves undefined, yields all ones.
"""

import ml_dtypes
import numpy as np

from numflash.configs.formats import FORMATS

u1, u2, u4, u8 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
i1, i2, i4, i8 = (np.dtype(f"i{n}") for n in (1, 2, 4, 8))
f2, f4, f8 = (np.dtype(f"f{n}") for n in (2, 4, 8))
bf2 = np.dtype(ml_dtypes.bfloat16)

_NAN = np.array(0x7FFFFFFF, u4).view(f4)
_HALF_NAN = u2.type(0x7FFF)
_TINY = np.finfo(f4).tiny
_WIDER = {i2: i4, u2: u4, i4: i8, u4: u8}


def number(x):
    """float32 with every NaN replaced by the one that instructions make."""
    total = x.dot(x)
    return x if total == total else np.where(x == x, x, _NAN)


def flushed(x):
    """float32 with subnormal numbers replaced by zeros of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(f4.type(0), x), x)


def saturated(x):
    """x between 0 and 1; 0 for a NaN."""
    return np.where(x == x, np.clip(x, x.dtype.type(0), x.dtype.type(1)), x.dtype.type(0))


def maximum(x, y):
    """The larger of floats, +0 above -0; the other one where one is a NaN."""
    larger = np.fmax(x, y)
    zeros = (x == 0) & (y == 0)
    return number(np.where(zeros, x + y, larger) if np.count_nonzero(zeros) else larger)


def minimum(x, y):
    """The smaller of floats, -0 below +0; the other one where one is a NaN."""
    smaller = np.fmin(x, y)
    zeros = (x == 0) & (y == 0)
    return number(np.where(zeros, -(-x - y), smaller) if np.count_nonzero(zeros) else smaller)


def fused(x, y, z):
    """x * y + z of float32, rounded once."""
    product, addend = x.astype(f8) * y.astype(f8), z.astype(f8)  # float64 holds the product
    total = product + addend
    bits = total.view(u8)
    # Only halfway between two float32, or among subnormal ones, does what float64 cut off count.
    # Doubling drops the sign, and zero less one is the largest number.
    doubtful = ((bits & _LOW) == _HALFWAY) | (bits + bits - _ONE < _TWICE_TINY)
    if np.count_nonzero(doubtful):
        back = total - product
        error = (product - (total - back)) + (addend - back)
        even = (bits & _ONE) == 0
        toward = np.where(error > 0, np.inf, -np.inf)
        inexact = (error != 0) & np.isfinite(total) & even
        total = np.where(inexact, np.nextafter(total, toward), total)
    return number(total.astype(f4))


_LOW, _HALFWAY, _ONE = u8.type(0x1FFFFFFF), u8.type(0x10000000), u8.type(1)
_TWICE_TINY = f8.type(_TINY).view(u8) * u8.type(2)


def halves(x, dtype):
    """(64,) float32: the two 16-bit floats of each register."""
    return np.ascontiguousarray(x).view(dtype).astype(f4)


def paired(x, dtype):
    """Registers of two 16-bit floats each, rounded from (64,) float32."""
    return half(x, dtype).view(u4)


def half(x, dtype):
    """16-bit floats nearest to x, ties to even."""
    rounded = x.astype(dtype)
    return np.where(x == x, rounded.view(u2), _HALF_NAN).view(dtype)


def high_product(x, y):
    """The upper half of the product of integers."""
    wider = _WIDER.get(x.dtype)
    if wider is not None:
        shift = wider.type(8 * x.dtype.itemsize)
        return (x.astype(wider) * y.astype(wider) >> shift).astype(x.dtype)
    products = [int(a) * int(b) >> 64 & 2**64 - 1 for a, b in zip(x, y, strict=True)]
    return np.array(products, u8).view(x.dtype)


def quotient(x, y):
    """x / y of integers, toward zero."""
    zero = y == 0
    divisor = np.where(zero, y.dtype.type(1), y) if zero.any() else y
    if x.dtype.kind == "u":
        result = x // divisor
    else:
        unsigned = x.dtype.str.replace("i", "u")
        magnitude = np.abs(x).view(unsigned) // np.abs(divisor).view(unsigned)
        result = np.where((x < 0) != (divisor < 0), 0 - magnitude, magnitude).view(x.dtype)
    return np.where(zero, ~x.dtype.type(0), result) if zero.any() else result


def remainder(x, y):
    """x - y * quotient(x, y)."""
    return x - quotient(x, y) * y


def shifted_left(x, count):
    """x << count; 0 from as many bits on as x has."""
    bits = 8 * x.dtype.itemsize
    moved = x << np.minimum(count, u4.type(bits - 1)).astype(x.dtype)
    return np.where(count < bits, moved, x.dtype.type(0))


def shifted_right(x, count):
    """x >> count, with copies of the sign where x is signed."""
    bits = 8 * x.dtype.itemsize
    moved = x >> np.minimum(count, u4.type(bits - 1)).astype(x.dtype)
    if x.dtype.kind == "i":
        return moved
    return np.where(count < bits, moved, x.dtype.type(0))


def funnel(low, high, count, left: bool, wraps: bool):
    """32 bits of the 64 in high and low, shifted: `shf`."""
    count = (count & u4.type(31) if wraps else np.minimum(count, u4.type(32))).astype(u8)
    both = low.astype(u8) | high.astype(u8) << u8.type(32)
    return ((both << count) >> u8.type(32) if left else both >> count).astype(u4)


def looked_up(x, y, z, table: int):
    """Each bit by `table`, whose index is the bits of x, y and z: `lop3`."""
    result = np.zeros_like(x)
    for index in range(8):
        if table >> index & 1:
            term = x if index & 4 else ~x
            term = term & (y if index & 2 else ~y)
            result = result | term & (z if index & 1 else ~z)
    return result


def permuted(a, b, selector):
    """Four of eight bytes: `prmt`."""
    source = np.stack((a, b), 1).view(u1).reshape(-1, 8)
    digits = selector[:, None] >> np.array([0, 4, 8, 12], u4) & u4.type(15)
    chosen = np.take_along_axis(source, (digits & 7).astype(i8), 1)
    signs = np.where(chosen & 128, u1.type(255), u1.type(0))
    return np.ascontiguousarray(np.where(digits & 8, signs, chosen)).view(u4).reshape(-1)


def inserted(field, into, position, length):
    """The low `length` bits of `field` at `position` of `into`: `bfi`."""
    position, length = (
        np.minimum(n & u4.type(255), u4.type(64)).astype(u8) for n in (position, length)
    )
    one = u8.type(1)
    ones = np.where(length < 64, (one << np.minimum(length, 63)) - one, ~u8.type(0))
    mask = np.where(position < 64, ones << np.minimum(position, 63), u8.type(0)).astype(into.dtype)
    moved = np.where(position < 64, field.astype(u8) << np.minimum(position, 63), u8.type(0))
    return moved.astype(into.dtype) & mask | into & ~mask


def extracted(x, position, length):
    """`length` bits of x from `position` on, with copies of the last where x is signed: `bfe`."""
    bits = 8 * x.dtype.itemsize
    results = []
    for value, first, count in zip(x.tolist(), position.tolist(), length.tolist(), strict=True):
        first, count = first & 255, count & 255
        # Beyond the register lie copies of its sign.
        sign = value < 0
        wide = (value & 2**bits - 1) | (((1 << 512) - (1 << bits)) if sign else 0)
        result = wide >> first & (1 << count) - 1
        last = min(first + count - 1, bits - 1)
        if count and x.dtype.kind == "i" and wide >> last & 1:
            result |= (1 << 512) - (1 << count)
        results.append(result & 2**bits - 1)
    return np.array(results, f"u{x.dtype.itemsize}").view(x.dtype)


def leading_zeros(x):
    """The number of zeros before the first one: `clz`."""
    return np.array([8 * x.dtype.itemsize - int(value).bit_length() for value in x], u4)


def reversed_bits(x):
    """The bits of x, the last first: `brev`."""
    n = 8 * x.dtype.itemsize
    return np.array([int(f"{int(value):0{n}b}"[::-1], 2) for value in x], x.dtype)


def exp2(x):
    """2 ** x of float32."""
    return number(np.exp2(x.astype(f8)).astype(f4))


def tanh(x):
    """The hyperbolic tangent of float32, with 11 bits, as `ptx.tanh_approx_f32` has it."""
    fraction, exponent = np.frexp(np.tanh(x.astype(f8)))
    return np.ldexp(np.rint(fraction * 2048), exponent - 11).astype(f4)


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
"""Roundings of a float to an integer."""


def to_integer(x, dtype, rounding: str):
    """The integer of a float, the nearest possible where it has none, 0 for a NaN."""
    limits = np.iinfo(dtype)
    rounded = ROUNDINGS[rounding](x.astype(f8))
    rounded = np.where(np.isnan(rounded), 0.0, rounded)
    low, high = rounded <= float(limits.min), rounded >= float(limits.max)
    inside = np.where(low | high, 0.0, rounded).astype(dtype)
    return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))


def clamped(x, dtype):
    """The nearest integer of another type."""
    limits, given = np.iinfo(dtype), np.iinfo(x.dtype)
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


def tf32_away(x):
    """The bits of the tf32 nearest to a float32, ties away from zero: `cvt.rna`."""
    bits = x.view(u4)
    rounded = np.where(np.abs(x) < np.inf, bits + u4.type(0x1000), bits)
    return rounded & u4.type(0xFFFFE000)


def encoded(name: str, high, low):
    """Two 8-bit floats in each register of 16 bits."""
    kind = FORMATS[name]
    return np.stack((kind.encode(low), kind.encode(high)), 1).view(u2).reshape(-1)


def decoded(name: str, codes):
    """Registers of two float16 that equal two 8-bit floats each."""
    values = FORMATS[name].decode(np.ascontiguousarray(codes).view(u1))
    return np.where(np.isnan(values), _HALF_NAN, values.astype(f2).view(u2)).view(u4)
