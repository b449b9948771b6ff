"""The GPU as `worker` needs it: random inputs, and a timer with a cold L2.

The timer fills a buffer larger than any L2 before each call. The fills also keep the GPU busy
while the host prepares the launch, so that its latency is not counted as the kernel's time.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Protocol

_FLUSH_BYTES = 256 * 2**20
_FLUSH_MS = 0.5
_BUS_ID_BYTES = 32


class Device(Protocol):
    """The device that `worker` needs.

    Attributes:
        ordinal: of the CUDA device.
    """

    ordinal: int

    def describe(self) -> dict[str, Any]:
        """`name`, `arch`, `num_sms`, and `bus`, which tells it from the others of this host."""

    def empty(self, shape: tuple[int, ...], dtype: str):
        """An array of this device."""

    def fill_normal(self, array, seed: int) -> None:
        """Fill an array, or a view of one, with random normal numbers."""

    def upload(self, array):
        """A NumPy array, on this device."""

    def total_bytes(self) -> int:
        """Bytes of its memory, used or free."""

    def time(self, launch: Callable[[], Any]) -> float:
        """Milliseconds of one launch on the current stream, with a cold L2."""

    def synchronize(self) -> None:
        """Wait for all work; raises the errors of kernels."""

    def release(self) -> None:
        """Give cached memory back."""


class _Gpu:
    """The common part of both array libraries' devices. Each has its own `fill` and the like."""

    def __init__(self, ordinal: int):
        self.ordinal, self._fills = ordinal, 1
        median = statistics.median(self.time(self._fill) for _ in range(5))
        self._fills = max(1, math.ceil(_FLUSH_MS / max(median, 1e-3)))

    def describe(self):
        """As `Device.describe`."""
        from numflash.selection.choice import device_key

        return {**asdict(device_key(self.ordinal)), "bus": _bus_id(self.ordinal)}

    def time(self, launch):
        """As `Device.time`."""
        begin, end = self._event(), self._event()
        for _ in range(self._fills):
            self._fill()
        begin.record()
        # Results are let go after the time is taken.
        results = launch()
        end.record()
        end.synchronize()
        del results
        return self._elapsed_ms(begin, end)


class CupyGpu(_Gpu):
    """A GPU used through CuPy."""

    library = "CuPy"

    def __init__(self, ordinal: int):
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(ordinal)
        self._device.use()
        self._buffer = cupy.empty(_FLUSH_BYTES, "u1")
        self._event, self._elapsed_ms = cupy.cuda.Event, cupy.cuda.get_elapsed_time
        super().__init__(ordinal)

    def empty(self, shape, dtype):
        """As `Device.empty`."""
        from numflash.runtime.views import numpy_dtype

        return self._cupy.empty(shape, numpy_dtype(dtype))

    def fill_normal(self, array, seed):
        """As `Device.fill_normal`."""
        generator = self._cupy.random.default_rng(seed)
        for entry in array:
            numbers = generator.standard_normal(entry.shape, dtype="float32")
            entry[...] = numbers.astype(array.dtype)

    def upload(self, array):
        """As `Device.upload`."""
        return self._cupy.asarray(array)

    def total_bytes(self):
        """As `Device.total_bytes`."""
        return self._device.mem_info[1]

    def synchronize(self):
        """As `Device.synchronize`."""
        self._device.synchronize()

    def release(self):
        """As `Device.release`."""
        self._cupy.get_default_memory_pool().free_all_blocks()

    def _fill(self) -> None:
        self._buffer.fill(0)


class TorchGpu(_Gpu):
    """A GPU used through PyTorch."""

    library = "PyTorch"

    def __init__(self, ordinal: int):
        import torch

        self._torch = torch
        torch.cuda.set_device(ordinal)
        self._device = torch.device("cuda", ordinal)
        self._buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        super().__init__(ordinal)

    def empty(self, shape, dtype):
        """As `Device.empty`."""
        dtype = getattr(self._torch, dtype)
        return self._torch.empty(shape, dtype=dtype, device=self._device)

    def fill_normal(self, array, seed):
        """As `Device.fill_normal`."""
        generator = self._torch.Generator(self._device).manual_seed(seed)
        for entry in array:
            entry.normal_(generator=generator)

    def upload(self, array):
        """As `Device.upload`."""
        return self._torch.from_numpy(array).to(self._device)

    def total_bytes(self):
        """As `Device.total_bytes`."""
        return self._torch.cuda.mem_get_info(self._device)[1]

    def synchronize(self):
        """As `Device.synchronize`."""
        self._torch.cuda.synchronize(self._device)

    def release(self):
        """As `Device.release`."""
        self._torch.cuda.empty_cache()

    def _fill(self) -> None:
        self._buffer.zero_()

    def _event(self):
        return self._torch.cuda.Event(enable_timing=True)

    def _elapsed_ms(self, begin, end) -> float:
        return begin.elapsed_time(end)


def open_gpu(ordinal: int, kinds: Iterable[type] = (CupyGpu, TorchGpu)) -> Device:
    """The GPU through the first library that can use it.

    Args:
        ordinal: of the CUDA device.
        kinds: classes of devices, one for each library.

    Raises:
        RuntimeError: none can, with the reason of each.
    """
    reasons = []
    for kind in kinds:
        try:
            return kind(ordinal)
        except Exception as error:
            reasons.append(f"{kind.library}: {' '.join(str(error).split()) or repr(error)}")
    raise RuntimeError("; ".join(reasons))


def _bus_id(ordinal: int) -> str:
    """The PCI address, which names a GPU whatever CUDA_VISIBLE_DEVICES is."""
    from cuda.bindings import driver

    # An array library has initialised the driver.
    status, handle = driver.cuDeviceGet(ordinal)
    if not status:
        status, text = driver.cuDeviceGetPCIBusId(_BUS_ID_BYTES, handle)
    if status:
        raise RuntimeError(f"the CUDA driver reports {status.name} for device {ordinal}")
    return text.split(b"\0")[0].decode()
