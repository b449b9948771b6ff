"""Numba kernels as users write them run on the engine, with their device functions."""

import os
import subprocess
import sys
import textwrap
from types import ModuleType

import numpy as np
import pytest
from numba import cuda, float32, int32
from numba.cuda.simulator import kernel as numba_kernel

from numflash.simulator import DeadlockError
from numflash.simulator.cuda import SimulatedCuda
from tests.support.plain_numba import saxpy


def test_the_engine_is_installed():
    assert numba_kernel.FakeCUDAModule is SimulatedCuda


@pytest.mark.parametrize(("grid", "block"), [(1, 32), (3, 64), (2, 50), (100, 16)])
def test_grid_stride_loop(grid, block):
    x, y = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    out = np.zeros_like(x)
    saxpy[grid, block](2, x, y, out)
    assert (out == 2 * x + 1).all()


def test_two_dimensional_grid():
    @cuda.jit
    def add(a, b, c):
        i, j = cuda.grid(2)
        if i < c.shape[0] and j < c.shape[1]:
            c[i, j] = a[i, j] + b[i, j]

    a = np.arange(7 * 11, dtype=np.float64).reshape(7, 11)
    c = np.zeros_like(a)
    add[(2, 3), (4, 4)](a, a, c)
    assert (c == 2 * a).all()


def test_three_dimensional_block():
    @cuda.jit
    def number(out):
        x, y, z = cuda.grid(3)
        out[x, y, z] = cuda.threadIdx.x + 10 * cuda.threadIdx.y + 100 * cuda.threadIdx.z

    out = np.full((4, 3, 5), -1)
    number[(2, 1, 1), (2, 3, 5)](out)
    x, y, z = np.ix_(range(4), range(3), range(5))
    assert (out == x % 2 + 10 * y + 100 * z).all()


@cuda.jit
def block_sum(x, sums):
    """The classic reduction in shared memory."""
    shared = cuda.shared.array(shape=64, dtype=float32)
    t = cuda.threadIdx.x
    i = cuda.grid(1)
    shared[t] = x[i] if i < x.size else 0
    cuda.syncthreads()
    stride = cuda.blockDim.x // 2
    while stride > 0:
        if t < stride:
            shared[t] += shared[t + stride]
        cuda.syncthreads()
        stride //= 2
    if t == 0:
        sums[cuda.blockIdx.x] = shared[0]


def test_reduction_in_shared_memory(each_seed):
    x = np.arange(300, dtype=np.float32)
    sums = np.zeros(5, np.float32)
    block_sum[5, 64](x, sums)
    assert sums.tolist() == [x[64 * i : 64 * i + 64].sum() for i in range(5)]


