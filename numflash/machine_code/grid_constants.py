"""Tensor maps as kernel parameters by value.

Bulk copies want the address of a tensor map in constant or global memory. A parameter that is
passed by value and marked `grid_constant` has one, in the constant bank of the launch: nothing is
copied to the device, and a CUDA graph keeps the map with the kernel's other arguments. Numba knows
no such parameters; here its LLVM function gets the attributes just before it is compiled.

Source: NVVM IR Specification, "Global Property Annotation", grid_constant.
"""

from llvmlite import ir
from numba import types

from numflash.machine_code.annotations import annotate, changed_kernels
from numflash.ptx.scalars import TensorMap

TENSOR_MAP = types.CPointer(types.UniTuple(types.uint64, TensorMap.n_bytes // 8))
"""Numba's type of a `TensorMap` parameter."""
_ALIGNMENT = 64


def grid_constants():
    """Compile kernels whose `TENSOR_MAP` parameters are passed by value."""
    return changed_kernels(_pass_by_value)


class _ByValue(ir.values.ArgumentAttributes):
    """byval as the LLVM of NVVM for Hopper reads it, without the type."""

    def _to_list(self, typ):
        return ["byval", f"align {_ALIGNMENT}"]


def _pass_by_value(kernel) -> None:
    numbers = []
    for position, argument in enumerate(kernel.args, start=1):
        pointee = getattr(argument.type, "pointee", None)
        if isinstance(pointee, ir.ArrayType) and pointee.count * 8 == TensorMap.n_bytes:
            argument.attributes = _ByValue()
            numbers.append(position)
    if numbers:
        annotate(kernel, {"grid_constant": numbers})
