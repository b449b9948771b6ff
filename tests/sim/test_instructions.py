"""Every instruction's meaning in the simulator, against what PTX ISA says of its edge cases.

Expected values come from elsewhere than the bodies: float64, `struct`, `ml_dtypes`, and the rules
in words. The GPU tests run the same cases on hardware. Tensor cores, 8-bit floats, asynchronous
copies and what memory accesses refuse have files of their own.
"""

import inspect
import math
import re
import struct
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from numflash.ptx import (
    INSTRUCTIONS,
    TensorMap,
    ex2_approx_ftz_f32,
    f32,
    max_f32,
    min_f32,
    u32,
)
from numflash.ptx.operands import Accumulator
from tests.support.arithmetic_cases import NANS, SUBNORMALS, TINY
from tests.support.instruction_cases import BASIC_CASES, CASES
from tests.support.instruction_harness import InstructionCase, bit_distance, run_simulated

INF = f32(math.inf)
# The NaN that single-precision instructions make of any NaN; for half precision 0x7FFF.
NAN = 0x7FFFFFFF
ALL_CASES = [case for cases in CASES.values() for case in cases]


@pytest.fixture(autouse=True)
def no_warnings():
    """Bodies run without NumPy's warnings, as they do in a launch."""
    with np.errstate(all="ignore"):
        yield


def bits(x) -> int:
    """The bits of a float32."""
    assert type(x) is f32
    return int(x.view(u32))


# All instructions


# Factories register an instruction at each call: a factory has one case, not one for every call.
FACTORIES = ("wgmma_m64", "wgmma_wait_group_", "setmaxnreg_inc_", "setmaxnreg_dec_")


def test_every_instruction_has_cases():
    assert {name for name in INSTRUCTIONS if not name.startswith(FACTORIES)} <= set(CASES)
    assert set(CASES) <= set(INSTRUCTIONS)
    for made in FACTORIES:
        assert any(name.startswith(made) for name in CASES), made


def test_an_instruction_says_what_it_is():
    section = r"PTX ISA (section )?\d+(\.\d+)+"
    for name, declared in INSTRUCTIONS.items():
        own, module = declared.body.__doc__, sys.modules[declared.body.__module__].__doc__
        assert own and own.strip().endswith("."), f"a docstring of {name}"
        assert re.search(section, own + module), f"the section of the PTX ISA of {name}"
        assert declared.sm >= 75, name
        assert declared.collective in (None, "warp", "warpgroup"), name


def test_a_template_names_its_operands():
    for declared in INSTRUCTIONS.values():
        _expect_operands(declared)


def _expect_operands(declared):
    named = set(re.findall(r"<(\w+)>", declared.template)) - {"uid"}
    # An index belongs to the address of another operand.
    indices = {o.index for o in declared.operands.values() if hasattr(o, "index")}
    expected = set(declared.operands) - indices | ({"ret"} if declared.result else set())
    # A wait names registers only to have them written.
    tied = {n for n, o in declared.operands.items() if isinstance(o, Accumulator)}
    assert expected - tied <= named <= expected, declared.template
    assert declared.template.endswith((";", "; }", ": }")), declared.template


def test_the_mnemonic_is_in_the_name():
    for name, declared in INSTRUCTIONS.items():
        # bits_as_float and float_as_bits are both mov.b32.
        mnemonics = {word.split(".")[0] for word in declared.template.split()}
        assert name.split("_")[0] in mnemonics or "mov" in mnemonics, name


def test_kernels_of_cases_declare_the_pointers_they_take():
    for case in ALL_CASES:
        _expect_pointers(case)


def _expect_pointers(case):
    annotations = [p.annotation for p in inspect.signature(case.kernel).parameters.values()]
    arrays = [a.dtype for a in case.inputs] + [np.dtype(dtype) for _, dtype in case.outputs]
    expected = [None if map else a for a, map in zip(arrays, case.layouts, strict=True)]
    found = [None if a is TensorMap else np.dtype(a.element) for a in annotations]
    assert found == expected, str(case)


# The outputs that each case must give. One function an instruction: inputs -> outputs.


def expected_ex2(x):
    with np.errstate(all="ignore"):
        y = np.exp2(x.astype(np.float64))
        rounded = y.astype(np.float32)
    rounded[y < TINY] = 0
    return rounded


