"""Small kernels of wgmma: acc = x x^T with x of 64 x 64 float16 in 8 KB."""

import numpy as np

from numflash.ptx import cuda, f32, make_wgmma, make_wgmma_wait_group, mov_shared_address, u32, u64
from numflash.simulator import launch
from tests.support.wgmma_cases import registers_of_d, slabs

# Small kernels: acc = x x^T with x of 64 x 64 float16 in 8 KB

N, ACC, TILE = 64, 32, 64 * 32


# By whether they accumulate.
multiply, multiply_registers = (
    [make_wgmma(N, "float16", a, accumulates=more) for more in (False, True)]
    for a in ("shared", "registers")
)
wait, wait_for_all_but_one = (make_wgmma_wait_group(pending, ACC) for pending in range(2))


def operand(smem, word, step=0):
    """The descriptor of 16 columns of a K-major tile."""
    address = int(mov_shared_address(smem, word)) + 32 * step
    return u64(address >> 4 | 1 << 16 | 64 << 32 | 1 << 62)


def matrix(seed=0):
    return np.random.default_rng(seed).integers(-3, 4, (64, 64)).astype(np.float16)


def words_of(*matrices):
    return np.concatenate([slabs(m) for m in matrices]).view(np.uint32)


def tiles(words):
    """Shared memory with what the kernel multiplies, and an accumulator."""
    smem = cuda.shared.array(0, u32)
    t = cuda.threadIdx.x
    for i in range(t, words.size, cuda.blockDim.x):
        smem[i] = words[i]
    cuda.syncthreads()
    return smem, cuda.local.array(ACC, f32)


def issue(acc, smem, first=0, word=0):
    """Four products; the first of all ignores what acc holds."""
    for step in range(4):
        a = operand(smem, word, step)
        multiply[first + step > 0](acc, a, a)


def run(kernel, words=None, block=128, extra=()):
    words = words_of(matrix()) if words is None else words
    out = np.zeros((block, ACC), np.float32)
    launch(kernel, 1, block, (words, out, *extra), words.nbytes + 2048)
    return out.ravel()


def square(x=None):
    x = matrix() if x is None else x
    return registers_of_d(x.astype(np.float64) @ x.T.astype(np.float64))
