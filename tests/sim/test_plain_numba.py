"""Plain Numba kernels, not written for numflash, run on the block engine as they did before.

Importing `numflash.ptx` puts the engine under Numba's simulator for the whole process. Here are
kernels as Numba's users write them: they must keep working, and what Numba's simulator refused or
lacked now works.
"""

import os
import subprocess
import sys
import textwrap
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from numba import cuda, float32, int32
from numba.cuda.simulator import kernel as numba_kernel

import numflash.ptx  # noqa: F401, which puts the engine under Numba's simulator
from numflash.simulator import DeadlockError
from numflash.simulator.cuda import SimulatedCuda

LANES = np.arange(32)


def test_the_engine_is_installed():
    assert numba_kernel.FakeCUDAModule is SimulatedCuda


# Kernels as users write them


@cuda.jit
def saxpy(a, x, y, out):
    """A grid-stride loop."""
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        out[i] = a * x[i] + y[i]


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


# Options and launches

OPTIONS = {
    "launch_bounds": {"launch_bounds": 64},
    "launch_bounds-pair": {"launch_bounds": (64, 2)},
    "max_registers": {"max_registers": 32},
    "lineinfo": {"lineinfo": True},
    "fastmath": {"fastmath": True},
    "opt": {"opt": False, "debug": True},
    "cache": {"cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_compiler_are_accepted(options):
    @cuda.jit(**options)
    def double(x):
        x[cuda.grid(1)] *= 2

    x = np.ones(64)
    double[1, 64](x)
    assert (x == 2).all()


def test_signatures_are_accepted():
    @cuda.jit("void(float32[:])", launch_bounds=32)
    def by_string(x):
        x[cuda.grid(1)] += 1

    @cuda.jit((float32[:],), max_registers=32)
    def by_type(x):
        x[cuda.grid(1)] += 1

    x = np.zeros(32, np.float32)
    by_string[1, 32](x)
    by_type[1, 32](x)
    assert (x == 2).all()


def test_alignment_of_arrays_is_accepted():
    @cuda.jit
    def kernel(out):
        shared = cuda.shared.array(32, float32, alignment=16)
        mine = cuda.local.array(4, float32, alignment=16)
        t = cuda.threadIdx.x
        mine[0] = t
        shared[31 - t] = mine[0]
        cuda.syncthreads()
        out[t] = shared[t]

    out = np.zeros(32, np.float32)
    kernel[1, 32](out)
    assert (out == LANES[::-1]).all()


def test_dynamic_shared_memory():
    @cuda.jit
    def reverse(x):
        shared = cuda.shared.array(0, dtype=int32)
        t = cuda.threadIdx.x
        shared[t] = x[t]
        cuda.syncthreads()
        x[t] = shared[shared.size - 1 - t]

    x = np.arange(40, dtype=np.int32)
    reverse[1, 40, 0, 160](x)
    assert (x == np.arange(40)[::-1]).all()


def test_launch_on_a_stream_and_forall():
    stream = cuda.stream()
    x, y = np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    device_x = cuda.to_device(x, stream=stream)
    device_y = cuda.to_device(y, stream=stream)
    saxpy[1, 32, stream](3, device_x, device_x, device_y)
    device_y.copy_to_host(y, stream=stream)
    stream.synchronize()
    assert (y == 4 * x).all()
    saxpy.forall(10)(1, x, x, y)
    assert (y == 2 * x).all()


def test_cooperative_grid_sync(each_seed):
    @cuda.jit
    def rotate(x, out):
        t = cuda.threadIdx.x
        x[t] = t
        cuda.cg.this_grid().sync()
        out[t] = x[(t + 1) % 48]

    x, out = np.full(48, -1), np.zeros(48, np.int64)
    rotate[1, 48](x, out)
    assert (out == np.roll(np.arange(48), -1)).all()


def test_the_rest_of_the_cuda_module():
    @cuda.jit
    def kernel(out):
        vector = cuda.float32x2(1.0, 2.0)
        cuda.threadfence()
        out[0] = cuda.popc(0xFF) + cuda.ffs(8) + cuda.selp(True, 10, 20)
        out[1] = vector.x + vector.y
        out[2] = cuda.fma(2.0, 3.0, 4.0)
        out[3] = cuda.fp16.hadd(np.float16(1), np.float16(2))
        out[4] = cuda.warpsize

    out = np.zeros(5)
    kernel[1, 1](out)
    assert out.tolist() == [8 + 4 + 10, 3, 10, 3, 32]


# Arguments

NARROW = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_narrow_floats_as_arguments(dtype, on_device):
    @cuda.jit
    def double(x, y):
        tile = cuda.shared.array(8, np.dtype(dtype))
        i = cuda.grid(1)
        tile[i] = x[i]
        cuda.syncthreads()
        y[i] = tile[7 - i] + tile[7 - i]

    x = np.arange(8).astype(dtype)
    y = np.zeros(8, dtype)
    if on_device:
        device_x, device_y = cuda.to_device(x), cuda.device_array(8, dtype)
        double[1, 8](device_x, device_y)
        y = device_y.copy_to_host()
    else:
        double[1, 8](x, y)
    assert y.dtype == dtype and (y.astype(float) == 2 * np.arange(8)[::-1]).all()


def test_device_arrays_round_trip():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    device = cuda.to_device(x)
    x[0, 0] = 100
    assert device.copy_to_host()[0, 0] == 0, "the device holds a copy"
    saxpy[1, 32](2, device.ravel(), device.ravel(), device.ravel())
    assert (device.copy_to_host().ravel() == 3 * np.arange(12)).all()
    like = cuda.device_array_like(device)
    like.copy_to_device(device)
    assert (like.copy_to_host() == device.copy_to_host()).all()


def test_layouts_and_scalars_of_arguments():
    @cuda.jit
    def kernel(a, b, c, scale):
        i, j = cuda.grid(2)
        c[i, j] = scale * a[i, j] + b[i, j]

    a = np.arange(12, dtype=np.float32).reshape(4, 3)
    b, c = np.broadcast_to(np.float32(1), (3, 4)), np.zeros((3, 4), np.float32, order="F")
    kernel[1, (3, 4)](a.T, cuda.In(b), c, np.int32(2))
    assert (c == 2 * a.T + 1).all()


def test_records_as_arguments():
    record = np.dtype([("x", np.float64), ("n", np.int32)])

    @cuda.jit
    def kernel(a):
        i = cuda.grid(1)
        a[i].x += a[i]["n"]

    a = np.array([(0.5, 1), (1.5, 2)], record)
    kernel[1, 2](a)
    assert a["x"].tolist() == [1.5, 3.5]


# Failures


def test_exceptions_keep_their_type():
    class KernelError(Exception):
        pass

    @cuda.jit
    def kernel(x):
        cuda.syncthreads()
        if cuda.threadIdx.x == 3:
            raise KernelError("three")

    with pytest.raises(KernelError, match="three") as caught:
        kernel[2, 8](np.zeros(1))
    assert caught.value.args == ("three",)
    assert "in thread (3, 0, 0) of block (0, 0, 0)" in caught.value.__notes__[0]
    # Another launch is possible.
    x = np.zeros(32, np.float32)
    saxpy[1, 32](1, x, x, x)


def test_an_index_outside_an_array_is_an_index_error():
    with pytest.raises(IndexError):
        saxpy[1, 32](1, np.zeros(3), np.zeros(2), np.zeros(3))


def test_debug_kernels_raise_on_division_by_zero():
    def divide(x, y):
        x[0] = x[0] / y[0]

    x, y = np.ones(1, np.float32), np.zeros(1, np.float32)
    with pytest.raises(FloatingPointError):
        cuda.jit(divide, debug=True, opt=False)[1, 1](x, y)
    with np.errstate(all="ignore"):
        cuda.jit(divide)[1, 1](x, y)
    assert np.isinf(x[0])


def test_a_barrier_that_never_fills_is_an_error_not_a_hang():
    @cuda.jit
    def kernel():
        if cuda.threadIdx.x < 16:
            cuda.syncwarp()
        else:
            cuda.syncthreads()

    with pytest.raises(DeadlockError, match="syncthreads: 16 of 32 threads came"):
        kernel[1, 32]()


# What Numba's simulator lacked


def test_warp_shuffles_and_votes(each_seed):
    @cuda.jit
    def kernel(x, sums, ballots):
        i = cuda.grid(1)
        total = x[i]
        offset = 16
        while offset > 0:
            total += cuda.shfl_down_sync(0xFFFFFFFF, total, offset)
            offset //= 2
        ballots[i] = cuda.ballot_sync(0xFFFFFFFF, x[i] > 40)
        if cuda.laneid == 0:
            sums[i // 32] = total

    x = np.arange(96, dtype=np.float32)
    sums, ballots = np.zeros(3, np.float32), np.zeros(96, np.int64)
    kernel[1, 96](x, sums, ballots)
    assert (sums == x.reshape(3, 32).sum(1)).all()
    expected = [sum(1 << lane for lane in range(32) if 32 * w + lane > 40) for w in range(3)]
    assert (ballots.reshape(3, 32) == np.array(expected)[:, None]).all()


def test_shuffles_after_lanes_have_returned(each_seed):
    @cuda.jit
    def kernel(x):
        i = cuda.grid(1)
        if i >= x.size:
            return
        x[i] += cuda.shfl_xor_sync(0xFFFFFFFF, x[i], 1)

    x = np.arange(20, dtype=np.float32)
    kernel[1, 32](x)
    assert (x == np.arange(20) // 2 * 4 + 1).all()


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
