"""Cases of `wgmma`: products of one warpgroup with operands that no copy has swizzled.

Sums are exact in any order, also with the few bits that e4m3 products are added with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from numflash.ptx import (
    cuda,
    f32,
    fence_proxy_async,
    make_wgmma,
    make_wgmma_wait_group,
    mov_shared_address,
    u32,
    u64,
    wgmma_commit_group,
    wgmma_fence,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import InstructionCase

THREADS = 128
ELEMENTS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_ROW_BYTES = 128


@dataclass(frozen=True)
class Product:
    """acc += a b of `steps` instructions; a is 64 x k, b is k x n."""

    n: int
    dtype: str
    a: str
    b_major: str
    steps: int
    a_major: str = "k"

    def __str__(self) -> str:
        return f"{self.dtype}-n{self.n}-{self.a}-{self.a_major}-{self.b_major}-{self.steps}"

    @property
    def instruction(self) -> Callable:
        return make_wgmma(self.n, self.dtype, self.a, self.b_major, a_major=self.a_major)

    @property
    def first_instruction(self) -> Callable:
        """That which ignores what acc holds."""
        return make_wgmma(self.n, self.dtype, self.a, self.b_major, accumulates=False)

    @property
    def k(self) -> int:
        return self.steps * 32 // ELEMENTS[self.dtype].itemsize

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a, b and what acc holds before."""
        rng = np.random.default_rng(9)
        a = rng.integers(-3, 4, (64, self.k)).astype(np.float64)
        b = rng.integers(-3, 4, (self.k, self.n)).astype(np.float64)
        return a, b, rng.integers(-9, 10, (64, self.n)).astype(np.float64)


