"""Conversions between float32, float16, bfloat16 and tf32, against what PTX ISA says of them."""

import math

import numpy as np
import pytest

from numflash.ptx import (
    bits_as_float,
    cvt_f32_f16,
    cvt_rn_bf16x2_f32,
    cvt_rn_f16_f32,
    cvt_rn_f16x2_f32,
    cvt_rna_tf32_f32,
    f32,
    float_as_bits,
    u16,
    u32,
)
from tests.sim.test_instructions import INF, NAN, bits, no_warnings  # noqa: F401
from tests.support.arithmetic_cases import HALF_CODES, NANS, SUBNORMALS, TINY


def test_every_float16_goes_to_float32_and_back():
    nan = (HALF_CODES & 0x7FFF) > 0x7C00
    back = np.array([cvt_rn_f16_f32(cvt_f32_f16(code)) for code in HALF_CODES])
    assert back.dtype == np.uint16
    assert (back[~nan] == HALF_CODES[~nan]).all() and (back[nan] == 0x7FFF).all()


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (1 + 2.0**-11, 0x3C00),  # a tie goes to the even neighbour below
        (1 + 3 * 2.0**-11, 0x3C02),  # and to the one above
        (1 + 2.0**-11 + 2.0**-23, 0x3C01),
        (1 - 2.0**-12, 0x3C00),
        (65504, 0x7BFF),
        (np.nextafter(f32(65520), f32(0)), 0x7BFF),
        (65520, 0x7C00),
        (-65520, 0xFC00),
        (1e30, 0x7C00),
        (math.inf, 0x7C00),
        (-math.inf, 0xFC00),
        (2.0**-14, 0x0400),
        (2.0**-14 - 2.0**-25, 0x0400),  # rounds up to a normal number
        (2.0**-24, 0x0001),
        (3 * 2.0**-25, 0x0002),
        (2.0**-25, 0x0000),
        (np.nextafter(f32(2.0**-25), INF), 0x0001),
        (-(2.0**-25), 0x8000),
        (SUBNORMALS[0], 0x0000),
        (-0.0, 0x8000),
    ],
)
def test_cvt_rn_f16_f32(x, code):
    got = cvt_rn_f16_f32(f32(x))
    assert type(got) is u16 and hex(got) == hex(code)


@pytest.mark.parametrize("x", NANS, ids=lambda x: hex(bits(x)))
def test_nan_converts_to_the_one_nan(x):
    assert cvt_rn_f16_f32(x) == 0x7FFF
    assert bits(cvt_f32_f16(u16(0x7C01))) == bits(cvt_f32_f16(u16(0xFFFF))) == NAN


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (1 + 2.0**-8, 0x3F80),  # a tie goes to the even neighbour below
        (1 + 3 * 2.0**-8, 0x3F82),  # and to the one above
        (np.nextafter(f32(1 + 2.0**-8), INF), 0x3F81),
        (1 - 2.0**-9, 0x3F80),
        (f32(u32(0x7F7F7FFF).view(f32)), 0x7F7F),
        (f32(u32(0x7F7F8000).view(f32)), 0x7F80),
        (np.finfo(np.float32).min, 0xFF80),
        (-math.inf, 0xFF80),
        (TINY, 0x0080),
        (f32(u32(0x00008000).view(f32)), 0x0000),
        (f32(u32(0x00018000).view(f32)), 0x0002),
        (f32(u32(0x80008001).view(f32)), 0x8001),
        (-0.0, 0x8000),
    ],
)
def test_cvt_rn_bf16x2_f32(x, code):
    got = cvt_rn_bf16x2_f32(f32(x), f32(1))
    assert type(got) is u32 and hex(got) == hex(code << 16 | 0x3F80)
    assert hex(cvt_rn_bf16x2_f32(f32(1), f32(x))) == hex(0x3F80 << 16 | code)


def test_packed_conversions_put_the_first_operand_high():
    assert cvt_rn_f16x2_f32(f32(1), f32(-2)) == 0x3C00C000
    assert cvt_rn_f16x2_f32(f32(-2), f32(1)) == 0xC0003C00
    assert cvt_rn_bf16x2_f32(f32(1), f32(-2)) == 0x3F80C000
    assert type(cvt_rn_f16x2_f32(1.0, 2.0)) is type(cvt_rn_bf16x2_f32(1.0, 2.0)) is u32
    for nan in NANS:
        assert cvt_rn_f16x2_f32(nan, f32(1)) == 0x7FFF3C00
        assert cvt_rn_f16x2_f32(f32(1), nan) == 0x3C007FFF
        assert cvt_rn_bf16x2_f32(nan, nan) == 0x7FFF7FFF


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 2.0**-11, 1 + 2.0**-10),  # a tie goes away from zero: to the odd neighbour
        (1 + 3 * 2.0**-11, 1 + 2.0**-9),  # and to the even one
        (-1 - 2.0**-11, -1 - 2.0**-10),
        (np.nextafter(f32(1 + 2.0**-11), f32(0)), 1),
        (2 - 2.0**-11, 2),
        (np.finfo(np.float32).max, math.inf),
        (np.finfo(np.float32).min, -math.inf),
        (np.nextafter(f32(2.0**128 - 2.0**116), f32(0)), 2.0**128 - 2.0**117),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (TINY, TINY),
        (2.0**-137, 2.0**-136),  # half of the smallest subnormal tf32
        (np.nextafter(f32(2.0**-137), f32(0)), 0),
        (-(2.0**-149), -0.0),
        (-0.0, -0.0),
    ],
)
def test_cvt_rna_tf32_f32(x, expected):
    got = cvt_rna_tf32_f32(f32(x))
    assert type(got) is u32 and hex(got) == hex(bits(f32(expected)))


def test_a_nan_of_tf32_keeps_its_high_bits():
    got = [hex(cvt_rna_tf32_f32(nan)) for nan in NANS]
    assert got == [
        "0x7fffe000",
        "0xffffe000",
        "0x7fc00000",
        "0xffc00000",
        "0x7f800000",
        "0xff812000",
    ]


def test_a_conversion_rounds_a_python_float_to_float32_first():
    # In float64 this lies above the tie, in float32 on it.
    assert cvt_rn_f16_f32(1 + 2.0**-11 + 2.0**-40) == 0x3C00


def test_conversions_take_what_kernels_compute():
    assert cvt_f32_f16(0x3C00) == 1 and cvt_f32_f16(u32(0x3C00)) == 1
    assert type(bits_as_float(0x3F800000)) is f32 and type(float_as_bits(1.0)) is u32


def test_bits_of_every_nan_stay():
    for nan in NANS:
        assert bits(bits_as_float(float_as_bits(nan))) == bits(nan)
