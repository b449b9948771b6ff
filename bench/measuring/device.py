"""The GPU as a benchmark needs it: the tuner's, with peak memory and what the device can reach.

PyTorch is used where it is importable, because most peers are its; CuPy otherwise. With both,
CuPy allocates from PyTorch's pool, so that one peak covers all methods. The timer, its fills and
its cold L2 are those of `tuner.measuring.gpu`; host overhead is measured on its own.
"""

import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from bench.points.interleave import Method
from numflash.runtime.views import numpy_dtype
from tuner.measuring import gpu

_MATMUL = 8192
_COPY_BYTES = 2**30
_CEILING_REPEATS = 20


class Device(gpu.Device, Protocol):
    """What a benchmark asks of a device beside what the tuner does.

    Attributes:
        xp: the array library.
    """

    xp: Any

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int):
        """Random normal numbers."""

    def download(self, array) -> np.ndarray:
        """The inverse of `upload`; waits for everything."""

    def round_to(self, dtype: str):
        """A function that rounds float32 arrays to a dtype and back."""

    def time_method(self, method: Method) -> float:
        """Milliseconds of one call with a cold L2."""

    def peak_bytes(self, method: Method) -> int:
        """Device memory that a call takes at most, its results included."""

    def copy(self, size: int) -> Callable[[], None]:
        """A function that copies so many bytes on the device."""

    def ceilings(self) -> dict:
        """Matrix product and copy rates, number of SMs."""


class _Bench:
    """What both libraries' devices add to the tuner's alike."""

    matmul_dtype: str

    def normal(self, shape, dtype, seed):
        """As `Device.normal`."""
        array = self.empty(shape, dtype)
        self.fill_normal(array, seed)
        return array

    def time_method(self, method):
        """As `Device.time_method`."""
        with method.context():
            return self.time(method.call)

    def ceilings(self):
        """As `Device.ceilings`."""
        shape = 1, _MATMUL, _MATMUL
        a, b = (self.normal(shape, self.matmul_dtype, seed)[0] for seed in (0, 1))
        library = self.xp.__name__
        medians = {}
        for name, call in (("matmul", lambda: a @ b), ("copy", self.copy(_COPY_BYTES))):
            times = [self.time(call) for _ in range(_CEILING_REPEATS + 3)][3:]
            medians[name] = statistics.median(times)
        return {
            "matmul_tflops": 2 * _MATMUL**3 / medians["matmul"] / 1e9,
            "matmul": f"{self.matmul_dtype}, {_MATMUL} x {_MATMUL} x {_MATMUL}, {library}",
            "copy_gbps": 2 * _COPY_BYTES / medians["copy"] / 1e6,
            "copy": f"{_COPY_BYTES} bytes, read and written, {library}",
            "num_sms": self.describe()["num_sms"],
        }


class TorchDevice(_Bench, gpu.TorchGpu):
    """A device used through PyTorch."""

    matmul_dtype = "bfloat16"

    def __init__(self, ordinal: int):
        import torch

        self.xp = torch
        torch.set_float32_matmul_precision("highest")  # the references are float32
        _let_cupy_allocate_from(torch, ordinal)
        super().__init__(ordinal)

    def download(self, array):
        """As `Device.download`."""
        return array.cpu().numpy()

    def round_to(self, dtype):
        """As `Device.round_to`."""
        kind = getattr(self.xp, dtype)
        return lambda x: x.to(kind).float()

    def peak_bytes(self, method):
        """As `Device.peak_bytes`."""
        cuda = self.xp.cuda
        with method.context():
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
            results = method.call()
            cuda.synchronize()
            del results
            return cuda.max_memory_allocated() - before

    def copy(self, size):
        """As `Device.copy`."""
        source, target = (self.empty((size,), "uint8") for _ in range(2))
        return lambda: target.copy_(source)


class CupyDevice(_Bench, gpu.CupyGpu):
    """A device used through CuPy alone."""

    matmul_dtype = "float16"

    def __init__(self, ordinal: int):
        import cupy

        self.xp = cupy
        super().__init__(ordinal)

    def download(self, array):
        """As `Device.download`."""
        return self.xp.asnumpy(array)

    def round_to(self, dtype):
        """As `Device.round_to`."""
        kind = numpy_dtype(dtype)
        return lambda x: x.astype(kind).astype("float32")

    def peak_bytes(self, method):
        """As `Device.peak_bytes`."""
        pool = self.xp.get_default_memory_pool()
        with method.context():
            self.synchronize()
            pool.free_all_blocks()
            # The pool gives nothing back during the call: what it has grown by is the peak, and
            # free blocks of its own that it could not split off are the error.
            before = pool.total_bytes()
            results = method.call()
            self.synchronize()
            del results
            return pool.total_bytes() - before

    def copy(self, size):
        """As `Device.copy`."""
        source, target = (self.xp.empty(size, "u1") for _ in range(2))
        return lambda: self.xp.copyto(target, source)


def open_device(ordinal: int) -> Device:
    """The device, through PyTorch if that can use it, else through CuPy.

    Raises:
        RuntimeError: neither can, with both reasons.
    """
    return gpu.open_gpu(ordinal, (TorchDevice, CupyDevice))


def _let_cupy_allocate_from(torch, ordinal: int) -> None:
    """Make CuPy, if there is one, allocate from PyTorch's pool."""
    with suppress(ImportError):
        import cupy

        cupy.cuda.Device(ordinal).use()
        allocator = cupy.cuda.PythonFunctionAllocator(
            lambda size, device: torch.cuda.caching_allocator_alloc(
                size, device, torch.cuda.current_stream(device)
            ),
            lambda pointer, device: torch.cuda.caching_allocator_delete(pointer),
        )
        cupy.cuda.set_allocator(allocator.malloc)
