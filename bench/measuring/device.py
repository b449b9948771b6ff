"""The device as a benchmark needs it: random inputs, a timer, peak memory, and what it can reach.

PyTorch is used where it is importable, because most peers are its; CuPy otherwise. With both,
CuPy allocates from PyTorch's pool, so that one peak covers all methods.

The timer fills a buffer larger than the L2 before each call. The fills also keep the device busy
while the host prepares the call, so that host overhead is not counted as the method's time; it is
measured on its own.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from bench.points.interleave import Method

_FLUSH_BYTES = 256 * 2**20
_FLUSH_MS = 0.5
_MATMUL = 8192
_COPY_BYTES = 2**30
_CEILING_REPEATS = 20


class Device(Protocol):
    """What `bench.measuring.worker` asks of a device."""

    library: str
    xp: Any

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int):
        """Random normal numbers."""

    def upload(self, array: np.ndarray):
        """The bytes of an array of uint8 on the device."""

    def download(self, array) -> np.ndarray:
        """The inverse of `upload`; waits for everything."""

    def round_to(self, dtype: str):
        """A function that rounds float32 arrays to a dtype and back."""

    def time(self, method: Method) -> float:
        """Milliseconds of one call with a cold L2."""

    def synchronize(self) -> None:
        """Wait for all work; raises the errors of kernels."""

    def peak_bytes(self, method: Method) -> int:
        """Device memory that a call takes at most, its results included."""

    def free(self) -> None:
        """Give cached memory back."""

    def copy(self, size: int) -> Callable[[], None]:
        """A function that copies so many bytes on the device."""

    def ceilings(self) -> dict:
        """Matrix product and copy rates, number of SMs."""


class TorchDevice:
    """A device used through PyTorch."""

    library = "torch"

    def __init__(self, ordinal: int):
        import torch

        self.xp = self.torch = torch
        torch.cuda.set_device(ordinal)
        self.device = torch.device("cuda", ordinal)
        torch.set_float32_matmul_precision("highest")  # the references are float32
        _let_cupy_allocate_from(torch, ordinal)
        self.buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self.fills = 1
        self.fills = _fills(statistics.median(self._time_fill() for _ in range(5)))

    def normal(self, shape, dtype, seed):
        """As `Device.normal`."""
        generator = self.torch.Generator(self.device).manual_seed(seed)
        x = self.torch.randn(shape, device=self.device, generator=generator)
        return x.to(getattr(self.torch, dtype))

    def upload(self, array):
        """As `Device.upload`."""
        return self.torch.from_numpy(array).to(self.device)

    def download(self, array):
        """As `Device.download`."""
        return array.cpu().numpy()

    def round_to(self, dtype):
        """As `Device.round_to`."""
        kind = getattr(self.torch, dtype)
        return lambda x: x.to(kind).float()

    def time(self, method):
        """As `Device.time`."""
        with method.context():
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self.fills):
                self.buffer.zero_()
            begin.record()
            results = method.call()
            end.record()
            end.synchronize()
            del results
        return begin.elapsed_time(end)

    def synchronize(self):
        """As `Device.synchronize`."""
        self.torch.cuda.synchronize()

    def peak_bytes(self, method):
        """As `Device.peak_bytes`."""
        cuda = self.torch.cuda
        with method.context():
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
            results = method.call()
            cuda.synchronize()
            del results
            return cuda.max_memory_allocated() - before

    def free(self):
        """As `Device.free`."""
        self.torch.cuda.empty_cache()

    def copy(self, size):
        """As `Device.copy`."""
        source, target = (self.buffer.new_empty(size) for _ in range(2))
        return lambda: target.copy_(source)

    def ceilings(self):
        """As `Device.ceilings`."""
        a, b = (self.normal((_MATMUL, _MATMUL), "bfloat16", seed) for seed in (0, 1))
        matmul, copy = Method("matmul", lambda: a @ b), Method("copy", self.copy(_COPY_BYTES))
        sms = self.torch.cuda.get_device_properties(self.device).multi_processor_count
        return _ceilings(self, matmul, "bfloat16", copy, sms)

    def _time_fill(self) -> float:
        return self.time(Method("fill", lambda: self.buffer.zero_()))


class CupyDevice:
    """A device used through CuPy alone."""

    library = "cupy"

    def __init__(self, ordinal: int):
        import cupy

        self.xp = self.cupy = cupy
        self.device = cupy.cuda.Device(ordinal)
        self.device.use()
        self.buffer = cupy.empty(_FLUSH_BYTES, "u1")
        self.fills = 1
        fill = Method("fill", lambda: self.buffer.fill(0))
        self.fills = _fills(statistics.median(self.time(fill) for _ in range(5)))

    def normal(self, shape, dtype, seed):
        """As `Device.normal`."""
        generator = self.cupy.random.default_rng(seed)
        return generator.standard_normal(shape, dtype="float32").astype(_cupy_dtype(dtype))

    def upload(self, array):
        """As `Device.upload`."""
        return self.cupy.asarray(array)

    def download(self, array):
        """As `Device.download`."""
        return self.cupy.asnumpy(array)

    def round_to(self, dtype):
        """As `Device.round_to`."""
        kind = _cupy_dtype(dtype)
        return lambda x: x.astype(kind).astype("float32")

    def time(self, method):
        """As `Device.time`."""
        with method.context():
            begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            for _ in range(self.fills):
                self.buffer.fill(0)
            begin.record()
            results = method.call()
            end.record()
            end.synchronize()
            del results
        return self.cupy.cuda.get_elapsed_time(begin, end)

    def synchronize(self):
        """As `Device.synchronize`."""
        self.device.synchronize()

    def peak_bytes(self, method):
        """As `Device.peak_bytes`."""
        pool = self.cupy.get_default_memory_pool()
        with method.context():
            self.device.synchronize()
            pool.free_all_blocks()
            # The pool gives nothing back during the call: what it has grown by is the peak, and
            # free blocks of its own that it could not split off are the error.
            before = pool.total_bytes()
            results = method.call()
            self.device.synchronize()
            del results
            return pool.total_bytes() - before

    def free(self):
        """As `Device.free`."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def copy(self, size):
        """As `Device.copy`."""
        source, target = (self.cupy.empty(size, "u1") for _ in range(2))
        return lambda: self.cupy.copyto(target, source)

    def ceilings(self):
        """As `Device.ceilings`."""
        a, b = (self.normal((_MATMUL, _MATMUL), "float16", seed) for seed in (0, 1))
        matmul, copy = Method("matmul", lambda: a @ b), Method("copy", self.copy(_COPY_BYTES))
        sms = self.device.attributes["MultiProcessorCount"]
        return _ceilings(self, matmul, "float16", copy, sms)


