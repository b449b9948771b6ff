"""A GPU that exists only as metadata: a stand-in for the CUDA driver, and machines that have it.

Its arrays are those of `fake_arrays`. The driver records what it is asked to do and reads the
arguments of a launch where a real driver would. It knows only the calls that a launch may make:
anything else, above all a synchronisation, is an AttributeError.
"""

import ctypes
import struct
import sys
import types
from functools import cache
from typing import NamedTuple

from numflash.api import plans
from numflash.calls import fp8_sources, launch, quantization, ready
from numflash.kernels.factories import make_kernel
from numflash.machine_code.compiler import Cubin, letter_of
from numflash.runtime import arrays, driver
from numflash.selection import choice as selection
from numflash.selection import spills
from tests.support.fake_arrays import (
    DTYPES,
    CuPyArray,
    Memory,
    contiguous,
    fake_cupy,
    fake_torch,
)

B, SQ, SK, H, HKV, D, DV = 2, 100, 70, 4, 2, 64, 96
"""Sizes of the arrays that most tests take."""


class Status(int):
    """A driver's status; it has a name, as an enum member has."""

    @property
    def name(self):
        """As in the driver's header."""
        names = {0: "SUCCESS", 1: "ERROR_INVALID_VALUE", 2: "ERROR_OUT_OF_MEMORY"}
        return f"CUDA_{names.get(self, 'ERROR_UNKNOWN')}"


OK = Status(0)
FUNCTION = 0xF000
"""The difference between a context's function and its kernel."""


class EncodedMap(NamedTuple):
    """A request to cuTensorMapEncodeTiled: numbers and enumerators as in cuda.h."""

    dtype: int
    pointer: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    l2_promotion: int
    out_of_bounds: int


class MemorySet(NamedTuple):
    """A request to set `count` elements of `itemsize` bytes to a number."""

    pointer: int
    value: int
    count: int
    itemsize: int
    stream: int


_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    *[ctypes.c_int] * 4,
)


class Driver:
    """The part of `cuda.bindings.driver` that numflash may use.

    Attributes:
        calls: (name, *arguments) of the calls that change something, in order.
        launches: one `Launch` for each call of cuLaunchKernel.
        device: the current device, or None without a current context.
        launch_status: what cuLaunchKernel answers.
        maps: one `EncodedMap` for each call of cuTensorMapEncodeTiled.
        sets: one `MemorySet` for each call of cuMemsetD8Async and cuMemsetD32Async.
        encode_status: what cuTensorMapEncodeTiled answers.
        load_status: what cuFuncLoad answers.
        loaded: (kernel, device) of what was loaded.
        loaded_lazily: what was first loaded by its launch.
    """

    CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
        CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE=38,
    )
    CUfunction_attribute = types.SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max dynamic smem"
    )
    CUfunction = int

    def __init__(self, capability, num_sms, l2_bytes):
        attributes = self.CUdevice_attribute
        self.attributes = {
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: capability[0],
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: capability[1],
            attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: num_sms,
            attributes.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: l2_bytes,
        }
        self.device, self.put_aside, self.launch_status = 0, [], OK
        self.calls, self.launches, self.kernels, self.maps = [], [], [], []
        self.sets = []
        self.encode_status, self.encode = 0, _ENCODE(self._encode)
        self.load_status, self.loaded, self.loaded_lazily = OK, set(), []

    def cuDeviceGet(self, ordinal):
        return OK, ordinal

    def cuDeviceGetName(self, length, device):
        return OK, b"Fake GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute, device):
        return OK, self.attributes[attribute]

    def cuLibraryLoadData(self, code, *_):
        self.kernels.append(code.decode())
        return OK, len(self.kernels)

    def cuLibraryGetKernel(self, library, entry):
        return OK, library

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.calls.append(("cuKernelSetAttribute", attribute, value, kernel, device))
        return (OK,)

    def cuKernelGetFunction(self, kernel):
        if self.device is None:
            return Status(201), None
        self.calls.append(("cuKernelGetFunction", kernel))
        return OK, FUNCTION + kernel

    def cuFuncLoad(self, function):
        self.calls.append(("cuFuncLoad", self.kernels[function - FUNCTION - 1]))
        if not self.load_status:
            self.loaded.add((function - FUNCTION, self.device))
        return (self.load_status,)

    def cuDevicePrimaryCtxRetain(self, device):
        return OK, 0xC0 + device

    def cuCtxGetDevice(self):
        return (Status(201), None) if self.device is None else (OK, self.device)

    def cuCtxPushCurrent(self, context):
        self.calls.append(("cuCtxPushCurrent", context))
        self.put_aside.append(self.device)
        self.device = context - 0xC0
        return (OK,)

    def cuCtxPopCurrent(self):
        self.calls.append(("cuCtxPopCurrent",))
        self.device = self.put_aside.pop()
        return OK, 0

    def cuGetProcAddress(self, symbol, version, flags):
        """The address of a C function, as the real one gives it."""
        assert (symbol, version, flags) == (b"cuTensorMapEncodeTiled", 12000, 0)
        return OK, ctypes.cast(self.encode, ctypes.c_void_p).value, 0

    def _encode(self, target, dtype, rank, pointer, extents, strides, box, steps, *modes):
        """Write 128 bytes that begin with the number of the map; the real ones are opaque."""
        if target % 64 or self.device is None:
            return 1
        arrays = extents[:rank], strides[: rank - 1], box[:rank], steps[:rank]
        self.maps.append(EncodedMap(dtype, pointer or 0, *map(tuple, arrays), *modes))
        ctypes.memset(target, 0xEE, 128)
        ctypes.c_uint64.from_address(target).value = len(self.maps) - 1
        return self.encode_status

    def cuMemsetD8Async(self, pointer, value, count, stream):
        return self._set(pointer, value, count, 1, stream)

    def cuMemsetD32Async(self, pointer, value, count, stream):
        return self._set(pointer, value, count, 4, stream)

    def _set(self, pointer, value, count, itemsize, stream):
        assert 0 <= value < 256**itemsize
        assert pointer % itemsize == 0
        assert self.device is not None
        self.calls.append(("cuMemsetAsync", itemsize))
        self.sets.append(MemorySet(pointer, value, count, itemsize, stream))
        return (OK,)

    def cuLaunchKernel(self, function, *rest):
        *geometry, stream, parameters, extra = rest
        kernel = self.kernels[function - 1]
        if (function, self.device) not in self.loaded:
            self.loaded_lazily.append(kernel)
        self.calls.append(("cuLaunchKernel", kernel))
        if 0 in geometry[:6]:
            return (Status(1),)
        launched = Launch(kernel, tuple(geometry), stream, parameters, extra, self.maps)
        self.launches.append(launched)
        return (self.launch_status,)


