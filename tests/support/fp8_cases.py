"""Cases of the instructions that 8-bit floats are converted with, and inputs of conversions."""

import numpy as np

from numflash.configs.formats import FORMATS, Format
from numflash.ptx import (
    cuda,
    cvt_rn_f16x2_e4m3x2,
    cvt_rn_f16x2_e5m2x2,
    cvt_rn_satfinite_e4m3x2_f32,
    cvt_rn_satfinite_e5m2x2_f32,
    f32,
    lop3_select_b32,
    mov_b32_halves,
    mul_rn_f16x2,
    prmt_b32,
    u16,
    u32,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase


def to_encode(kind: Format, n_random: int = 500) -> np.ndarray:
    """float32 of both signs: each number, ties of neighbours, what lies around; ends and NaNs.

    The last tie is of the largest number and the one that would follow it.
    """
    numbers = kind.values[:128]
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = (numbers + np.append(numbers[1:], 2 * numbers[-1] - numbers[-2])) / 2
    exact = np.concatenate([numbers, ties, [2 * kind.largest, 1e10, np.inf]]).astype(np.float32)
    subnormal = np.array([1, 2, 0x7FFFFF, 0x800000], np.uint32).view(np.float32)
    nans = np.array([0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7FA12345], np.uint32).view(np.float32)
    bits = np.random.default_rng(8).integers(0, 2**31, n_random, np.uint32)
    bits[::2] = bits[::2] % (0x4B << 24) | 0x30 << 24
    x = np.concatenate(
        [
            exact,
            np.nextafter(exact, f32(0)),
            np.nextafter(exact, f32(np.inf)),
            subnormal,
            nans,
            bits.view(np.float32),
        ]
    )
    return np.concatenate([x, -x])


# Kernels


def _map_two(instruction, a_type, b_type, y_type, n):
    def apply(a: Pointer(a_type), b: Pointer(b_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i])

    return apply


def _map_three(instruction, n):
    def apply(a: Pointer(u32), b: Pointer(u32), c: Pointer(u32), y: Pointer(u32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i], c[i])

    return apply


def _map_codes(instruction, n):
    def apply(codes: Pointer(u16), y: Pointer(u32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(codes[i])

    return apply


# Cases


def _case(instruction, kernel, inputs, y_type=u32) -> InstructionCase:
    outputs = ((inputs[0].shape, y_type),)
    return InstructionCase(instruction.__name__, "", kernel, inputs, outputs)


def _encode_case(instruction, kind: Format) -> InstructionCase:
    high = to_encode(kind)
    kernel = _map_two(instruction, f32, f32, u16, high.size)
    return _case(instruction, kernel, (high, np.roll(high, 307)), u16)


def _decode_case(instruction) -> InstructionCase:
    """Every code beside every seventh other one."""
    low, high = np.arange(256, dtype=np.uint16), np.arange(0, 256, 7, dtype=np.uint16)
    codes = (low | high[:, None] << 8).ravel()
    return _case(instruction, _map_codes(instruction, codes.size), (codes,))


def _product_case() -> InstructionCase:
    """Numbers of every kind, subnormals, infinities and NaNs too; products that overflow."""
    halves = np.arange(0, 65536, 29, dtype=np.uint16)
    halves = halves[: halves.size // 2 * 2]
    other = np.array([0x3C00, 0x5C00, 0x3555, 0x8000, 0xFBFF, 0x0001, 0x7C00, 0x7E01], np.uint16)
    b = np.repeat(other, halves.size).view(np.uint32)
    a = np.tile(halves, other.size).view(np.uint32)
    return _case(mul_rn_f16x2, _map_two(mul_rn_f16x2, u32, u32, u32, a.size), (a, b))


def _bit_cases() -> list[InstructionCase]:
    rng = np.random.default_rng(9)
    a, b, c = (rng.integers(0, 2**32, 512, np.uint32) for _ in range(3))
    low, high = (rng.integers(0, 2**16, 512, np.uint16) for _ in range(2))
    halves = _map_two(mov_b32_halves, u16, u16, u32, low.size)
    return [
        _case(prmt_b32, _map_three(prmt_b32, a.size), (a, b, c)),
        _case(lop3_select_b32, _map_three(lop3_select_b32, a.size), (a, b, c)),
        _case(mov_b32_halves, halves, (low, high)),
    ]


FP8_CASES = [
    _encode_case(cvt_rn_satfinite_e4m3x2_f32, FORMATS["e4m3"]),
    _encode_case(cvt_rn_satfinite_e5m2x2_f32, FORMATS["e5m2"]),
    _decode_case(cvt_rn_f16x2_e4m3x2),
    _decode_case(cvt_rn_f16x2_e5m2x2),
    _product_case(),
    *_bit_cases(),
]
