"""Products of a warp and `ldmatrix` in the simulator, against the formulas of PTX ISA.

Expected values come from matrices that are filled element by element, as the sections on fragments
say in words, and multiplied in float64.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from numflash.ptx import cuda, f32, ldmatrix_x4, ldmatrix_x4_trans, mma_m16n8k8_f16, u32
from numflash.runtime.views import Pointer
from numflash.simulator import DeadlockError, GlobalPointer, launch
from tests.support.instruction_harness import THREADS, run_simulated
from tests.support.tensor_core_cases import E4M3_SUM_BITS, TENSOR_CORE_CASES

LOADS = {"ldmatrix_x4": ldmatrix_x4, "ldmatrix_x4_trans": ldmatrix_x4_trans}


# PTX ISA's place of element i of a fragment: (groupID, threadID_in_group, i) -> row and column.


def d_place(group, thread, i):
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def a_place_m16n8k16(group, thread, i):
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8


def b_place_m16n8k16(group, thread, i):
    return thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group


def a_place_m16n8k8_f16(group, thread, i):
    return group if i in (0, 1) else group + 8, thread * 2 + (i & 1)


def b_place_m16n8k8_f16(group, thread, i):
    return thread * 2 + i, group


def a_place_m16n8k8_tf32(group, thread, i):
    return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4


def b_place_m16n8k8_tf32(group, thread, i):
    return thread if i == 0 else thread + 4, group


def a_place_m16n8k32(group, thread, i):
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16


def b_place_m16n8k32(group, thread, i):
    return thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16, group


PLACES = {
    "mma_m16n8k16_f16": (16, a_place_m16n8k16, b_place_m16n8k16),
    "mma_m16n8k16_bf16": (16, a_place_m16n8k16, b_place_m16n8k16),
    "mma_m16n8k8_f16": (8, a_place_m16n8k8_f16, b_place_m16n8k8_f16),
    "mma_m16n8k8_tf32": (8, a_place_m16n8k8_tf32, b_place_m16n8k8_tf32),
    "mma_m16n8k32_e4m3": (32, a_place_m16n8k32, b_place_m16n8k32),
}


def elements(name, words) -> np.ndarray:
    """The numbers that registers hold, the low half or byte of each first."""
    if name.endswith("tf32"):
        # The 19 high bits: sign, exponent, ten bits of the significand.
        return np.array([w >> 13 << 13 for w in words.tolist()], u32).view(f32).astype(np.float64)
    dtypes = {"bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "_f16": np.float16}
    return words.view(dtypes[name[-4:]]).astype(np.float64)


def matrix(shape, place, fragments) -> np.ndarray:
    """The matrix whose element i in lane l is fragments[l, i]; every place is filled once."""
    result, filled = np.zeros(shape), np.zeros(shape, int)
    for lane in range(32):
        for i, value in enumerate(fragments[lane]):
            at = place(lane >> 2, lane % 4, i)
            result[at] = value
            filled[at] += 1
    assert (filled == 1).all()
    return result


def expected_product(name, a, b, d):
    k, a_place, b_place = PLACES[name]
    result = np.zeros((2, 32, 4))
    numbers = (elements(name, a), elements(name, b), d.astype(np.float64))
    for warp, (a_warp, b_warp, d_warp) in enumerate(
        zip(*(x.reshape(2, 32, -1) for x in numbers), strict=True)
    ):
        a_matrix, b_matrix = matrix((16, k), a_place, a_warp), matrix((k, 8), b_place, b_warp)
        d_matrix = matrix((16, 8), d_place, d_warp)
        for lane in range(32):
            for i in range(4):
                row, column = d_place(lane >> 2, lane % 4, i)
                terms = [*(a_matrix[row] * b_matrix[:, column]), d_matrix[row, column]]
                result[warp, lane, i] = exact_sum(terms)
    return result.astype(np.float32).ravel()


def exact_sum(terms):
    return math.fsum(terms) if np.isfinite(terms).all() else np.sum(terms)


def expected_matrices(name, words, rows):
    """Row rows[l] of the elements is what lane l names."""
    named = words.view(np.uint16).reshape(-1, 8)[rows].reshape(2, 4, 8, 8)
    result = np.zeros((2, 32, 4, 2), np.uint16)
    for warp in range(2):
        for lane in range(32):
            for m, eight in enumerate(named[warp]):
                # Thread l receives elements 2 (l % 4) and the next one of row l / 4.
                row = eight.T[lane // 4] if name.endswith("trans") else eight[lane // 4]
                result[warp, lane, m] = row[2 * (lane % 4) : 2 * (lane % 4) + 2]
    return result.view(u32).ravel()


@pytest.mark.parametrize("case", TENSOR_CORE_CASES, ids=str)
def test_a_case_gives_what_is_expected(case):
    expected = expected_matrices if case.instruction in LOADS else expected_product
    (got,) = run_simulated(case)
    with np.errstate(invalid="ignore"):
        values = expected(case.instruction, *case.inputs)
    # The same bits but for a NaN's; the case's tolerance is for hardware.
    numbers = ~np.isnan(values)
    assert (np.isnan(got) == ~numbers).all()
    assert (got[numbers].view(u32) == values[numbers].view(u32)).all()
    if "not finite" in case.variant:
        counts = (np.isnan(values).sum(), np.isposinf(values).sum(), np.isneginf(values).sum())
        assert min(counts) >= 4, "every kind of result"
    elif case.instruction not in LOADS:
        assert np.isfinite(values).all() and (values != 0).all()


@pytest.mark.parametrize(
    "case", [c for c in TENSOR_CORE_CASES if c.variant in ("exact", "low bits")], ids=str
)
def test_exact_cases_are_exact_in_the_precision_of_hardware(case):
    """From the largest term down to the last bit that is not zero: hardware has no choice."""
    precision = E4M3_SUM_BITS if case.instruction.endswith("e4m3") else 24
    name, (a, b, d) = case.instruction, case.inputs
    for warp in range(2):
        parts = [x.reshape(2, -1)[warp] for x in (a, b, d)]
        a_max, b_max = (np.abs(elements(name, x)).max() for x in parts[:2])
        last = np.abs(elements(name, parts[0])).min() / 2
        largest = PLACES[name][0] * a_max * b_max + np.abs(parts[2]).max()
        for values in (elements(name, parts[0]), parts[2]):
            assert (values.astype(np.float64) % last == 0).all()
        assert (elements(name, parts[1]) % 1 == 0).all() and largest / last < 2**precision


def test_a_product_needs_every_lane_of_its_warp():
    def kernel():
        if cuda.threadIdx.x != 7:
            mma_m16n8k8_f16(cuda.local.array(4, f32), cuda.local.array(2, u32), u32(0))

    with pytest.raises(DeadlockError, match="mma_m16n8k8_f16: 31 of 32 threads came"):
        launch(kernel, 1, 32, [])


def test_products_add_up(each_seed):
    def kernel(out: Pointer(f32)):
        t = cuda.threadIdx.x
        d, a = cuda.local.array(4, f32), cuda.local.array(2, u32)
        for i in range(4):
            d[i] = f32(0)
        for i in range(2):
            a[i] = u32(0x3C003C00)
        for _ in range(3):
            mma_m16n8k8_f16(d, a, u32(0x40003C00))
        for i in range(4):
            out[4 * t + i] = d[i]

    # Ones in a, ones and twos in b: 8 terms that are 12, three times.
    out = np.zeros(4 * THREADS, np.float32)
    launch(kernel, 1, THREADS, [GlobalPointer(out, out.dtype)])
    assert (out == 36).all()


# ldmatrix


def load_rows(instruction, offsets, size=128):
    def kernel():
        smem = cuda.shared.array(0, u32, alignment=16)
        t = cuda.threadIdx.x
        for i in range(t, size, 32):
            smem[i] = u32(i)
        cuda.syncthreads()
        instruction(cuda.local.array(4, u32), smem, offsets[t])

    launch(kernel, 1, 32, [], 4 * size)


@pytest.mark.parametrize("instruction", LOADS.values(), ids=LOADS)
def test_a_row_of_ldmatrix_lies_in_shared_memory_and_aligned(instruction):
    offsets = [4 * ((7 * lane + 3) % 32) for lane in range(32)]
    load_rows(instruction, offsets)
    for lane in (0, 13, 31):
        for wrong in (1, 2, 6, 127, -3):
            bad = [*offsets[:lane], wrong, *offsets[lane + 1 :]]
            with pytest.raises(ValueError, match=f"lane {lane} names a row at word {wrong}"):
                load_rows(instruction, bad)
        for wrong in (-4, 128, 2**33):
            bad = [*offsets[:lane], wrong, *offsets[lane + 1 :]]
            with pytest.raises(IndexError, match=f"lane {lane} names word {wrong} of 128"):
                load_rows(instruction, bad)
