"""Fixed point: the unit of sums of 64 bits, by a bound of what they may come to."""

from numflash.ptx import bits_as_float, device_function, float_as_bits, u32

_INFINITE = 255
# Of a bound below 2 ** -65 the unit is no smaller, so that its inverse is no subnormal number.
_SMALLEST = 61


@device_function
def exponent_of_sum(absolute_sum):
    """The biased exponent of a float32 that is not negative; 255 of an infinity or a NaN."""
    return u32((float_as_bits(absolute_sum) >> u32(23)) & u32(0xFF))


@device_function
def scale_of_sum(absolute_sum):
    """(scale, unit): powers of two, inverse to each other.

    A sum whose summands' absolute values come to `absolute_sum`, itself a sum in float32, stays
    below 2 ** 61 when it is multiplied by the scale.
    """
    # absolute_sum < 2 ** (exponent - 126), and the scale is 2 ** (186 - exponent).
    exponent = u32(max(exponent_of_sum(absolute_sum), u32(_SMALLEST)))
    scale = bits_as_float(u32(u32(186 + 127) - exponent) << u32(23))
    unit = bits_as_float(u32(exponent - u32(186 - 127)) << u32(23))
    return scale, unit


@device_function
def is_finite_sum(absolute_sum):
    """Whether nothing that was added up was infinite or no number."""
    return exponent_of_sum(absolute_sum) != u32(_INFINITE)