def slabs(rows: np.ndarray) -> np.ndarray:
    """A matrix as tiles lie in shared memory: slabs of rows of 128 swizzled bytes."""
    matrix = np.ascontiguousarray(rows)
    n_rows, width = len(matrix), -(-matrix.shape[1] * matrix.itemsize // _ROW_BYTES)
    padded = np.zeros((n_rows, width * _ROW_BYTES), np.uint8)
    padded[:, : matrix.shape[1] * matrix.itemsize] = matrix.view(np.uint8)
    rows_up = -(-n_rows // 8) * 8
    result = np.zeros((width, rows_up, _ROW_BYTES), np.uint8)
    for r in range(n_rows):
        for slab in range(width):
            for chunk in range(8):
                place = 16 * (chunk ^ r % 8)
                begin = slab * _ROW_BYTES + 16 * chunk
                result[slab, r, place : place + 16] = padded[r, begin : begin + 16]
    return result.reshape(-1)


def _multiply(product: Product):
    multiply, n, steps = product.instruction, product.n, product.steps
    wait = make_wgmma_wait_group(0, n // 2)
    n_acc, in_registers, b_by_k = n // 2, product.a == "registers", product.b_major == "k"
    a_by_k = product.a_major == "k"
    a_rows, a_slabs = (64, -(-steps // 4)) if a_by_k else (product.k, 1)
    a_bytes = 0 if in_registers else a_rows * _ROW_BYTES * a_slabs
    b_rows = -(-n // 8) * 8 if b_by_k else product.k
    b_slabs = -(-steps // 4) if b_by_k else -(-n // 64)
    b_words = b_rows * b_slabs * _ROW_BYTES // 4
    a_words, n_a = a_bytes // 4, 4 * steps
    b_slab_bytes = b_rows * _ROW_BYTES
    # Leading offset, stride offset of 1024 bytes, swizzle of 128 bytes.
    constant = u64((1 if b_by_k else b_slab_bytes >> 4) << 16 | 64 << 32 | 1 << 62)
    a_constant = u64(1 << 16 | 64 << 32 | 1 << 62)

    def kernel(a: Pointer(u32), b: Pointer(u32), c: Pointer(f32), y: Pointer(f32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        acc = cuda.local.array(n_acc, f32)
        frag = cuda.local.array(n_a, u32)
        t = cuda.threadIdx.x
        for i in range(t, a_words, THREADS):
            smem[i] = a[i]
        for i in range(t, b_words, THREADS):
            smem[a_words + i] = b[i]
        if in_registers:
            for i in range(n_a):
                frag[i] = a[n_a * t + i]
        for i in range(n_acc):
            acc[i] = c[n_acc * t + i]
        fence_proxy_async()
        cuda.syncthreads()
        a_start = mov_shared_address(smem, 0)
        b_start = mov_shared_address(smem, a_words)
        wgmma_fence()
        for s in range(steps):
            if b_by_k:
                b_step = b_start + u32(s // 4 * b_slab_bytes + s % 4 * 32)
            else:
                b_step = b_start + u32(s * 16 * _ROW_BYTES)
            b_operand = u64((b_step & u32(0x3FFFF)) >> u32(4)) | constant
            if in_registers:
                multiply(acc, frag[4 * s : 4 * s + 4], b_operand)
            else:
                if a_by_k:
                    a_step = a_start + u32(s // 4 * 64 * _ROW_BYTES + s % 4 * 32)
                else:
                    a_step = a_start + u32(s * 16 * _ROW_BYTES)
                a_operand = u64((a_step & u32(0x3FFFF)) >> u32(4)) | a_constant
                multiply(acc, a_operand, b_operand)
        wgmma_commit_group()
        wait(acc)
        for i in range(n_acc):
            y[n_acc * t + i] = acc[i]

    return kernel


def _overwrite(product: Product):
    """The first product ignores what the accumulator holds."""
    multiply, multiply_more, n_acc = product.first_instruction, product.instruction, product.n // 2
    wait = make_wgmma_wait_group(0, n_acc)
    constant = u64(1 << 16 | 64 << 32 | 1 << 62)
    words = 64 * _ROW_BYTES // 4

    def kernel(a: Pointer(u32), y: Pointer(f32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        acc = cuda.local.array(n_acc, f32)
        t = cuda.threadIdx.x
        for i in range(t, words, THREADS):
            smem[i] = a[i]
        for i in range(n_acc):
            acc[i] = f32(1e30)
        fence_proxy_async()
        cuda.syncthreads()
        start = mov_shared_address(smem, 0)
        operand = u64((start & u32(0x3FFFF)) >> u32(4)) | constant
        wgmma_fence()
        multiply(acc, operand, operand)
        for s in range(1, 4):
            multiply_more(acc, operand + u64(2 * s), operand + u64(2 * s))
        wgmma_commit_group()
        wait(acc)
        for i in range(n_acc):
            y[n_acc * t + i] = acc[i]

    return kernel


def d_register(row, column) -> tuple:
    """Thread and register of elements of d. PTX ISA 9.7.15.5.1.1, figure of D."""
    warp, in_warp = divmod(row, 16)
    upper, group = divmod(in_warp, 8)
    eighth, within = divmod(column, 8)
    return 32 * warp + 4 * group + within // 2, 4 * eighth + 2 * upper + within % 2


def registers_of_d(matrix: np.ndarray) -> np.ndarray:
    """The accumulator registers of 128 threads that hold a matrix."""
    result = np.empty((THREADS, matrix.shape[1] // 2), np.float32)
    result[d_register(*np.indices(matrix.shape))] = matrix
    return result.ravel()


def _registers_of_a(product: Product, matrix: np.ndarray) -> np.ndarray:
    """Four registers a step: 16 bytes of a row, then of the row 8 below; then the next 16."""
    item = product.k // product.steps // 8  # elements of a register
    codes = matrix.astype(ELEMENTS[product.dtype])
    result = np.empty((THREADS, product.steps, 4, item), codes.dtype)
    row, column = np.indices(codes.shape)
    warp, in_warp = divmod(row, 16)
    step, within = divmod(column, 8 * item)
    half, within = divmod(within, 4 * item)
    thread = 32 * warp + 4 * (in_warp % 8) + within // item
    result[thread, step, in_warp // 8 + 2 * half, within % item] = codes
    return result.view(np.uint32).ravel()


def _case(product: Product, name=None, variant=None) -> InstructionCase:
    a, b, c = product.matrices()
    element = ELEMENTS[product.dtype]
    if product.a == "registers":
        a_words = _registers_of_a(product, a)
        smem_bytes = 0
    else:
        a_words = slabs((a if product.a_major == "k" else a.T).astype(element)).view(np.uint32)
        smem_bytes = a_words.nbytes
    b_words = slabs((b.T if product.b_major == "k" else b).astype(element)).view(np.uint32)
    return InstructionCase(
        name or product.instruction.__name__,
        f"{product.steps} steps" if variant is None else variant,
        _multiply(product),
        (a_words, b_words, registers_of_d(c)),
        (((64 * product.n,), np.float32),),
        block=THREADS,
        smem_bytes=smem_bytes + b_words.nbytes,
    )


PRODUCTS = [
    *(
        Product(n, dtype, a, "k", 3)
        for n in (8, 24, 128)
        for dtype in ELEMENTS
        for a in ("shared", "registers")
    ),
    *(
        Product(n, dtype, a, "mn", 2)
        for n in (8, 24, 128)
        for dtype in ("float16", "bfloat16")
        for a in ("shared", "registers")
    ),
    *(
        Product(64, dtype, "shared", b_major, 3, "mn")
        for dtype in ("float16", "bfloat16")
        for b_major in ("k", "mn")
    ),
    # Several slabs, and the widest.
    Product(176, "float16", "shared", "k", 6),
    Product(256, "bfloat16", "shared", "k", 5),
    Product(256, "float16", "registers", "mn", 4),
    Product(176, "bfloat16", "registers", "mn", 2),
    Product(256, "e4m3", "shared", "k", 5),
    Product(224, "e4m3", "registers", "k", 2),
]
SQUARE = Product(64, "float16", "shared", "k", 4)


def _square_case() -> InstructionCase:
    a, _, _ = SQUARE.matrices()
    words = slabs(a.astype(np.float16)).view(np.uint32)
    return InstructionCase(
        SQUARE.first_instruction.__name__,
        "overwrites",
        _overwrite(SQUARE),
        (words,),
        (((64 * 64,), np.float32),),
        block=THREADS,
        smem_bytes=words.nbytes,
    )


WGMMA_CASES = [
    *(_case(product) for product in PRODUCTS),
    _square_case(),
    *(
        _case(PRODUCTS[0], name, "")
        for name in ("wgmma_fence", "wgmma_commit_group", "wgmma_wait_group_0_of_4")
    ),
]
