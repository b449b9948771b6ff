"""The CUDA driver and the properties of devices; the simulator is a device of its own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from numflash.runtime.devices import Architecture, architecture, architecture_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.gpus import Gpu
from numflash.runtime.mode import SIMULATED

# The architecture that the simulator models unless NUMFLASH_SIM_ARCH names another.
_SIMULATED_ARCHITECTURE = "sm_80"


@cache
def limits_of_device(device: int | Gpu) -> Architecture:
    """The architecture of a CUDA device, or of the simulator.

    Raises:
        UnsupportedError: no driver, or a GPU older than Turing.
        ValueError: NUMFLASH_SIM_ARCH names no architecture.
    """
    if isinstance(device, Gpu):
        return device.limits
    if SIMULATED:
        name = os.environ.get("NUMFLASH_SIM_ARCH") or _SIMULATED_ARCHITECTURE
        try:
            return architecture(name)
        except ValueError as error:
            raise ValueError(f"NUMFLASH_SIM_ARCH: {error}") from error
    names = "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR"
    capability = _attributes(device, *names)
    try:
        return architecture_of(capability)
    except ValueError as error:
        raise UnsupportedError(f"device {device}: {error}") from error


# (multiprocessors, bytes of L2) of the simulator: one, so that little is split unless asked for.
_SIMULATED_MULTIPROCESSORS = 1, 2**20


@cache
def multiprocessors(device: int | Gpu) -> tuple[int, int]:
    """(streaming multiprocessors, bytes of L2 cache) of a CUDA device, or of the simulator."""
    if isinstance(device, Gpu):
        return device.num_sms, device.l2_bytes
    if SIMULATED:
        return _SIMULATED_MULTIPROCESSORS
    return _attributes(device, "MULTIPROCESSOR_COUNT", "L2_CACHE_SIZE")


@dataclass(frozen=True)
class Machine:
    """A GPU as the choice of kernels sees it.

    Attributes:
        device: its ordinal, or the `Gpu` that need not be here.
        limits: of its architecture.
        num_sms: multiprocessors.
        l2_bytes: L2 cache.
    """

    device: int | Gpu
    limits: Architecture
    num_sms: int
    l2_bytes: int


def machine_of(device: int | Gpu) -> Machine:
    """The machine that a CUDA device is, or the simulator. Raises as `limits_of_device`."""
    return Machine(device, limits_of_device(device), *multiprocessors(device))


def clocks(device: int) -> tuple[float, float]:
    """(highest MHz of the SMs, 1e9 bytes per second of memory) of a CUDA device."""
    names = "CLOCK_RATE", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH"
    clock_khz, memory_khz, bits = _attributes(device, *names)
    # Memory moves data at both edges of its clock.
    return clock_khz / 1e3, 2 * memory_khz * 1e3 * bits / 8 / 1e9


def device_of(pointer: int) -> int:
    """The ordinal of the CUDA device on which an address lies. Raises RuntimeError."""
    driver = open_driver()
    ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(checked(driver.cuPointerGetAttribute(ordinal, pointer)))


def num_devices() -> int:
    """The number of CUDA devices. Raises UnsupportedError without a driver."""
    return checked(open_driver().cuDeviceGetCount())


@cache
def device_name(device: int | Gpu) -> str:
    """The driver's name of a CUDA device; in the simulator that of the architecture."""
    if isinstance(device, Gpu):
        return device.name
    if SIMULATED:
        return limits_of_device(device).arch.rstrip("af")
    driver = open_driver()
    handle = checked(driver.cuDeviceGet(device))
    return checked(driver.cuDeviceGetName(256, handle)).split(b"\0")[0].decode()


def _attributes(device: int, *names: str) -> tuple[int, ...]:
    """Attributes of a CUDA device."""
    driver = open_driver()
    handle = checked(driver.cuDeviceGet(device))
    kinds = driver.CUdevice_attribute
    return tuple(
        checked(driver.cuDeviceGetAttribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{n}"), handle))
        for n in names
    )


@cache
def open_driver():
    """cuda.bindings.driver, initialised. Raises UnsupportedError."""
    try:
        from cuda.bindings import driver

        checked(driver.cuInit(0))
    except (ImportError, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise UnsupportedError(
            f"the CUDA driver cannot be used: {why}. Kernels run on an NVIDIA GPU with its driver "
            'and pip install "numflash[cu13]" (or [cu12]), or, with NUMBA_ENABLE_CUDASIM=1 set '
            "before Python starts, on NumPy arrays in the simulator."
        ) from error
    return driver


@cache
def _primary_context(device: int):
    """The context that the CUDA runtime, and so every array library, uses on a device."""
    driver = open_driver()
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device))))


def in_context(device: int, call: Callable, *arguments):
    """A call with the device's primary context current."""
    driver = open_driver()
    status, current = driver.cuCtxGetDevice()
    if not status and int(current) == device:
        return call(*arguments)
    checked(driver.cuCtxPushCurrent(_primary_context(device)))
    try:
        return call(*arguments)
    finally:
        checked(driver.cuCtxPopCurrent())


def checked(result: tuple):
    """The value of a driver call. Raises RuntimeError with the driver's name of the error."""
    if result[0]:
        raise_error(result[0])
    return result[1] if len(result) == 2 else result[1:]


def raise_error(status):
    """Raise RuntimeError with the driver's name of the error."""
    raise RuntimeError(f"the CUDA driver reports {getattr(status, 'name', status)}")
