"""Array libraries: how each one's arrays are read, allocated and ordered on a stream.

CuPy arrays and PyTorch tensors are taken as they are. Any other object with
`__cuda_array_interface__` or DLPack is seen through CuPy without a copy, and results are handed
back as its own kind where that is possible. In the simulator arrays are NumPy's.

Nothing here imports a library that the caller has not: an array's type says which one it is.
"""

import sys
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.runtime.numpy_arrays import NumPy, type_name
from numflash.runtime.torch_tensors import Torch, TorchOnHost, dtype_name, is_tensor
from numflash.runtime.views import ArrayView, Operand, numpy_dtype


class ArrayLibrary(Protocol):
    """One array library."""

    def glance(self, array) -> tuple[Operand, Hashable]:
        """The array as an argument, and a key: arrays with equal keys have equal views.

        Every call does this for every array, so nothing is checked or converted here. (The views'
        pointers need not be equal, only aligned to 16 bytes or not.)
        """

    def view(self, array, name: str = "array") -> ArrayView:
        """The metadata of an array. Raises TypeError or ValueError, whose messages name `name`."""

    def operand(self, array) -> Operand:
        """An array made by `empty` or `with_contiguous_rows`, as an argument."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int):
        """A new contiguous array on a device, from the library's own pool, aligned to 16 bytes."""

    def from_host(self, array: np.ndarray, device: int):
        """A copy, made by `empty`, of a contiguous NumPy array."""

    def with_contiguous_rows(self, array):
        """The array, copied so that its last dimension is contiguous."""

    def stream(self, device: int) -> int:
        """The library's current stream on a device, as an address."""

    def ordered_on(self, stream: int, device: int) -> AbstractContextManager:
        """Inside, the library allocates and copies on this stream.

        Memory that is freed while a kernel on another stream still uses it would be handed out
        again too early.
        """

    def hand_back(self, array, like, stream: int):
        """A result made by `empty`, as the same kind of object as `like`.

        Call it after the kernels that fill the array were launched on the stream: it makes another
        library's work wait for them.
        """


