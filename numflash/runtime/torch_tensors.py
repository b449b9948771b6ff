"""PyTorch tensors as libraries of arrays: on a CUDA device, and in the simulator on the CPU.

PyTorch is never imported here: a tensor shows that the caller has done so.
"""

import sys
from types import SimpleNamespace

import numpy as np

from numflash.runtime.errors import UnsupportedError
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import ArrayView, Operand, numpy_dtype

_NO_FORWARD_MODE = SimpleNamespace(_current_level=-1)


class TorchOnHost(NumPy):
    """PyTorch tensors on the CPU, seen and handed back without a copy; in the simulator only."""

    def _as_numpy(self, array):
        tensor, dtype = array.detach(), dtype_name(array)
        try:
            return tensor.numpy()
        except TypeError:
            # Of NumPy's, bfloat16 and 8-bit floats are ml_dtypes': the same bits under its names.
            whole = getattr(sys.modules["torch"], f"uint{8 * tensor.itemsize}")
            return tensor.view(whole).numpy().view(numpy_dtype(dtype))

    def glance(self, array):
        if array.is_neg() or records_gradient(array) or has_tangent(array):
            return Operand(0, array), None  # no key: `view` refuses it
        return super().glance(array)

    def view(self, array, name="array"):
        if array.device.type != "cpu":
            raise TypeError(
                f"{name} must be a tensor on the CPU in the simulator, got one on {array.device}"
            )
        expect_own_values(array, name)
        return super().view(array, name)

    def hand_back(self, array, like, stream):
        torch = sys.modules["torch"]
        try:
            return torch.from_numpy(array)
        except TypeError:
            whole = array.view(f"uint{8 * array.itemsize}")
            return torch.from_numpy(whole).view(getattr(torch, array.dtype.name))


class Torch:
    """PyTorch tensors on a CUDA device."""

    def __init__(self):
        self.torch = sys.modules["torch"]
        self._records = self.torch.is_grad_enabled
        self._forward_mode = sys.modules.get("torch.autograd.forward_ad", _NO_FORWARD_MODE)

    def glance(self, array):
        # As `expect_own_values`, and quicker: every call asks.
        if array.is_neg() or (array.requires_grad and self._records()) or has_tangent(array):
            return Operand(0, array), None  # no key: `view` refuses it
        try:
            pointer = array.data_ptr()
            key = array.shape, array.stride(), array.dtype, array.device, pointer % 16 == 0
        except RuntimeError:  # of a sparse or nested tensor
            return Operand(0, array), None
        return Operand(pointer, array), key

    def view(self, array, name="array"):
        if not array.is_cuda:
            raise TypeError(f"{name} must be a tensor on a CUDA device, got one on {array.device}")
        expect_own_values(array, name)
        shape, strides = tuple(array.shape), tuple(array.stride())
        return ArrayView(array.data_ptr(), shape, strides, dtype_name(array), array.device.index)

    def operand(self, array):
        return Operand(array.data_ptr(), array)

    def empty(self, shape, dtype, device):
        torch = self.torch
        return torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device("cuda", device))

    def from_host(self, array, device):
        made = self.empty(array.shape, array.dtype.name, device)
        # As whole numbers: PyTorch cannot take NumPy's bfloat16.
        whole = np.dtype(f"int{8 * array.itemsize}")
        made.view(getattr(self.torch, whole.name)).copy_(self.torch.from_numpy(array.view(whole)))
        return made

    def with_contiguous_rows(self, array):
        return array.contiguous()

    def stream(self, device):
        return self.torch.cuda.current_stream(device).cuda_stream

    def ordered_on(self, stream, device):
        cuda = self.torch.cuda
        return cuda.stream(cuda.ExternalStream(stream, device=device))

    def hand_back(self, array, like, stream):
        return array


def is_tensor(array) -> bool:
    """Whether an array is PyTorch's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_name(tensor) -> str:
    """The name of a tensor's dtype, as NumPy and ml_dtypes have it."""
    return str(tensor.dtype).removeprefix("torch.")


def without_gradient(array):
    """An array that only says where results go, or of what shape: as one without a gradient."""
    return array.detach() if is_tensor(array) and array.requires_grad else array


def records_gradient(tensor) -> bool:
    """Whether PyTorch would record operations on a tensor now, for a backward through them."""
    return tensor.requires_grad and sys.modules["torch"].is_grad_enabled()


def has_tangent(tensor) -> bool:
    """Whether a tensor carries a derivative in forward mode."""
    forward_ad = sys.modules.get("torch.autograd.forward_ad")
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def expect_own_values(tensor, name: str) -> None:
    """Check that a tensor's memory holds its values, and that PyTorch records nothing of it.

    Raises:
        TypeError: it is sparse, nested or quantised, or its values are those of the memory with
            another sign.
        UnsupportedError: it requires a gradient, or carries one in forward mode.
    """
    kinds = {"nested": tensor.is_nested, "quantised": tensor.is_quantized}
    kinds[str(tensor.layout)] = tensor.layout is not sys.modules["torch"].strided
    for kind, is_kind in kinds.items():
        if is_kind:
            raise TypeError(f"{name} must be a dense tensor of numbers, got one that is {kind}")
    if tensor.is_neg():
        raise TypeError(
            f"{name} is a negated view, as the imaginary part of a conjugate: its memory holds "
            f"other values, and kernels read memory. Give {name}.resolve_neg()"
        )
    if has_tangent(tensor):
        raise UnsupportedError(
            f"{name} carries a derivative in forward mode (torch.func.jvp, forward_ad), which the "
            f"result would lose: numflash has none. Give {name}.detach()"
        )
    if records_gradient(tensor):
        raise UnsupportedError(
            f"{name} requires a gradient, and this function records nothing for PyTorch: its "
            "result would have none. Functions of the same names in numflash.torch record it; "
            f"else disable gradients (torch.no_grad(), or {name}.detach()) and take them with "
            "numflash.attention_backward"
        )