class Launch:
    """One recorded launch.

    Attributes:
        family, config, traits: which kernel.
        grid, block, smem_bytes, stream: how.
        arguments: path of a leaf, as in "q.row" -> value, read from the addresses the driver was
            given; "q" for the address "q.data"; of a tensor map the `EncodedMap`.
    """

    def __init__(self, kernel, geometry, stream, parameters, extra, maps):
        self.family, self.config, self.traits = kernel.split("|")
        self.grid, self.block, self.smem_bytes = geometry[:3], geometry[3:6], geometry[6]
        self.stream, self.extra = stream, extra
        self.arguments = {}
        kinds = {
            "P": ctypes.c_uint64,
            "q": ctypes.c_int64,
            "i": ctypes.c_int32,
            "f": ctypes.c_float,
        }
        declared = _parameters[kernel]
        addresses = (ctypes.c_void_p * len(declared)).from_address(parameters)
        for address, (path, letter) in zip(addresses, declared, strict=True):
            name = path.removesuffix(".data")
            if letter == "T":
                assert address % 64 == 0
                number, rest = struct.unpack("<Q120s", ctypes.string_at(address, 128))
                assert rest == b"\xee" * 120
                self.arguments[name] = maps[number]
                continue
            self.arguments[name] = kinds[letter].from_address(address).value


# Code of a fake cubin -> what its launches are given.
_parameters: dict[str, tuple[tuple[str, str], ...]] = {}


@cache
def parameters_of(config, traits) -> tuple[tuple[str, str], ...]:
    """(path, letter) of the leaves of a kernel's parameters, as `Cubin` has them."""
    leaves = make_kernel(config, traits).leaves
    return tuple((path, letter_of(annotation)) for path, annotation in leaves.items())


def fake_get_cubin(config, traits, limits) -> Cubin:
    """A `Cubin` whose code says which kernel it is."""
    code = f"{config.family}|{config}|{traits}"
    _parameters[code] = parameters_of(config, traits)
    return Cubin(
        entry=config.family,
        parameters=_parameters[code],
        num_threads=config.num_threads,
        smem_bytes=config.smem_bytes(traits),
        registers=64,
        spill_store_bytes=0,
        spill_load_bytes=0,
        stack_bytes=0,
        warnings=(),
        min_blocks=None,
        compile_ms=0.0,
        code=code.encode(),
    )


class Gpu:
    """The fake machine: `cupy`, `torch`, `driver`, and arrays to call numflash with."""

    def __init__(self, *device):
        self.memory = Memory()
        self.cupy, self.torch = fake_cupy(self.memory), fake_torch(self.memory)
        self.driver = Driver(*device)

    def array(self, shape, dtype="float16", device=0, offset_bytes=0) -> CuPyArray:
        """A contiguous CuPy array, `offset_bytes` behind an aligned address."""
        dtype = DTYPES[dtype]
        n_bytes = contiguous(shape, dtype.itemsize)[1] + offset_bytes
        return CuPyArray(shape, dtype, self.memory.take(n_bytes) + offset_bytes, device=device)

    def tensor(self, shape, dtype="float16", device=("cuda", 0)):
        """A contiguous PyTorch tensor."""
        return self.torch.Tensor(shape, getattr(self.torch, dtype), self.torch.device(*device))


def install(monkeypatch, capability=(7, 5), num_sms=40, l2_bytes=4 * 2**20, own_torch=True) -> Gpu:
    """Put a fake machine, a T4 unless told otherwise, under numflash for one test.

    Without `own_torch` the real PyTorch stays: `torch_devices` puts its tensors onto the machine.
    """
    gpu = Gpu(capability, num_sms, l2_bytes)
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy)
    if own_torch:
        monkeypatch.setitem(sys.modules, "torch", gpu.torch)
    for module in (driver, launch):
        monkeypatch.setattr(module, "open_driver", lambda: gpu.driver)
    monkeypatch.setattr(launch, "get_cubin", fake_get_cubin)
    monkeypatch.setattr(plans, "get_cubin", fake_get_cubin)
    monkeypatch.setattr(spills, "get_cubin", fake_get_cubin)
    monkeypatch.setattr(spills, "known_cubin", fake_get_cubin)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(ready, "_ready", {})
    monkeypatch.setattr(arrays, "_libraries", {})
    # Caches of this test's own, so that nothing fake outlives it.
    for name in ("limits_of_device", "multiprocessors", "device_name"):
        function = cache(getattr(driver, name).__wrapped__)
        for module in (driver, launch, plans, selection, quantization, fp8_sources):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    context = cache(driver._primary_context.__wrapped__)
    monkeypatch.setattr(driver, "_primary_context", context)
    return gpu
