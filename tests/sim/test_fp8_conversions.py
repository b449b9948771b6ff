"""Instructions and arithmetic that convert 8-bit floats, against the definition of the formats.

Expected values are computed here from sign, exponent and what is after the point, in float64.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from numflash.configs.formats import FORMATS
from numflash.ptx import cvt_rn_f16x2_e4m3x2, f32, lop3_select_b32, prmt_b32, u32
from numflash.tiles.quantize.conversions import (
    GENERATIONS,
    make_decode,
    make_decode_halves,
    make_encode,
    make_round_to_e4m3,
)
from tests.support.fp8_cases import FP8_CASES, to_encode
from tests.support.instruction_harness import run_simulated

# Bits after the point, bias of the exponent, code of the largest number.
LAYOUTS = {"e4m3": (3, 7, 0x7E), "e5m2": (2, 15, 0x7B)}
NAN = np.uint32(0x7FFFFFFF).view(np.float32)


@pytest.fixture(autouse=True)
def no_warnings():
    """Device functions run without NumPy's warnings, as they do in a launch."""
    with np.errstate(all="ignore"):
        yield


def magnitudes(format) -> np.ndarray:
    """(n,) float64: the numbers of codes 0 to that of the largest, which grow."""
    digits, bias, largest = LAYOUTS[format]
    codes = np.arange(largest + 1)
    exponent, fraction = codes >> digits, codes % 2**digits
    significand = np.where(exponent > 0, 2**digits, 0) + fraction
    return significand * 2.0 ** (np.maximum(exponent, 1) - bias - digits)


def nearest_codes(format, x) -> np.ndarray:
    """The codes of float32 numbers, uint8."""
    numbers = magnitudes(format)
    size = np.minimum(np.abs(x.astype(np.float64)), numbers[-1])
    above = np.searchsorted(numbers, size)
    below = np.maximum(above - 1, 0)
    above = np.minimum(above, numbers.size - 1)
    down, up = size - numbers[below], numbers[above] - size
    code = np.where((down < up) | (down == up) & (below % 2 == 0), below, above)
    code = np.where(size == numbers[above], above, code) | np.signbit(x) << 7
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def halves_of_codes(format) -> np.ndarray:
    """(256,) the bits of the float16 that each code equals."""
    *_, largest = LAYOUTS[format]
    numbers = np.full(128, np.nan)
    numbers[: largest + 1] = magnitudes(format)
    if format == "e5m2":
        numbers[largest + 1] = np.inf
    numbers = np.concatenate([numbers, -numbers])
    halves = numbers.astype(np.float16)
    assert (halves.astype(np.float64) == numbers)[~np.isnan(numbers)].all()
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), halves.view(np.uint16))


def test_the_formats_are_those_of_this_file():
    for name, kind in FORMATS.items():
        x = to_encode(kind)
        assert (kind.encode(x) == nearest_codes(name, x)).all()
        halves = halves_of_codes(name).view(np.float16).astype(np.float32)
        assert np.array_equal(kind.decode(np.arange(256)), halves, equal_nan=True)


# Instructions


def packed(high, low, dtype):
    return np.stack([low, high], axis=-1).view(dtype).ravel()


def expected_product(a, b):
    x, y = (words.view(np.float16).astype(np.float64) for words in (a, b))
    product = (x * y).astype(np.float16)
    return np.where(np.isnan(product), np.uint16(0x7FFF), product.view(np.uint16)).view(u32)


def expected_bytes(a, b, selector):
    sources = np.stack([a, b], axis=-1).view(np.uint8)
    digits = selector[:, None] >> 4 * np.arange(4, dtype=np.uint32) & 15
    chosen = np.take_along_axis(sources, (digits & 7).astype(int), axis=1)
    signs = np.where(chosen > 127, 255, 0)
    return np.where(digits > 7, signs, chosen).astype(np.uint8).view(u32).ravel()


def expected_selected(mask, a, b):
    mask, a, b = (np.unpackbits(x.view(np.uint8)).astype(bool) for x in (mask, a, b))
    return np.packbits(np.where(mask, a, b)).view(u32)


EXPECTED = {
    "cvt_rn_satfinite_e4m3x2_f32": lambda high, low: packed(
        nearest_codes("e4m3", high), nearest_codes("e4m3", low), np.uint16
    ),
    "cvt_rn_satfinite_e5m2x2_f32": lambda high, low: packed(
        nearest_codes("e5m2", high), nearest_codes("e5m2", low), np.uint16
    ),
    "cvt_rn_f16x2_e4m3x2": lambda codes: halves_of_codes("e4m3")[codes.view(np.uint8)].view(u32),
    "cvt_rn_f16x2_e5m2x2": lambda codes: halves_of_codes("e5m2")[codes.view(np.uint8)].view(u32),
    "mul_rn_f16x2": expected_product,
    "prmt_b32": expected_bytes,
    "lop3_select_b32": expected_selected,
    "mov_b32_halves": lambda low, high: packed(high, low, np.uint32),
}


@pytest.mark.parametrize("case", FP8_CASES, ids=str)
def test_a_case_gives_what_is_expected(case):
    expected = EXPECTED[case.instruction](*case.inputs)
    (got,) = run_simulated(case)
    assert got.dtype == expected.dtype and case.difference([expected], [got]) is None


