"""Inputs for arithmetic instructions, and kernels that apply them to many numbers at once."""

import numpy as np

from numflash.ptx import (
    bits_as_float,
    cos_approx_ftz_f32,
    cuda,
    cvt_f32_f16,
    cvt_rmi_f32_f32,
    cvt_rn_bf16x2_f32,
    cvt_rn_f16_f32,
    cvt_rn_f16x2_f32,
    cvt_rna_tf32_f32,
    cvt_rzi_s32_f32,
    div_full_ftz_f32,
    div_u32,
    ex2_approx_ftz_f32,
    f32,
    float_as_bits,
    fma_rn_f32,
    i32,
    lg2_approx_ftz_f32,
    max_f32,
    min_f32,
    mul_rn_f32,
    rsqrt_approx_ftz_f32,
    sin_approx_ftz_f32,
    sqrt_approx_ftz_f32,
    tanh_approx_f32,
    u16,
    u32,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase


def floats(*bits: int) -> np.ndarray:
    """float32 values by their bits."""
    return np.array(bits, np.uint32).view(np.float32)


TINY = np.finfo(np.float32).tiny


NANS = floats(0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF812345)


SUBNORMALS = floats(1, 2, 0x7FFFFF, 0x80000001, 0x807FFFFF)


SPECIALS = np.concatenate(
    [
        np.array([0.0, -0.0, 1, -1, 0.5, -2, 3, 1e10, -1e10, 1e-30, -1e-30], np.float32),
        np.array([np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).min], "f4"),
        np.array([TINY, -TINY, np.nextafter(TINY, f32(1))], np.float32),
        SUBNORMALS,
        NANS,
    ]
)


def random_floats(n: int) -> np.ndarray:
    """Random bits: every kind of float32, also infinities and NaNs."""
    bits = np.random.default_rng(1).integers(0, 2**32, n, np.uint32)
    bits[: n // 32] |= 0x7F800000
    return bits.view(np.float32)


def _exponents() -> np.ndarray:
    rng = np.random.default_rng(2)
    edges = np.array([-126, -127, -149, -150, -1000, 127, 128, 1000, 24, -24], np.float32)
    return np.concatenate(
        [
            SPECIALS,
            edges,
            np.nextafter(edges, f32(np.inf)),
            np.nextafter(edges, f32(-np.inf)),
            rng.uniform(-130, 130, 2000).astype(np.float32),
            rng.uniform(-1, 1, 1000).astype(np.float32),
        ]
    )


def _angles() -> np.ndarray:
    return np.concatenate(
        [SPECIALS[np.abs(SPECIALS) < 4], np.linspace(-3.14, 3.14, 999, dtype="f4")]
    )


def _to_bend() -> np.ndarray:
    ends = [0.0, -0.0, 1e-30, -1e-6, np.inf, -np.inf, np.nan]
    return np.concatenate([np.array(ends, "f4"), np.linspace(-12, 12, 999, dtype="f4")])


def _positive() -> np.ndarray:
    return np.concatenate([SPECIALS, np.abs(random_floats(1000)), random_floats(40)])


def _counts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2**32, (2, 1000), np.uint32)
    return a, np.maximum(b >> rng.integers(0, 32, 1000, np.uint32), np.uint32(1))


def _pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = (x.ravel() for x in np.meshgrid(SPECIALS, SPECIALS))
    return np.concatenate([a, random_floats(500)]), np.concatenate([b, random_floats(1000)[500:]])


HALF_CODES = np.arange(65536, dtype=np.uint16)


def _to_round() -> np.ndarray:
    """Every float16, midpoints of neighbours and what lies around them, and both ends."""
    with np.errstate(invalid="ignore"):
        exact = HALF_CODES.view(np.float16).astype(np.float32)
    finite = exact[:0x7C00]
    # The last midpoint is 65520, from which on the result is infinite.
    middle = (finite + np.append(finite[1:], f32(65536))) / f32(2)
    middle = np.concatenate([middle[::7], middle[:9], middle[1020:1030], middle[-9:]])
    around = [middle, np.nextafter(middle, f32(np.inf)), np.nextafter(middle, f32(0))]
    return np.concatenate([exact, *around, *(-a for a in around), SPECIALS, random_floats(500)])


def _to_round_in_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Numbers between float16 values, each with another number beside it."""
    x = _to_round()[65536:]
    return x, np.roll(x, 1001)


def _between_bfloat16() -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 values of every kind, their midpoints and what lies around, likewise in pairs."""
    high = np.concatenate([np.arange(0, 65536, 61), [0x7F7E, 0x7F7F, 0xFF7F, 0, 1, 0x7F, 0x80]])
    low = np.array([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] << 16 | low).astype(np.uint32).ravel()
    x = np.concatenate([bits.view(np.float32), SPECIALS])
    return x, np.roll(x, 1001)


