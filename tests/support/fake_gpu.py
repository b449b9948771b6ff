"""A GPU that exists only as metadata: stand-ins for CuPy, PyTorch and the CUDA driver.

Arrays have addresses, shapes and strides but no memory. The driver records what it is asked to do
and reads the arguments of a launch where a real driver would. It knows only the calls that a
launch may make: anything else, above all a synchronisation, is an AttributeError.
"""

import ctypes
import struct
import sys
import types
from functools import cache
from typing import NamedTuple

import ml_dtypes
import numpy as np

from numflash.api import plans
from numflash.calls import fp8_sources, launch, quantization, ready
from numflash.kernels.factories import make_kernel
from numflash.machine_code.compiler import Cubin, letter_of
from numflash.runtime import arrays, driver
from numflash.selection import choice as selection
from numflash.selection import spills

_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_ALLOCATION = 512
B, SQ, SK, H, HKV, D, DV = 2, 100, 70, 4, 2, 64, 96
"""Sizes of the arrays that most tests take."""


def _contiguous(shape, itemsize):
    strides = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(extent, 1)
    return tuple(reversed(strides)), itemsize


class Memory:
    """Hands out addresses, aligned as CUDA allocators align them."""

    def __init__(self):
        self.next = 0x7F00_0000_0000

    def take(self, n_bytes: int) -> int:
        """The address of a new allocation."""
        address = self.next
        self.next += -(-n_bytes // _ALLOCATION) * _ALLOCATION + _ALLOCATION
        return address


class _Pointer:
    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr, device_id):
        self.ptr, self.device_id = ptr, device_id


class CuPyArray:
    """A CuPy array, as far as numflash reads it. Strides are in bytes."""

    __slots__ = ("data", "dtype", "shape", "strides")

    def __init__(self, shape, dtype, pointer, strides=None, device=0):
        self.shape, self.dtype = tuple(shape), dtype
        self.strides = strides or _contiguous(self.shape, dtype.itemsize)[0]
        self.data = _Pointer(pointer, device)

    def __getitem__(self, index):
        ghost = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        return self._seen_as(ghost, ghost[index])

    def transpose(self, *axes):
        """A view with permuted axes."""
        ghost = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        return self._seen_as(ghost, ghost.transpose(*axes))

    def _seen_as(self, whole, part):
        begins = [array.__array_interface__["data"][0] for array in (whole, part)]
        pointer = self.data.ptr + begins[1] - begins[0]
        return CuPyArray(part.shape, self.dtype, pointer, part.strides, self.data.device_id)


CuPyArray.__module__ = "cupy"


def fake_cupy(memory: Memory) -> types.ModuleType:
    """A module `cupy`.

    `cupy.current` holds the current device and stream; `cupy.allocations` the (stream, device) on
    which each array was allocated.
    """
    cupy = types.ModuleType("cupy")
    cupy.current = types.SimpleNamespace(device=0, stream=0x5000)
    cupy.allocations = []
    cupy.ndarray = CuPyArray

    def empty(shape, dtype):
        strides, n_bytes = _contiguous(shape, dtype.itemsize)
        cupy.allocations.append((cupy.current.stream, cupy.current.device))
        return CuPyArray(shape, dtype, memory.take(n_bytes), strides, cupy.current.device)

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, cupy.current.device = cupy.current.device, self.device

        def __exit__(self, *_):
            cupy.current.device = self.before

    class ExternalStream:
        def __init__(self, ptr, device_id=-1):
            self.ptr, self.device_id = ptr, device_id

        def __enter__(self):
            if self.device_id not in (-1, cupy.current.device):
                raise RuntimeError("the stream's device does not match the current device")
            self.before, cupy.current.stream = cupy.current.stream, self.ptr

        def __exit__(self, *_):
            cupy.current.stream = self.before

    def ascontiguousarray(array):
        if array.data.device_id != cupy.current.device:
            raise RuntimeError("the array's device does not match the current device")
        return empty(array.shape, array.dtype)

    cupy.empty, cupy.ascontiguousarray = empty, ascontiguousarray

    def from_dlpack(array):
        with Device(array.__dlpack_device__()[1]):
            return array.__dlpack__()

    cupy.from_dlpack = from_dlpack
    cupy.asarray = lambda array: array.as_cupy
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: cupy.current.device),
        get_current_stream=lambda device: ExternalStream(cupy.current.stream, device),
        Device=Device,
        ExternalStream=ExternalStream,
    )
    return cupy


