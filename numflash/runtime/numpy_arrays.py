"""NumPy arrays as a library of arrays, for the simulator."""

from contextlib import nullcontext

import numpy as np

from numflash.runtime.views import ArrayView, Operand, numpy_dtype

# Errors of arrays that NumPy cannot see.
_NOT_NUMPYS = TypeError, ValueError, RuntimeError, BufferError


class NumPy:
    """NumPy arrays, and what NumPy can see without a copy; in the simulator only."""

    def _as_numpy(self, array) -> np.ndarray:
        return np.asarray(array)

    def glance(self, array):
        try:
            pointer, array = operand = self.operand(self._as_numpy(array))
        except _NOT_NUMPYS:
            return Operand(0, array), None  # no key: `view` says why
        flags = array.flags.writeable, pointer % 16 == 0
        return operand, (array.shape, array.strides, array.dtype, *flags)

    def view(self, array, name="array"):
        try:
            array = self._as_numpy(array)
        except _NOT_NUMPYS as error:
            dtype = getattr(array, "dtype", "an unknown dtype")
            why = str(error).rstrip(".")
            raise TypeError(
                f"{name} must be an array that NumPy can see in the simulator, got "
                f"{type_name(array)} of {dtype}: {why}. Give a NumPy array, whose bfloat16 is "
                "ml_dtypes.bfloat16"
            ) from error
        if not array.dtype.isnative:
            raise TypeError(f"{name} must have this machine's byte order, got {array.dtype}")
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(
                f"{name} must have strides of whole elements, {array.itemsize} bytes, got "
                f"{array.strides} bytes"
            )
        return ArrayView(
            self.operand(array).pointer,
            array.shape,
            tuple([stride // array.itemsize for stride in array.strides]),
            array.dtype.name,
            device=-1,
            writeable=array.flags.writeable,
        )

    def operand(self, array):
        return Operand(array.__array_interface__["data"][0], array)

    def empty(self, shape, dtype, device):
        return np.empty(shape, numpy_dtype(dtype))

    def from_host(self, array, device):
        return array.copy()

    def with_contiguous_rows(self, array):
        return np.ascontiguousarray(array)

    def stream(self, device):
        return 0

    def ordered_on(self, stream, device):
        return nullcontext()

    def hand_back(self, array, like, stream):
        return array


def type_name(array) -> str:
    """The name of an array's type, with its module."""
    return f"{type(array).__module__}.{type(array).__qualname__}"
