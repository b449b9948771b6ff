"""Every instruction's meaning in the simulator, against what PTX ISA says of its edge cases.

Expected values come from elsewhere than the bodies: float64, `struct`, and the rules in words. The
GPU tests run the same cases on hardware.
"""

import inspect
import math
import re
import struct
import sys

import numpy as np
import pytest

from numflash.ptx import (
    INSTRUCTIONS,
    bits_as_float,
    cvt_f32_f16,
    cvt_rn_f16_f32,
    ex2_approx_ftz_f32,
    f32,
    float_as_bits,
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_v4_f32,
    max_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_shared_f32,
    st_shared_v4_f32,
    u16,
    u32,
)
from numflash.simulator import GlobalPointer
from tests.instruction_cases import (
    CASES,
    HALF_CODES,
    NANS,
    SUBNORMALS,
    TINY,
    InstructionCase,
    bit_distance,
    run_simulated,
)

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


def test_every_instruction_has_cases():
    assert set(CASES) == set(INSTRUCTIONS)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_says_what_it_is(name):
    declared = INSTRUCTIONS[name]
    own, module = declared.body.__doc__, sys.modules[declared.body.__module__].__doc__
    assert own and own.strip().endswith("."), "a docstring"
    section = r"PTX ISA (section )?\d+(\.\d+)+"
    assert re.search(section, own) or re.search(section, module), "its section of the PTX ISA"
    assert declared.sm >= 75
    assert declared.collective in (None, "warp", "warpgroup")


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_template_names_its_operands(name):
    declared = INSTRUCTIONS[name]
    named = set(re.findall(r"<(\w+)>", declared.template)) - {"uid"}
    # An index belongs to the address of another operand.
    indices = {o.index for o in declared.operands.values() if hasattr(o, "index")}
    expected = set(declared.operands) - indices
    assert named == expected | ({"ret"} if declared.result else set())
    assert declared.template.endswith(";")


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_mnemonic_is_in_the_name(name):
    # bits_as_float and float_as_bits are both mov.b32.
    mnemonic = INSTRUCTIONS[name].template.split()[0].split(".")[0]
    assert name.startswith(mnemonic) or mnemonic == "mov"


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_kernels_of_cases_declare_the_pointers_they_take(case):
    annotations = [p.annotation for p in inspect.signature(case.kernel).parameters.values()]
    arrays = [a.dtype for a in case.inputs] + [np.dtype(dtype) for _, dtype in case.outputs]
    assert [np.dtype(a.element) for a in annotations] == arrays


# What each case must give. One function an instruction: inputs -> outputs.


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


def expected_pairs_of_warps(x):
    chunks = x.reshape(-1, 64)
    return np.append(chunks[:, ::-1].ravel(), x[64:96][::-1])


def spread(x, n):
    """Groups of n elements, each followed by as many that hold 0xFF bytes."""
    groups = x.reshape(-1, n)
    gaps = np.full_like(groups.view(np.uint8), 0xFF).view(x.dtype)
    return np.concatenate([groups, gaps], axis=1).ravel()


