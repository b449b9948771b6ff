"""How Numba kernels are launched on the engine: options, arguments, failures, warp functions."""

import ml_dtypes
import numpy as np
import pytest
from numba import cuda, float32, int32

from numflash.simulator import DeadlockError
from tests.support.plain_numba import saxpy

LANES = np.arange(32)


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
