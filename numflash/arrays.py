"""Array libraries: how each one's arrays are read, allocated and ordered on a stream.

CuPy arrays and PyTorch tensors are taken as they are. Any other object with
`__cuda_array_interface__` or DLPack is seen through CuPy without a copy, and results are handed
back as its own kind where that is possible. In the simulator arrays are NumPy's.

Nothing here imports a library that the caller has not: an array's type says which one it is.
"""

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from numflash.errors import UnsupportedError
from numflash.mode import SIMULATED


@dataclass(slots=True)
class ArrayView:
    """What a kernel needs to know of an array.

    Attributes:
        pointer: address of element 0.
        shape: extents.
        strides: in elements; they may have any sign.
        dtype: name, as in "bfloat16".
        device: ordinal of the CUDA device; -1 in the simulator.
        array: keeps the memory alive; in the simulator the memory itself.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    array: Any

    def key(self) -> tuple:
        """Everything a kernel's code and arguments depend on, except the pointer itself."""
        return self.shape, self.strides, self.dtype, self.device, self.pointer % 16 == 0


class ArrayLibrary(Protocol):
    """One array library."""

    def view(self, array) -> ArrayView:
        """How a kernel sees the array."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: ArrayView):
        """A new array of this library on the device of `like`, from the library's own pool."""

    def with_contiguous_rows(self, array):
        """The array, copied so that its last dimension is contiguous."""

    def stream(self, device: int) -> int:
        """The library's current stream on a device, as an address."""

    def hand_back(self, array, like):
        """A result made by `empty`, as the same kind of object as `like`."""