class _CuPy:
    """CuPy arrays."""

    def __init__(self):
        import cupy

        self.cupy = cupy

    def glance(self, array):
        data = array.data
        pointer = data.ptr
        key = array.shape, array.strides, array.dtype, data.device_id, pointer % 16 == 0
        return Operand(pointer, array), key

    def view(self, array, name="array"):
        dtype, data = array.dtype, array.data
        strides = tuple([stride // dtype.itemsize for stride in array.strides])
        return ArrayView(data.ptr, array.shape, strides, dtype.name, data.device_id)

    def operand(self, array):
        return Operand(array.data.ptr, array)

    def _on(self, device: int) -> AbstractContextManager:
        """CuPy allocates and copies on the current device, which this makes `device`."""
        cuda = self.cupy.cuda
        return nullcontext() if cuda.runtime.getDevice() == device else cuda.Device(device)

    def empty(self, shape, dtype, device):
        # As `with self._on(device)`, which takes a microsecond longer.
        if self.cupy.cuda.runtime.getDevice() == device:
            return self.cupy.empty(shape, numpy_dtype(dtype))
        with self.cupy.cuda.Device(device):
            return self.cupy.empty(shape, numpy_dtype(dtype))

    def from_host(self, array, device):
        made = self.empty(array.shape, array.dtype.name, device)
        with self._on(device):
            made.set(array)
        return made

    def with_contiguous_rows(self, array):
        with self._on(array.data.device_id):
            return self.cupy.ascontiguousarray(array)

    def stream(self, device):
        return self.cupy.cuda.get_current_stream(device).ptr

    @contextmanager
    def ordered_on(self, stream, device):
        with self._on(device), self.cupy.cuda.ExternalStream(stream, device):
            yield

    def hand_back(self, array, like, stream):
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

    def glance(self, array):
        if not _is_on_gpu(array):
            return Operand(0, array), None  # no key: `view` refuses it
        return super().glance(self._as_cupy(array))

    def view(self, array, name="array"):
        if not _is_on_gpu(array):
            raise _not_on_gpu(array, name)
        return super().view(self._as_cupy(array), name)

    def hand_back(self, array, like, stream):
        # The other library orders its work after CuPy's current stream.
        with self.ordered_on(stream, array.data.device_id):
            namespace = getattr(like, "__array_namespace__", None)
            if namespace is not None and hasattr(namespace(), "from_dlpack"):
                return namespace().from_dlpack(array)
            if type(like).__module__.startswith("numba."):
                from numba import cuda

                # Numba keeps the stream for its copies; the caller decides when to wait for it.
                return cuda.as_cuda_array(array, sync=False)
            return array


def on_stream(
    work: Callable[[int], Any],
    stream: int | None,
    device: int,
    arrays: dict[str, Any],
    operands: dict[str, Operand],
) -> Any:
    """Run `work`, which allocates, copies and launches for a call, in the order of its stream.

    Args:
        work: takes the stream's address; its result is returned.
        stream: the caller's; None is the current one of the library of the first array.
        device: of the arrays.
        arrays: the call's, by name; every library of theirs allocates and copies on the stream.
        operands: of these arrays. CuPy looks again at those that it sees for another library, so
            that the stream's work comes after the kernels that filled them.
    """
    name, array = next(iter(arrays.items()))
    first = library_of(array, name)
    if stream is None:
        stream = first.stream(device)
        if len(set(map(type, arrays.values()))) == 1:
            return work(stream)  # the library's current stream, and there is no other library
    libraries = {type(first): first}
    for name, array in arrays.items():
        library = library_of(array, name)
        libraries.setdefault(type(library), library)
    with ExitStack() as stack:
        for library in libraries.values():
            stack.enter_context(library.ordered_on(stream, device))
        for name, array in arrays.items():
            library = library_of(array, name)
            if isinstance(library, _Foreign):
                operands[name], _ = library.glance(array)
        return work(stream)


def copy_rows(operand: Operand) -> Operand:
    """A copy, by the array's own library, whose last axis is contiguous."""
    library = library_of(operand.array, "array")
    return library.operand(library.with_contiguous_rows(operand.array))


# Array type -> library; filled on first sight of a type.
_libraries: dict[type, ArrayLibrary] = {}


def library_of(array, name: str) -> ArrayLibrary:
    """The library of an array.

    Raises:
        TypeError: not an array, or not one that kernels of this process can reach; `name` is the
            argument that the message names.
    """
    library = _libraries.get(type(array))
    if library is None:
        library = _libraries[type(array)] = _find_library(array, name)
    return library


def current_array(why: str):
    """An empty array on the device, and of the library, that this process works with.

    PyTorch's if it has been imported and sees a GPU, else CuPy's.

    Raises:
        UnsupportedError: there is neither; `why` says what needs it.
    """
    if SIMULATED:
        return np.empty(0, np.int32)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.empty(0, dtype=torch.int32, device="cuda")
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"{why}: there is neither PyTorch nor CuPy") from error
    return cupy.empty(0, np.int32)


def to_numpy(array) -> np.ndarray:
    """A host copy of an array of any library."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get"):  # CuPy
        return array.get()
    if hasattr(array, "detach"):  # PyTorch; NumPy has no bfloat16 of its own to copy to
        tensor = array.detach().cpu()
        if "float8" in str(tensor.dtype):
            return tensor.view(sys.modules["torch"].uint8).numpy()
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.float().numpy()
        return tensor.numpy()
    if hasattr(array, "copy_to_host"):  # Numba
        return array.copy_to_host()
    return np.asarray(array)


def metadata(array, name: str) -> ArrayView:
    """The metadata of an array that nothing will read: it need not be on a CUDA device.

    Raises:
        TypeError, ValueError: it is no array.
    """
    if is_tensor(array):
        shape, strides = tuple(array.shape), tuple(array.stride())
        return ArrayView(array.data_ptr(), shape, strides, dtype_name(array), -1)
    if isinstance(array, np.ndarray):
        return NumPy().view(array, name)
    return library_of(array, name).view(array, name)


def _find_library(array, name: str) -> ArrayLibrary:
    if (own := getattr(type(array), "numflash_library", None)) is not None:
        return own  # of a front end's own arrays
    jax = sys.modules.get("jax.core")
    if jax is not None and isinstance(array, jax.Tracer):
        raise TypeError(
            f"{name} is traced by JAX, and this function takes arrays only. Functions of the same "
            "names in numflash.jax are for jit, grad and vmap"
        )
    if SIMULATED:
        if not hasattr(array, "__array_interface__") and not hasattr(array, "__array__"):
            raise TypeError(
                f"{name} must be a NumPy array in the simulator, got {type_name(array)}"
            )
        return TorchOnHost() if is_tensor(array) else NumPy()
    if "cupy" in sys.modules and isinstance(array, sys.modules["cupy"].ndarray):
        return _CuPy()
    if is_tensor(array):
        return Torch()
    if _is_on_gpu(array):
        return _Foreign()
    raise _not_on_gpu(array, name)


# DLPack's device types for CUDA and CUDA managed memory.
_DLPACK_CUDA = (2, 13)


def _is_on_gpu(array) -> bool:
    """Whether an object of an unknown library is an array on a CUDA device."""
    try:
        return int(array.__dlpack_device__()[0]) in _DLPACK_CUDA
    except (AttributeError, TypeError, BufferError):
        return hasattr(array, "__cuda_array_interface__")


def _not_on_gpu(array, name: str) -> TypeError:
    return TypeError(
        f"{name} must be an array on a CUDA device (CuPy, PyTorch, JAX, Numba, ...), got "
        f"{type_name(array)}. For NumPy arrays on a machine without a GPU, set "
        "NUMBA_ENABLE_CUDASIM=1 before Python starts: kernels then run in the simulator. With a "
        "GPU: cupy.asarray(array)."
    )


def stream_address(stream) -> int:
    """The address of a stream object of any library, or of an integer address.

    Raises:
        TypeError: not a stream.
        ValueError: a negative address.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream must be an address, 0 or positive, got {stream}")
        return stream
    try:
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        for attribute in ("ptr", "cuda_stream", "handle"):
            address = getattr(stream, attribute, None)
            if address is not None:
                return int(getattr(address, "value", address) or 0)
    except (TypeError, ValueError, IndexError):
        pass  # it has the attribute of a stream, but no address there
    raise TypeError(
        "stream must be a CUDA stream (CuPy, PyTorch, Numba, cuda.core) or its address, got "
        f"{stream!r} ({type(stream).__name__})"
    )
