"""Cases of the instructions of the tensor cores: products of a warp, and `ldmatrix`.

Two warps, each with registers of its own. Hardware cuts the terms of a sum
(`numflash.runtime.sums`), so most inputs have sums that are exact in any order and with few
bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from numflash.ptx import (
    cuda,
    f32,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k8_f16,
    mma_m16n8k8_tf32,
    mma_m16n8k16_bf16,
    mma_m16n8k16_f16,
    mma_m16n8k32_e4m3,
    u32,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase

# At most 17 positive terms are added, and of each less than a unit of the largest is lost.
_SUM_TOLERANCE_ULP = 17
# Products of 8-bit floats are added with 13 bits after the point on Ada and Hopper: 33 terms and
# the result lose less than a unit each, of 2 ** 10 ulp. `numflash.runtime.sums` says who
# verified it.
E4M3_SUM_BITS = 13
_E4M3_SUM_TOLERANCE_ULP = 34 * 2 ** (23 - E4M3_SUM_BITS)


@dataclass(frozen=True)
class Product:
    """One shape and input type of `mma`."""

    instruction: Callable
    element: type
    a_registers: int
    b_registers: int
    # A power of two so small that k times it is exact for the small integers k: for float16 and
    # e4m3 it is the smallest subnormal number.
    unit: float
    sum_tolerance_ulp: int = _SUM_TOLERANCE_ULP

    def words(self, values: np.ndarray) -> np.ndarray:
        """The values as registers hold them."""
        return values.astype(self.element).ravel().view(np.uint32)


PRODUCTS = [
    Product(mma_m16n8k16_f16, np.float16, 4, 2, 2.0**-24),
    Product(mma_m16n8k16_bf16, ml_dtypes.bfloat16, 4, 2, 2.0**-100),
    Product(mma_m16n8k8_f16, np.float16, 2, 1, 2.0**-24),
    Product(mma_m16n8k8_tf32, np.float32, 4, 2, 2.0**-100),
    Product(mma_m16n8k32_e4m3, ml_dtypes.float8_e4m3fn, 4, 2, 2.0**-9, _E4M3_SUM_TOLERANCE_ULP),
]


# Kernels


def _multiply(product: Product):
    instruction, n_a, n_b = product.instruction, product.a_registers, product.b_registers

    def multiply(a: Pointer(u32), b: Pointer(u32), d: Pointer(f32), y: Pointer(f32)):
        a_frag = cuda.local.array(n_a, u32)
        b_frag = cuda.local.array(n_b, u32)
        d_frag = cuda.local.array(4, f32)
        t = cuda.threadIdx.x
        for i in range(n_a):
            a_frag[i] = a[n_a * t + i]
        for i in range(n_b):
            b_frag[i] = b[n_b * t + i]
        for i in range(4):
            d_frag[i] = d[4 * t + i]
        if n_b == 1:
            instruction(d_frag, a_frag, b_frag[0])
        else:
            instruction(d_frag, a_frag, b_frag)
        for i in range(4):
            y[4 * t + i] = d_frag[i]

    return multiply


def _load_matrices(instruction):
    """Each thread names the row that `rows` tells it."""

    def load(x: Pointer(u32), rows: Pointer(u32), y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=16)
        frag = cuda.local.array(4, u32)
        t = cuda.threadIdx.x
        for i in range(4):
            smem[4 * t + i] = x[4 * t + i]
        cuda.syncthreads()
        instruction(frag, smem, 4 * rows[t])
        for i in range(4):
            y[4 * t + i] = frag[i]

    return load


# Cases


def _product_case(product: Product, variant, a, b, d, tolerance_ulp=0) -> InstructionCase:
    return InstructionCase(
        product.instruction.__name__,
        variant,
        _multiply(product),
        (a, b, d.astype(np.float32).ravel()),
        (((4 * THREADS,), np.float32),),
        tolerance_ulp=tolerance_ulp,
    )


def _shapes(product: Product):
    """The shapes of the elements of a, b and d."""
    per_register = 4 // np.dtype(product.element).itemsize
    registers = (product.a_registers, product.b_registers)
    return [*((THREADS, per_register * n) for n in registers), (THREADS, 4)]


def _integers(rng, shape) -> np.ndarray:
    """-8 to 8 without 0."""
    return rng.integers(1, 9, shape) * rng.choice([-1.0, 1.0], shape)


def _exact(product: Product) -> InstructionCase:
    """Small integers; in the second warp a is so many units. d makes no sum 0."""
    rng = np.random.default_rng(3)
    a_shape, b_shape, d_shape = _shapes(product)
    a, b = _integers(rng, a_shape), _integers(rng, b_shape)
    d = rng.integers(-100, 100, d_shape) + 0.5
    a[32:] *= product.unit
    d[32:] *= product.unit
    return _product_case(product, "exact", product.words(a), product.words(b), d)


def _positive(product: Product) -> InstructionCase:
    rng = np.random.default_rng(4)
    a_shape, b_shape, d_shape = _shapes(product)
    a, b = (np.abs(rng.standard_normal(shape)) for shape in (a_shape, b_shape))
    d = np.abs(rng.standard_normal(d_shape))
    words = (product.words(a), product.words(b))
    return _product_case(product, "positive", *words, d, product.sum_tolerance_ulp)


def _not_finite(product: Product) -> InstructionCase:
    """Infinities among integers, which meet or do not; in the second warp also NaNs.

    e4m3 has no infinities: NaNs instead.
    """
    rng = np.random.default_rng(5)
    a, b, d = (_integers(rng, shape) for shape in _shapes(product))
    # Of the first warp: a row of a, a column of b, and an element of d elsewhere.
    a[5, 0], b[21, 0], d[9, 1] = np.inf, -np.inf, np.inf
    d[11] = np.inf, np.inf, -np.inf, -np.inf
    d[15] = np.inf, np.inf, -np.inf, -np.inf
    # An infinity of d meets one of a, of the same sign or not.
    d[32 + 5, :2] = np.inf, -np.inf
    a[32 + 5, 0], b[32 + 16, 1], d[32 + 30, 3] = np.inf, np.nan, np.nan
    words = (product.words(a), product.words(b))
    return _product_case(product, "not finite", *words, d, tolerance_ulp=1)


def _low_bits() -> InstructionCase:
    """As "exact", with random bits where tf32 has none."""
    (product,) = (p for p in PRODUCTS if p.instruction is mma_m16n8k8_tf32)
    exact = _exact(product)
    rng = np.random.default_rng(6)
    a, b = (x | rng.integers(0, 2**13, x.size, np.uint32) for x in exact.inputs[:2])
    return _product_case(product, "low bits", a, b, exact.inputs[2])


def _matrix_cases() -> list[InstructionCase]:
    elements = np.arange(8 * THREADS, dtype=np.uint16) * np.uint16(0x4D2F)
    rows = np.random.default_rng(7).permutation(THREADS).astype(np.uint32)
    words = elements.view(np.uint32)
    return [
        InstructionCase(
            instruction.__name__,
            "",
            _load_matrices(instruction),
            (words, rows),
            ((words.shape, np.uint32),),
            smem_bytes=words.nbytes,
        )
        for instruction in (ldmatrix_x4, ldmatrix_x4_trans)
    ]


TENSOR_CORE_CASES = [
    *(make(product) for product in PRODUCTS for make in (_exact, _positive, _not_finite)),
    _low_bits(),
    *_matrix_cases(),
]
