"""XLA's buffers as arrays, and the memory of a call.

A call allocates nothing: XLA owns its results, and one more buffer in which its workspaces lie. On
CUDA an array is an address, a shape and a dtype; in the simulator it is NumPy's, over the same
memory.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numflash.runtime.arrays import library_of
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import ArrayView, Operand, contiguous_strides, numpy_dtype

_ALIGNMENT = 256


class Spec(NamedTuple):
    """What an array is, without its memory."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


class _Library:
    """The library of `XlaArray`, as far as a bound call asks it."""

    def glance(self, array):
        return self.operand(array), (array.shape, array.dtype, array.device)

    def view(self, array, name="array"):
        strides = contiguous_strides(array.shape)
        return ArrayView(array.pointer, array.shape, strides, array.dtype, array.device)

    def operand(self, array):
        return Operand(array.pointer, array)


class XlaArray:
    """A buffer of XLA's on a CUDA device: contiguous, and not its owner."""

    __slots__ = ("device", "dtype", "pointer", "shape")

    numflash_library = _Library()

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: str, device: int):
        self.pointer, self.shape, self.dtype, self.device = pointer, shape, dtype, device

    def __getitem__(self, index):
        """Elements of the last axis, `[first:end]` or `[..., first:]`.

        Only the address is right where there are further axes.
        """
        last = index[-1] if isinstance(index, tuple) else index
        first, end, _ = last.indices(self.shape[-1])
        pointer = self.pointer + first * numpy_dtype(self.dtype).itemsize
        shape = (*self.shape[:-1], max(end - first, 0))
        return XlaArray(pointer, shape, self.dtype, self.device)


def array_at(pointer: int, spec: Spec, device: int):
    """The array in this memory."""
    if not SIMULATED:
        return XlaArray(pointer, spec.shape, spec.dtype, device)
    dtype = numpy_dtype(spec.dtype)
    if not spec.bytes:
        return np.empty(spec.shape, dtype)
    memory = (ctypes.c_char * spec.bytes).from_address(pointer)
    return np.frombuffer(memory, dtype).reshape(spec.shape)


class _Pretended:
    """Arrays that nothing reads, each with memory of its own."""

    def __init__(self, device: int):
        self._device, self._next = device, _ALIGNMENT

    def array(self, spec: Spec):
        """One of them."""
        if SIMULATED:
            return np.empty(spec.shape, numpy_dtype(spec.dtype))
        made = array_at(self._next, spec, self._device)
        self._next += _rounded(spec.bytes + 1)
        return made


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


class _Given:
    """An array library that hands out memory that is there already, in a fixed order."""

    def __init__(self, empty: Callable):
        self._empty = empty

    def empty(self, shape, dtype, device):
        return self._empty(Spec(dtype, tuple(shape)))

    def operand(self, array):
        return library_of(array, "array").operand(array)


class Memory:
    """Where each array lies that a call asks for when it is bound: found by binding it once.

    Attributes:
        results: the arrays that the call returns.
        workspace: bytes of all others.
    """

    def __init__(self, bind: Callable, arguments: Sequence[tuple[str, Spec]], device: int):
        """Bind a call to arrays that nothing reads.

        Args:
            bind: (operands, library) -> the arrays that it returns.
            arguments: names of the operands, and what they are.
            device: ordinal, or -1 in the simulator.
        """
        pretended, made = _Pretended(device), []

        def empty(spec: Spec):
            made.append((spec, pretended.array(spec)))
            return made[-1][1]

        library = _Given(empty)
        given = {name: library.operand(pretended.array(spec)) for name, spec in arguments}
        returned = bind(given, library)
        # By identity: all of these arrays are alive.
        places = {id(array): number for number, array in enumerate(returned)}
        self._device, self.workspace = device, 0
        # Of each array in order: what it is, the result that it is or None, and else its place.
        self._slots: list[tuple[Spec, int | None, int]] = []
        found: dict[int, Spec] = {}
        for spec, array in made:
            place = places.get(id(array))
            self._slots.append((spec, place, self.workspace))
            if place is None:
                self.workspace += _rounded(spec.bytes)
            else:
                found[place] = spec
        self.results = tuple(found[n] for n in range(len(returned)))

    def library(self, results: Sequence[int], workspace: int) -> Any:
        """The library for one call: its arrays lie in these results, and in the workspace."""
        slots = iter(self._slots)

        def empty(spec: Spec):
            _, place, offset = next(slots)
            pointer = workspace + offset if place is None else results[place]
            return array_at(pointer, spec, self._device)

        return _Given(empty)