def expected_max(a, b):
    def larger(x, y):
        if math.isnan(x) or math.isnan(y):
            return f32(y) if math.isnan(x) and not math.isnan(y) else f32(x)
        # +0 is larger than -0.
        return max(x, y, key=lambda z: (float(z), math.copysign(1, z)))

    result = np.array([larger(x, y) for x, y in zip(a, b, strict=True)], np.float32)
    return np.where(np.isnan(result), u32(NAN).view(f32), result)


def expected_min(a, b):
    result = -expected_max(-a, -b)
    return np.where(np.isnan(result), u32(NAN).view(f32), result)


def expected_mul(a, b):
    # The product of two float32 is exact in float64.
    with np.errstate(all="ignore"):
        product = (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)
    return np.where(np.isnan(product), u32(NAN).view(f32), product)


def expected_fma(a, b, c):
    """The float32 nearest to the exact sum, by fractions."""

    def rounded(x, y, z):
        if not all(map(math.isfinite, (x, y, z))):
            total = x * y + z  # infinite or NaN whatever is rounded
            return total if total == total else None
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if exact == 0:
            return x * y + z  # its sign, as the sum of a product that is exact in float64
        magnitude = abs(exact)
        exponent = max(-126, math.floor(math.log2(magnitude.numerator / magnitude.denominator)))
        while exponent > -126 and magnitude < Fraction(2) ** exponent:
            exponent -= 1
        place = Fraction(2) ** (exponent - 23)
        nearest = round(magnitude / place) * place  # ties to even
        return math.copysign(math.inf if nearest >= 2**128 else float(nearest), exact)

    values = [rounded(*xyz) for xyz in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    nan = u32(NAN).view(f32)
    return np.array([nan if v is None else f32(v) for v in values], np.float32)


def expected_cvt_f32_f16(codes):
    values = [struct.unpack("<e", struct.pack("<H", code))[0] for code in codes.tolist()]
    result = np.array(values, np.float64).astype(np.float32)
    return np.where(np.isnan(result), u32(NAN).view(f32), result)


def expected_cvt_rn_f16_f32(x):
    def rounded(value):
        if math.isnan(value):
            return 0x7FFF
        try:
            return struct.unpack("<H", struct.pack("<e", value))[0]
        except OverflowError:
            return 0x7C00 if value > 0 else 0xFC00

    return np.array([rounded(value) for value in x.tolist()], np.uint16)


def expected_cvt_rn_f16x2_f32(high, low):
    return packed(expected_cvt_rn_f16_f32(high), expected_cvt_rn_f16_f32(low))


def expected_cvt_rn_bf16x2_f32(high, low):
    def rounded(x):
        codes = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), codes)

    return packed(rounded(high), rounded(low))


def packed(high, low):
    return np.stack([low, high], axis=1).view(np.uint32).ravel()


def expected_cvt_rna_tf32_f32(x):
    """Of the multiples of the last place of tf32 the nearest, counted away from zero."""

    def rounded(value):
        if not math.isfinite(value):
            return value
        _, exponent = math.frexp(value)
        place = 2.0 ** (max(exponent, -125) - 11)
        return math.copysign(math.floor(abs(value) / place + 0.5) * place, value)

    result = np.array([rounded(value) for value in x.tolist()]).astype(np.float32).view(u32)
    # Numbers above the largest tf32 became infinite. Of a NaN the high bits stay.
    return np.where(np.isnan(x), x.view(u32) & u32(0xFFFFE000), result)


def expected_pairs_of_warps(x):
    chunks = x.reshape(-1, 64)
    return np.append(chunks[:, ::-1].ravel(), x[64:96][::-1])


def backwards(n):
    return lambda x: x.reshape(-1, n)[::-1].ravel()


def between_ones(x):
    vectors = x.reshape(-1, 4)[::-1]
    return np.concatenate([vectors, np.ones_like(vectors)], axis=1).ravel()


def spread(x, n):
    """Groups of n elements, each followed by as many that hold 0xFF bytes."""
    groups = x.reshape(-1, n)
    gaps = np.full_like(groups.view(np.uint8), 0xFF).view(x.dtype)
    return np.concatenate([groups, gaps], axis=1).ravel()