def open_device(ordinal: int) -> Device:
    """The device, through PyTorch if that can use it, else through CuPy.

    Raises:
        RuntimeError: neither can, with both reasons.
    """
    reasons = []
    for kind in (TorchDevice, CupyDevice):
        try:
            return kind(ordinal)
        except Exception as error:
            reasons.append(f"{kind.library}: {' '.join(str(error).split()) or repr(error)}")
    raise RuntimeError("; ".join(reasons))


def _fills(fill_ms: float) -> int:
    """How often to fill the buffer before a call, to keep the device busy meanwhile."""
    return max(1, math.ceil(_FLUSH_MS / max(fill_ms, 1e-3)))


def _ceilings(device: Device, matmul: Method, dtype: str, copy: Method, num_sms: int) -> dict:
    """Median rates of a matrix product and a copy."""
    medians = {}
    for method in (matmul, copy):
        times = [device.time(method) for _ in range(_CEILING_REPEATS + 3)][3:]
        medians[method.name] = statistics.median(times)
    return {
        "matmul_tflops": 2 * _MATMUL**3 / medians["matmul"] / 1e9,
        "matmul": f"{dtype}, {_MATMUL} x {_MATMUL} x {_MATMUL}, {device.library}",
        "copy_gbps": 2 * _COPY_BYTES / medians["copy"] / 1e6,
        "copy": f"{_COPY_BYTES} bytes, read and written, {device.library}",
        "num_sms": int(num_sms),
    }


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


def _cupy_dtype(dtype: str):
    """CuPy knows bfloat16 through ml_dtypes."""
    if dtype != "bfloat16":
        return dtype
    import ml_dtypes

    return ml_dtypes.bfloat16