@cuda.jit
def matmul(a, b, c):
    """The tiled matrix product of Numba's documentation."""
    a_tile = cuda.shared.array(shape=(8, 8), dtype=float32)
    b_tile = cuda.shared.array(shape=(8, 8), dtype=float32)
    x, y = cuda.grid(2)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    total = float32(0.0)
    for i in range((a.shape[1] + 7) // 8):
        a_tile[ty, tx] = 0
        b_tile[ty, tx] = 0
        if y < a.shape[0] and tx + i * 8 < a.shape[1]:
            a_tile[ty, tx] = a[y, tx + i * 8]
        if x < b.shape[1] and ty + i * 8 < b.shape[0]:
            b_tile[ty, tx] = b[ty + i * 8, x]
        cuda.syncthreads()
        for j in range(8):
            total += a_tile[ty, j] * b_tile[j, tx]
        cuda.syncthreads()
    if y < c.shape[0] and x < c.shape[1]:
        c[y, x] = total


def test_tiled_matrix_product(each_seed):
    rng = np.random.default_rng(0)
    a = rng.integers(-5, 5, (13, 21)).astype(np.float32)
    b = rng.integers(-5, 5, (21, 10)).astype(np.float32)
    c = np.zeros((13, 10), np.float32)
    matmul[(2, 2), (8, 8)](a, b, c)
    assert (c == a @ b).all()


def test_atomics():
    @cuda.jit
    def histogram(x, bins, largest, first):
        i = cuda.grid(1)
        if i < x.size:
            cuda.atomic.add(bins, x[i], 1)
            cuda.atomic.max(largest, 0, x[i])
            cuda.atomic.cas(first, 0, -1, i)

    x = np.random.default_rng(0).integers(0, 10, 200)
    bins, largest, first = np.zeros(10, np.int64), np.zeros(1, np.int64), np.full(1, -1)
    histogram[4, 64](x, bins, largest, first)
    assert (bins == np.bincount(x, minlength=10)).all() and largest[0] == x.max()
    assert 0 <= first[0] < 200


def test_local_and_constant_arrays():
    table = np.arange(5, dtype=np.float64)

    @cuda.jit
    def polynomial(x, out):
        i = cuda.grid(1)
        coefficients = cuda.const.array_like(table)
        powers = cuda.local.array(5, dtype=np.float64)
        powers[0] = 1
        for j in range(1, 5):
            powers[j] = powers[j - 1] * x[i]
        for j in range(5):
            out[i] += coefficients[j] * powers[j]

    x = np.arange(32) / 8
    out = np.zeros(32)
    polynomial[1, 32](x, out)
    assert np.allclose(out, np.polyval(table[::-1], x))


# Device functions


@cuda.jit(device=True)
def block_total(shared, value):
    """A device function with barriers."""
    shared[cuda.threadIdx.x] = value
    cuda.syncthreads()
    total = 0
    for i in range(cuda.blockDim.x):
        total += shared[i]
    cuda.syncthreads()
    return total


@cuda.jit
def total_twice(out):
    """Calls a device function of this module."""
    shared = cuda.shared.array(48, int32)
    t = cuda.threadIdx.x
    out[t] = block_total(shared, t) + 1000 * block_total(shared, 1)


def test_device_function_with_barriers(each_seed):
    out = np.zeros(48, np.int64)
    total_twice[1, 48](out)
    assert (out == sum(range(48)) + 48000).all()


OTHER_MODULE = """
from numba import cuda

@cuda.jit(device=True)
def neighbour(shared):
    shared[cuda.threadIdx.x] = cuda.grid(1)
    cuda.syncthreads()
    value = shared[(cuda.threadIdx.x + 1) % cuda.blockDim.x]
    cuda.syncthreads()
    return value

@cuda.jit(device=True)
def waits_alone():
    if cuda.threadIdx.x == 0:
        cuda.syncthreads()
    cuda.syncwarp(0xFFFFFFFF)
"""


@pytest.fixture
def other_module():
    """Device functions of another module, with globals of its own."""
    module = ModuleType("other_module")
    exec(OTHER_MODULE, module.__dict__)
    return module


def test_device_function_of_another_module(each_seed, other_module):
    neighbour = other_module.neighbour

    @cuda.jit
    def kernel(out):
        shared = cuda.shared.array(40, int32)
        out[cuda.grid(1)] = neighbour(shared)

    out = np.zeros(80, np.int64)
    kernel[2, 40](out)
    first = np.roll(np.arange(40), -1)
    assert (out == np.concatenate([first, first + 40])).all()
    assert other_module.cuda is cuda


def test_after_a_deadlock_in_a_device_function_its_module_is_as_before(other_module):
    waits_alone = other_module.waits_alone

    @cuda.jit
    def kernel():
        waits_alone()

    with pytest.raises(DeadlockError, match=r"31 of 32 threads came"):
        kernel[1, 32]()
    # Numba's simulator replaces the `cuda` of a module while a function of it runs.
    assert other_module.cuda is cuda and hasattr(other_module.cuda, "to_device")


# Without numflash

UNTOUCHED = """
import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel as numba_kernel

@cuda.jit
def double(x):
    shared = cuda.shared.array(8, np.float64)
    shared[cuda.threadIdx.x] = x[cuda.threadIdx.x]
    cuda.syncthreads()
    x[cuda.threadIdx.x] = 2 * shared[cuda.threadIdx.x]

def run():
    x = np.ones(8)
    double[1, 8](x)
    assert (x == 2).all()
    try:
        cuda.jit(launch_bounds=8)
    except TypeError:
        strict = True
    else:
        strict = False
    return numba_kernel.BlockManager.__module__, strict

assert run() == ("numba.cuda.simulator.kernel", True)
import numflash.runtime.mode
assert run() == ("numba.cuda.simulator.kernel", True)
import numflash.ptx
assert run() == ("numflash.simulator.launch", False)
print("done")
"""


def test_numba_is_untouched_until_kernels_are_imported():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(UNTOUCHED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
