"""What the driver asks of a launch, and calls whose launches are looked at instead of run."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from numflash.calls import ready
from numflash.calls.launch import Fill, Launcher
from numflash.kernels.factories import make_kernel
from numflash.ptx import TensorMap
from numflash.runtime import driver
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import Pointer, numpy_dtype

# CUDA C++ Programming Guide, table of technical specifications by compute capability: shared
# memory that a block may have after it has opted in, in KiB.
SMEM_KB = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90a": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "sm_121": 99,
}
MOST_BLOCKS, MOST_THREADS = 2**31 - 1, 1024
# Of all drivers: those of CUDA 12.1 and newer take 32,764 bytes from Volta on.
MOST_PARAMETER_BYTES = 4096
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class Launched(NamedTuple):
    """A launch that was asked for."""

    config: object
    traits: object
    blocks: int

    def __str__(self):
        return f"{self.config.family} {self.config} {self.traits} on {self.blocks} blocks"


def recorded(monkeypatch, arch: str, num_sms: int = 132) -> list[Launched]:
    """From here on calls launch nothing: what they would launch is put into the list.

    Arrays may be `claimed`: nobody reads or writes them.
    """
    launched = []

    class Recorder:
        def __init__(self, launcher):
            self.asked = Launched(launcher._config, launcher._traits, launcher._num_blocks)

        def bind(self, operands):
            return lambda stream: launched.append(self.asked)

    monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
    monkeypatch.setattr(driver, "_SIMULATED_MULTIPROCESSORS", (num_sms, 50 * 2**20))
    monkeypatch.setattr(Launcher, "_built", lambda launcher: Recorder(launcher))
    monkeypatch.setattr(Fill, "__call__", lambda fill, stream: None)
    monkeypatch.setattr(NumPy, "empty", lambda self, shape, dtype, device: claimed(shape, dtype))
    monkeypatch.setattr(ready, "_ready", {})
    driver.limits_of_device.cache_clear()
    driver.multiprocessors.cache_clear()
    return launched


def claimed(shape, dtype="float16") -> np.ndarray:
    """A contiguous array of this shape; beyond 1 GiB there is memory for its beginning only."""
    dtype = numpy_dtype(dtype)
    if math.prod(shape) * dtype.itemsize < 2**30:
        return np.zeros(shape, dtype)
    strides = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(np.empty(64, dtype), shape, strides)


def wrong_with(launch: Launched, arch: str) -> list[str]:
    """Why a driver would refuse a launch: nothing, if it would not."""
    config, traits, blocks = launch
    threads, smem = config.num_threads, config.smem_bytes(traits)
    cluster, parameters = _of_kernel(config, traits)
    return [
        why
        for is_wrong, why in (
            (not 0 < blocks <= MOST_BLOCKS, f"{blocks} blocks"),
            (not 0 < threads <= MOST_THREADS, f"{threads} threads"),
            (smem > SMEM_KB[arch] * 1024, f"{smem} bytes of shared memory"),
            (blocks % cluster, f"{blocks} blocks in clusters of {cluster}"),
            (parameters > MOST_PARAMETER_BYTES, f"{parameters} bytes of parameters"),
        )
        if is_wrong
    ]


@cache
def _of_kernel(config, traits) -> tuple[int, int]:
    """(blocks of a cluster, bytes of parameters)."""
    kernel, end = make_kernel(config, traits), 0
    for annotation in kernel.leaves.values():
        size, alignment = _extent(annotation)
        end = -(-end // alignment) * alignment + size
    return kernel.cluster, end


def _extent(annotation) -> tuple[int, int]:
    """(bytes, alignment) of a parameter."""
    if annotation is TensorMap:
        return _MAP_BYTES, _MAP_ALIGNMENT
    size = 8 if isinstance(annotation, Pointer) else np.dtype(annotation).itemsize
    return size, size