def canonical(x):
    """float32 with one NaN."""
    return np.where(np.isnan(x), u32(NAN).view(f32), x).astype(f32)


def in_float64(function, summand=0):
    """The function of numbers as .ftz reads and writes them: subnormals are 0."""

    def flushed(x):
        return np.where(np.abs(x) < TINY, np.copysign(0, x), x)

    def expected(*x):
        y = flushed(function(*(flushed(each.astype("f8")) for each in x)).astype("f4"))
        return canonical((y + f32(summand)).astype("f4"))

    return expected


def whole_number(x: float) -> int:
    """x as int32 without its fraction; what is too large as the largest, a NaN as 0."""
    return 0 if math.isnan(x) else int(np.clip(np.trunc(x), -(2.0**31), 2.0**31 - 1))


def expected_pairs(register):
    """What threads get of the last pairs first: of -1, 0, 1 and 2 elements that are left."""

    def expected(x):
        pairs, left = x.reshape(-1, 2)[::-1].copy(), np.arange(x.size // 2) % 4 - 1
        pairs[left < 1] = 0
        pairs[left == 1, 1] = 0
        return pairs.view(register).ravel()

    return expected


EXPECTED = {
    "ex2_approx_ftz_f32": expected_ex2,
    "max_f32": expected_max,
    "min_f32": expected_min,
    "mul_rn_f32": expected_mul,
    "fma_rn_f32": expected_fma,
    "cvt_f32_f16": expected_cvt_f32_f16,
    "cvt_rn_f16_f32": expected_cvt_rn_f16_f32,
    "cvt_rn_f16x2_f32": expected_cvt_rn_f16x2_f32,
    "cvt_rn_bf16x2_f32": expected_cvt_rn_bf16x2_f32,
    "cvt_rna_tf32_f32": expected_cvt_rna_tf32_f32,
    "float_as_bits": lambda x: x.view(np.uint32),
    "bits_as_float": lambda x: x.view(np.float32),
    "ld_global_v4_u32": lambda x: backwards(4)(x.view(np.uint32)),
    "ld_global_v4_f32": backwards(4),
    "ld_global_pair_b16": expected_pairs(np.uint16),
    "ld_global_pair_b32": expected_pairs(np.uint32),
    "ld_global_pair_b64": expected_pairs(np.uint64),
    "st_global_v4_f32": lambda x: spread(x, 4),
    "st_global_v4_u32": lambda x: spread(x, 4),
    "st_global_v2_f32": lambda x: spread(x, 2),
    "st_global_v2_u32": lambda x: spread(x, 2),
    "ld_shared_v4_f32": backwards(4),
    "ld_shared_v4_u32": backwards(4),
    "ld_shared_v2_f32": lambda x: backwards(2)(x.view(f32)),
    "ld_shared_u32": backwards(4),
    "st_shared_v4_f32": between_ones,
    "st_shared_v4_u32": between_ones,
    "st_shared_f32": backwards(4),
    "st_shared_u32": backwards(4),
    "div_full_ftz_f32": in_float64(np.divide),
    "div_u32": lambda a, b: a // b,
    "lg2_approx_ftz_f32": in_float64(np.log2, 8),
    "sqrt_approx_ftz_f32": in_float64(np.sqrt),
    "rsqrt_approx_ftz_f32": in_float64(lambda x: 1 / np.sqrt(x)),
    "tanh_approx_f32": in_float64(np.tanh),
    "sin_approx_ftz_f32": in_float64(np.sin, 2),
    "cos_approx_ftz_f32": in_float64(np.cos, 2),
    "cvt_rmi_f32_f32": lambda x: canonical(np.floor(x.astype("f8")).astype("f4")),
    "cvt_rzi_s32_f32": lambda x: np.array([whole_number(v) for v in x.tolist()], np.int32),
    "bra_over_barrier": lambda x: np.arange(x.size, dtype=u32),
    "red_global_add_s64": lambda x: x.reshape(-1, 8).sum(0) - 1,
    "mov_tid_x": lambda x: np.stack([np.arange(x.size, dtype=u32), x], axis=1).ravel(),
    "bar_sync": expected_pairs_of_warps,
    "bar_arrive": lambda x: x.reshape(-1, 32)[:, ::-1].ravel(),
}


@pytest.mark.parametrize("case", BASIC_CASES, ids=str)
def test_a_case_gives_what_is_expected(case):
    expected = EXPECTED[case.instruction](*case.inputs)
    (got,) = run_simulated(case)
    assert case.difference([expected.view(got.dtype).reshape(got.shape)], [got]) is None


@pytest.mark.parametrize("name", ["bar_sync", "bar_arrive"])
def test_cases_of_barriers_give_the_same_for_every_order(name, each_seed):
    (case,) = CASES[name]
    assert (run_simulated(case)[0] == EXPECTED[name](*case.inputs)).all()


def test_a_case_says_what_differs():
    x = np.array([1, 2, np.nan, -0.0], np.float32)
    near, far = np.nextafter(x, INF), x + f32(1)
    near[3] = 0.0
    case = InstructionCase("toy", "near", None, (x,), ((4, f32),), tolerance_ulp=1)
    exact = InstructionCase("toy", "", None, (x,), ((4, f32),))
    assert case.difference([x], [near]) is None and case.difference([x], [x]) is None
    assert exact.difference([x], [x]) is None
    assert "3 of 4 elements of output 0 differ" in exact.difference([x], [near])
    text = case.difference([x], [far])
    assert text.startswith(
        "toy-near: 3 of 4 elements of output 0 differ, first element 0 (input 1"
    )
    other_nan = np.where(np.isnan(x), NANS[2], x)
    assert "1 of 4 elements" in exact.difference([np.where(np.isnan(x), NANS[0], x)], [other_nan])
    assert case.difference([np.where(np.isnan(x), NANS[0], x)], [other_nan]) is None
    assert bit_distance(np.array([-0.0], f32), np.array([0.0], f32)) == 1


# Arithmetic


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (-math.inf, 0),
        (math.inf, math.inf),
        (0.0, 1),
        (-0.0, 1),
        (SUBNORMALS[0], 1),
        (SUBNORMALS[-1], 1),
        (1, 2),
        (-1, 0.5),
        (127, 2.0**127),
        (128, math.inf),
        (1e30, math.inf),
        (-126, TINY),
        (np.nextafter(f32(-126), -INF), 0),
        (-127, 0),
        (-149, 0),
        (-1e30, 0),
    ],
)
def test_ex2(x, y):
    got = ex2_approx_ftz_f32(f32(x))
    assert bits(got) == bits(f32(y))


