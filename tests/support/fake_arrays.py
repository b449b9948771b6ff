"""Arrays that exist only as metadata, and stand-ins for the CuPy and PyTorch that make them.

They have addresses, shapes and strides but no memory.
"""

import types
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


_ALLOCATION = 512


def contiguous(shape, itemsize):
    """(strides, bytes) of a contiguous array."""
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
    """A CuPy array, as far as numflash reads it. Strides are in bytes.

    `content` is what was copied to it from the host.
    """

    __slots__ = ("content", "data", "dtype", "shape", "strides")

    def __init__(self, shape, dtype, pointer, strides=None, device=0):
        self.shape, self.dtype = tuple(shape), dtype
        self.strides = strides or contiguous(self.shape, dtype.itemsize)[0]
        self.data = _Pointer(pointer, device)

    def __getitem__(self, index):
        ghost = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        return self._seen_as(ghost, ghost[index])

    def set(self, array):
        """Copy a NumPy array of the same kind."""
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        self.content = array.copy()

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
        strides, n_bytes = contiguous(shape, dtype.itemsize)
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

    def __init__(self, seen: CuPyArray, gpu, log: list):
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

    torch.strided = object()

    class Tensor:
        requires_grad = is_nested = is_quantized = False
        layout = torch.strided

        def __init__(self, shape, dtype, device):
            self.shape, self.dtype, self.device = tuple(shape), dtype, device
            self.is_cuda = device.type == "cuda"
            itemsize = DTYPES[dtype.name].itemsize
            strides, n_bytes = contiguous(self.shape, itemsize)
            self._strides = tuple(stride // itemsize for stride in strides)
            self._pointer = memory.take(n_bytes)

        def data_ptr(self):
            return self._pointer

        def detach(self):
            return self

        def is_neg(self):
            return False

        def stride(self):
            return self._strides

        def view(self, dtype):
            assert DTYPES[dtype.name].itemsize == DTYPES[self.dtype.name].itemsize
            return types.SimpleNamespace(copy_=lambda array: self._copy(array, dtype))

        def _copy(self, array, dtype):
            assert (array.shape, array.dtype) == (self.shape, DTYPES[dtype.name])
            self.content = array.view(DTYPES[self.dtype.name]).copy()

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

    for name in DTYPES:
        setattr(torch, name, DType(name))
    torch.Tensor, torch.device, torch.empty = Tensor, Device, empty
    torch.from_numpy = lambda array: array
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: ExternalStream(torch.current_stream, device),
        ExternalStream=ExternalStream,
        stream=StreamContext,
    )
    return torch