class _NumPy:
    """NumPy arrays, and what NumPy can see without a copy; in the simulator only."""

    def view(self, array) -> ArrayView:
        array = np.asarray(array)
        itemsize = array.itemsize
        if any(stride % itemsize for stride in array.strides):
            raise ValueError(f"strides must be whole elements, got {array.strides} bytes")
        return ArrayView(
            array.__array_interface__["data"][0],
            array.shape,
            tuple(stride // itemsize for stride in array.strides),
            array.dtype.name,
            -1,
            array,
        )

    def empty(self, shape, dtype, like):
        return np.empty(shape, numpy_dtype(dtype))

    def with_contiguous_rows(self, array):
        return np.ascontiguousarray(array)

    def stream(self, device):
        return 0

    def hand_back(self, array, like):
        return array


class _CuPy:
    """CuPy arrays."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.dtype_names: dict = {}

    def view(self, array) -> ArrayView:
        dtype = array.dtype
        name = self.dtype_names.get(dtype)
        if name is None:
            name = self.dtype_names[dtype] = dtype.name
        itemsize = dtype.itemsize
        strides = tuple([stride // itemsize for stride in array.strides])
        data = array.data
        return ArrayView(data.ptr, array.shape, strides, name, data.device_id, array)

    def empty(self, shape, dtype, like):
        if self.cupy.cuda.runtime.getDevice() == like.device:
            return self.cupy.empty(shape, numpy_dtype(dtype))
        with self.cupy.cuda.Device(like.device):
            return self.cupy.empty(shape, numpy_dtype(dtype))

    def with_contiguous_rows(self, array):
        return self.cupy.ascontiguousarray(array)

    def stream(self, device):
        return self.cupy.cuda.get_current_stream(device).ptr

    def hand_back(self, array, like):
        return array


class _Torch:
    """PyTorch tensors on a CUDA device."""

    def __init__(self):
        self.torch = sys.modules["torch"]

    def view(self, array) -> ArrayView:
        if not array.is_cuda:
            raise TypeError(f"a tensor on a CUDA device is needed, got one on {array.device}")
        return ArrayView(
            array.data_ptr(),
            tuple(array.shape),
            array.stride(),
            str(array.dtype).removeprefix("torch."),
            array.device.index,
            array,
        )

    def empty(self, shape, dtype, like):
        torch = self.torch
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.array.device)

    def with_contiguous_rows(self, array):
        return array.contiguous()

    def stream(self, device):
        return self.torch.cuda.current_stream(device).cuda_stream

    def hand_back(self, array, like):
        return array


class _Foreign(_CuPy):
    """Other objects with `__cuda_array_interface__` or DLPack, seen through CuPy."""

    def __init__(self):
        try:
            super().__init__()
        except ImportError as error:
            raise UnsupportedError(
                "arrays that are neither CuPy's nor PyTorch's need CuPy: "
                'pip install "numflash[cu13]" (or [cu12])'
            ) from error

    def _as_cupy(self, array):
        # DLPack first: it knows bfloat16, and says where the memory lies.
        if hasattr(array, "__dlpack__"):
            return self.cupy.from_dlpack(array)
        return self.cupy.asarray(array)

    def view(self, array) -> ArrayView:
        seen = array if isinstance(array, self.cupy.ndarray) else self._as_cupy(array)
        return super().view(seen)

    def with_contiguous_rows(self, array):
        return self.cupy.ascontiguousarray(self._as_cupy(array))

    def hand_back(self, array, like):
        namespace = getattr(like, "__array_namespace__", None)
        if namespace is not None and hasattr(namespace(), "from_dlpack"):
            return namespace().from_dlpack(array)
        if type(like).__module__.startswith("numba."):
            from numba import cuda

            return cuda.as_cuda_array(array)
        return array


# Array type -> library; filled on first sight of a type.
_libraries: dict[type, ArrayLibrary] = {}


def library_of(array, name: str) -> ArrayLibrary:
    """The library of an array.

    Raises:
        TypeError: not an array, or not one that kernels of this process can reach; `name` is the
            argument that the message speaks of.
    """
    library = _libraries.get(type(array))
    if library is None:
        library = _libraries[type(array)] = _find_library(array, name)
    return library


def _find_library(array, name: str) -> ArrayLibrary:
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if SIMULATED:
        if not hasattr(array, "__array_interface__") and not hasattr(array, "__array__"):
            raise TypeError(f"{name} must be a NumPy array in the simulator, got {kind}")
        return _NumPy()
    top = kind.split(".")[0]
    if top == "cupy":
        return _CuPy()
    if "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor):
        return _Torch()
    if hasattr(array, "__cuda_array_interface__") or _dlpack_device(array) == _DLPACK_CUDA:
        return _Foreign()
    raise TypeError(
        f"{name} must be an array on a CUDA device (CuPy, PyTorch, JAX, Numba, ...), got {kind}. "
        "For NumPy arrays on a machine without a GPU, set NUMBA_ENABLE_CUDASIM=1 before Python "
        "starts: kernels then run in the simulator. With a GPU: cupy.asarray(array)."
    )


_DLPACK_CUDA = 2


def _dlpack_device(array) -> int | None:
    """The DLPack device type of an array; None if it has none."""
    try:
        return int(array.__dlpack_device__()[0])
    except (AttributeError, TypeError, BufferError):
        return None


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype with this name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def stream_address(stream) -> int:
    """The address of a stream object of any library, or of an integer address.

    Raises:
        TypeError: not a stream.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("ptr", "cuda_stream", "handle"):
        address = getattr(stream, attribute, None)
        if address is not None:
            return int(getattr(address, "value", address) or 0)
    raise TypeError(
        "stream must be a CUDA stream (CuPy, PyTorch, Numba, cuda.core) or its address, got "
        f"{type(stream).__name__}"
    )


def overlap(a: ArrayView, b: ArrayView, itemsize_a: int, itemsize_b: int) -> bool:
    """Whether two arrays share an element's memory. Exact; reads metadata only."""
    return np.shares_memory(_ghost(a, itemsize_a), _ghost(b, itemsize_b))


def _ghost(view: ArrayView, itemsize: int) -> np.ndarray:
    """A NumPy array with the view's address and strides, never to be read."""

    class Interface:
        __array_interface__ = {
            "shape": view.shape,
            "typestr": f"|V{itemsize}",
            "data": (view.pointer, True),
            "strides": tuple(stride * itemsize for stride in view.strides),
            "version": 3,
        }

    return np.asarray(Interface())