class Exchange(NamedTuple):
    """When an array went from one library to another, and what CuPy's current stream was then."""

    kind: str
    stream: int
    device: int
    launches: int


class ForeignArray:
    """An array that speaks DLPack only. `log` takes an `Exchange` each time."""

    def __init__(self, seen: CuPyArray, gpu: "Gpu", log: list):
        self.seen, self.gpu, self.log = seen, gpu, log

    def _note(self, kind: str) -> None:
        current = self.gpu.cupy.current
        launches = len(self.gpu.driver.launches)
        self.log.append(Exchange(kind, current.stream, current.device, launches))

    def __dlpack_device__(self):
        return 2, self.seen.data.device_id

    def __dlpack__(self):
        self._note("taken")
        return self.seen

    def __array_namespace__(self):
        return self

    def from_dlpack(self, array):
        self._note("given")
        return ForeignArray(array, self.gpu, self.log)


def fake_torch(memory: Memory) -> types.ModuleType:
    """A module `torch`, whose tensors are contiguous.

    `torch.current_stream` is an address; `torch.allocations` as those of `fake_cupy`;
    `torch.grad_enabled` is whether gradients are recorded.
    """
    torch = types.ModuleType("torch")
    torch.grad_enabled = True
    torch.is_grad_enabled = lambda: torch.grad_enabled
    torch.current_stream, torch.allocations = 0x6000, []

    class DType:
        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return f"torch.{self.name}"

    class Device:
        def __init__(self, kind, index=None):
            self.type, self.index = kind, index

        def __repr__(self):
            return self.type if self.index is None else f"{self.type}:{self.index}"

        def __eq__(self, other):
            return repr(self) == repr(other)

        def __hash__(self):
            return hash((self.type, self.index))

    class Tensor:
        requires_grad = False

        def __init__(self, shape, dtype, device):
            self.shape, self.dtype, self.device = tuple(shape), dtype, device
            self.is_cuda = device.type == "cuda"
            itemsize = _DTYPES[dtype.name].itemsize
            strides, n_bytes = _contiguous(self.shape, itemsize)
            self._strides = tuple(stride // itemsize for stride in strides)
            self._pointer = memory.take(n_bytes)

        def data_ptr(self):
            return self._pointer

        def stride(self):
            return self._strides

        def __array__(self, *_, **__):
            raise AssertionError("a CUDA tensor was asked for its contents")

    def empty(shape, *, dtype, device):
        torch.allocations.append((torch.current_stream, device.index))
        return Tensor(shape, dtype, device)

    class ExternalStream:
        def __init__(self, address, device=None):
            self.cuda_stream = address

    class StreamContext:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, torch.current_stream = torch.current_stream, self.stream.cuda_stream

        def __exit__(self, *_):
            torch.current_stream = self.before

    for name in _DTYPES:
        setattr(torch, name, DType(name))
    torch.Tensor, torch.device, torch.empty = Tensor, Device, empty
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: ExternalStream(torch.current_stream, device),
        ExternalStream=ExternalStream,
        stream=StreamContext,
    )
    return torch


class Status(int):
    """A driver's status; it has a name, as an enum member has."""

    @property
    def name(self):
        """As in the driver's header."""
        return {0: "CUDA_SUCCESS", 2: "CUDA_ERROR_OUT_OF_MEMORY"}.get(self, "CUDA_ERROR_UNKNOWN")


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

    def cuLaunchKernel(self, function, *rest):
        *geometry, stream, parameters, extra = rest
        kernel = self.kernels[function - 1]
        if (function, self.device) not in self.loaded:
            self.loaded_lazily.append(kernel)
        self.calls.append(("cuLaunchKernel", kernel))
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
        dtype = _DTYPES[dtype]
        n_bytes = _contiguous(shape, dtype.itemsize)[1] + offset_bytes
        return CuPyArray(shape, dtype, self.memory.take(n_bytes) + offset_bytes, device=device)

    def tensor(self, shape, dtype="float16", device=("cuda", 0)):
        """A contiguous PyTorch tensor."""
        return self.torch.Tensor(shape, getattr(self.torch, dtype), self.torch.device(*device))


def install(monkeypatch, capability=(7, 5), num_sms=40, l2_bytes=4 * 2**20) -> Gpu:
    """Put a fake machine, a T4 unless told otherwise, under numflash for one test."""
    gpu = Gpu(capability, num_sms, l2_bytes)
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy)
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