def _between_tf32() -> np.ndarray:
    """Normal and subnormal numbers with tf32 values, midpoints and what lies around; infinities.

    Also NaNs.
    """
    high = np.concatenate([np.arange(0, 2**19, 509), [0x3FBFF, 0x7FBFF, 0, 1, 0x3FF, 0x400]])
    low = np.array([0, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    bits = (high[:, None] << 13 | low).astype(np.uint32).ravel()
    return np.concatenate([bits.view(np.float32), SPECIALS, random_floats(500)])


def _map(instruction, x_type, y_type, n):
    def apply(x: Pointer(x_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(x[i])

    return apply


def _map_and_add(instruction, summand, n):
    """An absolute error of the instruction is one in units of the sum's last place."""

    def apply(x: Pointer(f32), y: Pointer(f32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(x[i]) + summand

    return apply


def _map_pairs(instruction, y_type, n, x_type=f32):
    def apply(a: Pointer(x_type), b: Pointer(x_type), y: Pointer(y_type)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i])

    return apply


def _map_case(instruction, x, x_type, y_type, tolerance_ulp=0) -> InstructionCase:
    return InstructionCase(
        instruction.__name__,
        "",
        _map(instruction, x_type, y_type, x.size),
        (x,),
        ((x.shape, y_type),),
        tolerance_ulp=tolerance_ulp,
    )


def _pairs_case(instruction, pairs, y_type, tolerance_ulp=0) -> InstructionCase:
    x_type = pairs[0].dtype.type
    return InstructionCase(
        instruction.__name__,
        "",
        _map_pairs(instruction, y_type, pairs[0].size, x_type),
        pairs,
        ((pairs[0].shape, y_type),),
        tolerance_ulp=tolerance_ulp,
    )


def _sum_case(instruction, x, summand, tolerance_ulp) -> InstructionCase:
    return InstructionCase(
        instruction.__name__,
        "",
        _map_and_add(instruction, f32(summand), x.size),
        (x,),
        ((x.shape, f32),),
        tolerance_ulp=tolerance_ulp,
    )


def _map_triples(instruction, n):
    def map_triples(a: Pointer(f32), b: Pointer(f32), c: Pointer(f32), y: Pointer(f32)):
        for i in range(cuda.threadIdx.x, n, THREADS):
            y[i] = instruction(a[i], b[i], c[i])

    return map_triples


def _triples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Specials and random numbers of all sizes, and products that all but cancel.

    Also sums that lie halfway between two float32 but for a bit that float64 cannot hold, and
    sums that are exactly halfway, normal and subnormal.
    """
    rng = np.random.default_rng(4)
    a, b = _pairs()
    specials = a, b, np.roll(a, 7)
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)
    near = x, y, -(x * y)
    shifts = 2.0 ** rng.integers(-20, 20, 1000)
    mixed = x, y, (rng.standard_normal(1000) * shifts).astype(np.float32)
    one = np.ones(8, np.float32)
    tiny = np.array([2.0**-60, -(2.0**-60)] * 4, np.float32)
    # 1 + 2 ** -24 is halfway between 1 and its neighbour.
    halfway = np.array([1 + 2.0**-23, 1 - 2.0**-24, 1, 3] * 2, np.float32)
    sticky = (
        np.concatenate([tiny, tiny, one * f32(2.0**-12), one * f32(TINY)]),
        np.concatenate([one, -one, one * f32(2.0**-12), one * f32(2.0**-24)]),
        np.concatenate([halfway, -halfway, halfway, halfway * f32(TINY)]),
    )
    # 2 ** -24 (1 - 2 ** -46): just beside half a place of the addend, where float64 says halfway.
    signs = rng.choice([-1, 1], 200).astype(np.float32)
    beside = (
        signs * f32((1 + 2.0**-23) * 2.0**-12),
        np.full(200, (1 - 2.0**-23) * 2.0**-12, np.float32),
        (rng.integers(2**23, 2**24, 200) * rng.choice([-1, 1], 200)).astype(np.float32)
        * f32(2.0**-23),
    )
    subnormal = beside[0], beside[1] * f32(2.0**-103), beside[2] * f32(2.0**-126)
    sets = specials, near, mixed, sticky, beside, subnormal
    return tuple(np.concatenate(parts) for parts in zip(*sets, strict=True))


def _triples_case(instruction) -> InstructionCase:
    triples = _triples()
    n = triples[0].size
    kernel = _map_triples(instruction, n)
    return InstructionCase(instruction.__name__, "", kernel, triples, (((n,), f32),))


def _arithmetic_cases() -> list[InstructionCase]:
    bits = np.concatenate([SPECIALS, random_floats(1000)])
    return [
        _map_case(ex2_approx_ftz_f32, _exponents(), f32, f32, tolerance_ulp=2),
        _pairs_case(max_f32, _pairs(), f32),
        _pairs_case(min_f32, _pairs(), f32),
        _pairs_case(mul_rn_f32, _pairs(), f32),
        _triples_case(fma_rn_f32),
        _pairs_case(div_full_ftz_f32, _pairs(), f32, tolerance_ulp=2),
        _pairs_case(div_u32, _counts(), u32),
        _sum_case(lg2_approx_ftz_f32, _positive(), 8, tolerance_ulp=2),
        _map_case(sqrt_approx_ftz_f32, _positive(), f32, f32, tolerance_ulp=2),
        _map_case(rsqrt_approx_ftz_f32, _positive(), f32, f32, tolerance_ulp=2),
        # Both are off by up to 2 ** -11.
        _map_case(tanh_approx_f32, _to_bend(), f32, f32, tolerance_ulp=2**14),
        _sum_case(sin_approx_ftz_f32, _angles(), 2, tolerance_ulp=8),
        _sum_case(cos_approx_ftz_f32, _angles(), 2, tolerance_ulp=8),
        _map_case(cvt_rmi_f32_f32, bits, f32, f32),
        _map_case(cvt_rzi_s32_f32, bits, f32, i32),
        _map_case(cvt_f32_f16, HALF_CODES, u16, f32),
        _map_case(cvt_rn_f16_f32, _to_round(), f32, u16),
        _pairs_case(cvt_rn_f16x2_f32, _to_round_in_pairs(), u32),
        _pairs_case(cvt_rn_bf16x2_f32, _between_bfloat16(), u32),
        _map_case(cvt_rna_tf32_f32, _between_tf32(), f32, u32),
        _map_case(float_as_bits, bits, f32, u32),
        _map_case(bits_as_float, bits.view(np.uint32), u32, f32),
    ]


ARITHMETIC_CASES = _arithmetic_cases()