@pytest.mark.parametrize("x", NANS, ids=lambda x: hex(bits(x)))
def test_ex2_of_nan_is_nan(x):
    assert bits(ex2_approx_ftz_f32(x)) == NAN


def test_ex2_is_accurate_to_two_ulp():
    x = np.linspace(-126, 127.9, 3001).astype(np.float32)
    got = np.array([ex2_approx_ftz_f32(v) for v in x])
    assert bit_distance(got, expected_ex2(x)).max() <= 2


def test_max_prefers_a_number_to_nan_and_plus_zero_to_minus_zero():
    for nan in NANS:
        for number in (f32(1), -INF, f32(-0.0)):
            assert bits(max_f32(nan, number)) == bits(max_f32(number, nan)) == bits(number)
        assert all(bits(max_f32(nan, other)) == NAN for other in NANS)
    plus, minus = f32(0.0), f32(-0.0)
    assert bits(max_f32(plus, minus)) == bits(max_f32(minus, plus)) == 0
    assert bits(max_f32(minus, minus)) == 0x80000000
    assert max_f32(SUBNORMALS[0], minus) == SUBNORMALS[0], "subnormal operands are not flushed"


def test_min_prefers_a_number_to_nan_and_minus_zero_to_plus_zero():
    for nan in NANS:
        assert bits(min_f32(nan, INF)) == bits(min_f32(INF, nan)) == bits(INF)
        assert all(bits(min_f32(nan, other)) == NAN for other in NANS)
    plus, minus = f32(0.0), f32(-0.0)
    assert bits(min_f32(plus, minus)) == bits(min_f32(minus, plus)) == 0x80000000
    assert bits(min_f32(plus, plus)) == 0
    assert min_f32(f32(2), f32(-3)) == -3 and min_f32(SUBNORMALS[0], f32(1)) == SUBNORMALS[0]