EXPECTED = {
    "ex2_approx_ftz_f32": expected_ex2,
    "max_f32": expected_max,
    "cvt_f32_f16": expected_cvt_f32_f16,
    "cvt_rn_f16_f32": expected_cvt_rn_f16_f32,
    "float_as_bits": lambda x: x.view(np.uint32),
    "bits_as_float": lambda x: x.view(np.float32),
    "ld_global_v4_u32": lambda x: x.view(np.uint32).reshape(-1, 4)[::-1].ravel(),
    "ld_global_v4_f32": lambda x: x.reshape(-1, 4)[::-1].ravel(),
    "st_global_v4_f32": lambda x: spread(x, 4),
    "st_global_v2_u32": lambda x: spread(x, 2),
    "ld_shared_v4_f32": lambda x: x.reshape(-1, 4)[::-1].ravel(),
    "st_shared_v4_f32": lambda x: np.concatenate(
        [x.reshape(-1, 4)[::-1], np.full((x.size // 4, 4), -1, np.float32)], axis=1
    ).ravel(),
    "st_shared_f32": lambda x: x.reshape(-1, 4)[::-1].ravel(),
    "bar_sync": expected_pairs_of_warps,
    "bar_arrive": lambda x: x.reshape(-1, 32)[:, ::-1].ravel(),
}


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
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


# Conversions


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


def test_a_conversion_rounds_a_python_float_to_float32_first():
    # In float64 this lies above the tie, in float32 on it.
    assert cvt_rn_f16_f32(1 + 2.0**-11 + 2.0**-40) == 0x3C00


def test_conversions_take_what_kernels_compute():
    assert cvt_f32_f16(0x3C00) == 1 and cvt_f32_f16(u32(0x3C00)) == 1
    assert type(bits_as_float(0x3F800000)) is f32 and type(float_as_bits(1.0)) is u32


def test_bits_of_every_nan_stay():
    for nan in NANS:
        assert bits(bits_as_float(float_as_bits(nan))) == bits(nan)


# Memory


def memory(n, dtype=np.float32, offset_bytes=0):
    """n elements that lie `offset_bytes` after an address that 256 divides."""
    itemsize = np.dtype(dtype).itemsize
    whole = np.zeros(n * itemsize + 512, np.uint8)
    start = -whole.__array_interface__["data"][0] % 256 + offset_bytes
    array = whole[start : start + n * itemsize].view(dtype)
    array[...] = np.arange(n)
    return array


GLOBAL_VECTORS = {
    "ld_global_v4_u32": lambda pointer, i: ld_global_v4_u32(np.zeros(4, u32), pointer, i),
    "ld_global_v4_f32": lambda pointer, i: ld_global_v4_f32(np.zeros(4, f32), pointer, i),
    "st_global_v4_f32": lambda pointer, i: st_global_v4_f32(pointer, i, np.zeros(4, f32)),
    "st_global_v2_u32": lambda pointer, i: st_global_v2_u32(pointer, i, np.zeros(2, u32)),
}
SHARED_VECTORS = {
    "ld_shared_v4_f32": lambda array, i: ld_shared_v4_f32(np.zeros(4, f32), array, i),
    "st_shared_v4_f32": lambda array, i: st_shared_v4_f32(array, i, np.zeros(4, f32)),
}


@pytest.mark.parametrize("name", GLOBAL_VECTORS)
@pytest.mark.parametrize("storage", [np.float32, np.uint16], ids=lambda dtype: dtype.__name__)
def test_a_global_vector_lies_inside_its_array_and_aligned(name, storage):
    access = GLOBAL_VECTORS[name]
    n_bytes = 8 if "v2" in name else 16
    step = n_bytes // np.dtype(storage).itemsize
    pointer = GlobalPointer(memory(4 * step - 1, storage), storage, "x")
    for i in (0, step, 2 * step):
        access(pointer, i)
    for i in (-step, -1, 3 * step, 4 * step, 2**40):
        with pytest.raises(IndexError, match=rf"x: elements {i} to {i + step - 1} lie outside"):
            access(pointer, i)
    for i in (1, step - 1, step + 1, step // 2):
        with pytest.raises(ValueError, match=f"x: a {n_bytes}-byte access at element {i} is misa"):
            access(pointer, i)
    access(GlobalPointer(memory(2 * step, storage, offset_bytes=n_bytes), storage), 0)
    with pytest.raises(ValueError, match="misaligned"):
        access(GlobalPointer(memory(2 * step, storage, offset_bytes=n_bytes // 2), storage), 0)


@pytest.mark.parametrize("name", SHARED_VECTORS)
def test_a_shared_vector_lies_inside_its_array_and_aligned(name):
    access = SHARED_VECTORS[name]
    array = memory(15)
    for i in (0, 4, 8, np.int64(8), np.int32(4)):
        access(array, i)
    for i in (-4, 12, 16):
        with pytest.raises(IndexError, match=f"shared memory: floats {i} to {i + 3} of 15"):
            access(array, i)
    for i in (1, 2, 3, 5, -1):
        with pytest.raises(ValueError, match=f"a 16-byte access at float {i} is misaligned"):
            access(array, i)


def test_a_shared_store_does_not_wrap_around():
    array = memory(4)
    st_shared_f32(array, 3, f32(10))
    assert array.tolist() == [0, 1, 2, 10]
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"shared memory: float {i} of 4"):
            st_shared_f32(array, i, f32(1))


def test_vectors_touch_nothing_else():
    array = memory(12)
    st_global_v4_f32(GlobalPointer(array, f32), 4, np.full(4, 100, f32))
    assert array.tolist() == [0, 1, 2, 3, 100, 100, 100, 100, 8, 9, 10, 11]
    frag = np.full(6, -1, np.float32)
    ld_shared_v4_f32(frag[1:5], array, 8)
    assert frag.tolist() == [-1, 8, 9, 10, 11, -1]
    st_shared_v4_f32(array, 0, np.arange(4, dtype=f32) + 50)
    assert array[:5].tolist() == [50, 51, 52, 53, 100]