def test_bytes_and_bits():
    assert hex(prmt_b32(0x33221100, 0x77665544, 0x7520)) == "0x77552200"
    assert hex(prmt_b32(0x80000000, 0x0000007F, 0xBBC4)) == "0xffff007f"
    assert hex(lop3_select_b32(0xFF00FF00, 0x11223344, 0x55667788)) == "0x11663388"
    assert type(prmt_b32(1, 2, 0x40)) is type(lop3_select_b32(u32(1), u32(2), u32(3))) is u32
    assert hex(cvt_rn_f16x2_e4m3x2(0x387E)) == "0x3c005f00", "1 above 448"


# Conversions


def four_at_a_time(format) -> np.ndarray:
    x = to_encode(FORMATS[format], n_random=2000)
    return np.resize(np.random.default_rng(1).permutation(x), (-(-x.size // 4), 4))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_encode(format, generation):
    encode, x = make_encode(format, generation), four_at_a_time(format)
    got = np.array([encode(*four) for four in x])
    assert got.dtype == np.uint32
    wrong = got.view(np.uint8).reshape(x.shape) != nearest_codes(format, x)
    assert not wrong.any(), x[wrong][:5]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_ends_of_e4m3(generation):
    encode = make_encode("e4m3", generation)
    tie = 448 + 16
    assert hex(encode(f32(tie), f32(1e30), f32(math.inf), f32(-math.inf))) == "0xfe7e7e7e"
    assert hex(encode(f32(0), f32(-0.0), f32(2.0**-10), f32(-(2.0**-10)))) == "0x80008000"
    assert hex(encode(f32(3 * 2.0**-10), NAN, f32(-math.nan), f32(1))) == "0x387f7f02"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_encoded_to_itself(format, generation):
    encode = make_encode(format, generation)
    codes = np.arange(256, dtype=np.uint8)
    got = np.array([encode(*four) for four in FORMATS[format].decode(codes).reshape(-1, 4)])
    finite = (codes & 0x7F) <= LAYOUTS[format][2]
    assert (got.view(np.uint8)[finite] == codes[finite]).all() and finite.sum() in (254, 248)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decode(generation):
    decode = make_decode_halves(generation)
    # Each code in each place, among others of all kinds.
    codes = np.arange(256, dtype=np.uint8)
    neighbours = np.random.default_rng(2).permutation(np.repeat(codes, 12)).reshape(4, 256, 3)
    rows = [np.insert(beside, place, codes, axis=1) for place, beside in enumerate(neighbours)]
    codes = np.concatenate(rows)
    got = np.zeros((codes.shape[0], 2), np.uint32)
    for word, target in zip(codes.view(np.uint32).ravel(), got, strict=True):
        decode(word, target)
    assert (got.view(np.uint16) == halves_of_codes("e4m3")[codes]).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decode_to_bfloat16(generation):
    codes, target = np.arange(256, dtype=np.uint8), np.zeros((64, 2), np.uint32)
    decode = make_decode("bfloat16", generation)
    for word, two in zip(codes.view(np.uint32), target, strict=True):
        decode(word, two)
    got = target.view(ml_dtypes.bfloat16).ravel().astype(np.float32)
    np.testing.assert_array_equal(got, FORMATS["e4m3"].decode(codes))
    assert make_decode("float16", generation) is make_decode_halves(generation)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decode_then_encode(generation):
    decode, encode = make_decode_halves(generation), make_encode("e4m3", generation)
    target = np.zeros(2, np.uint32)
    for word in np.arange(256, dtype=np.uint8).reshape(-1, 4).view(np.uint32).ravel():
        decode(word, target)
        four = target.view(np.float16).astype(np.float32)
        nan = np.isnan(four)
        expected = np.where(nan, 0x7F, u32(word).reshape(1).view(np.uint8))
        assert (u32(encode(*four)).reshape(1).view(np.uint8) == expected).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_round_to_e4m3(generation):
    round_two = make_round_to_e4m3(generation)
    x = to_encode(FORMATS["e4m3"])
    powers = np.exp2(np.random.default_rng(3).uniform(-20, 8.8, 3000)).astype(np.float32)
    x = np.concatenate([x[(x >= 0) & (x <= 448) & ~np.signbit(x)], powers])
    low, high = x, np.roll(x, 501)
    got = np.array([round_two(a, b) for a, b in zip(low, high, strict=True)])
    assert got.dtype == np.uint32
    codes = np.stack([nearest_codes("e4m3", low), nearest_codes("e4m3", high)], axis=1)
    assert (got.view(np.uint16).reshape(-1, 2) == halves_of_codes("e4m3")[codes]).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_nan_is_not_rounded_to_a_number(generation):
    round_two = make_round_to_e4m3(generation)
    for x in (0, 2.0**-9, 1, 448):
        low, high = round_two(NAN, f32(x)), round_two(f32(x), NAN)
        assert low & 0x7FFF > 0x7C00 and high >> 16 & 0x7FFF > 0x7C00
        if generation != "sm75":
            code = nearest_codes("e4m3", np.array([x], np.float32))
            other = int(halves_of_codes("e4m3")[code][0])
            assert (low, high) == (0x7FFF | other << 16, 0x7FFF0000 | other)
