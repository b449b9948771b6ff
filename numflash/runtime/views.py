"""Views of arrays of any library: metadata, and an address."""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


class Operand(NamedTuple):
    """An array as a kernel's argument.

    Attributes:
        pointer: address of element 0.
        array: keeps the memory alive; in the simulator the memory itself.
    """

    pointer: int
    array: Any


@dataclass(frozen=True)
class Pointer:
    """The address of elements of type `element` in global memory: what kernels take operands as.

    In a kernel it is indexed like an array, `q[offset]`, with a 64-bit element offset.
    """

    element: type


class FromHead(NamedTuple):
    """In place of the name of an operand: without the first elements of its last axis."""

    operand: str
    first: int


@dataclass(frozen=True, slots=True)
class ArrayView:
    """Metadata of an array, which calls check and kernels are compiled for.

    Attributes:
        pointer: address of element 0; of an array yet to be allocated, 0.
        shape: extents.
        strides: in elements; they may have any sign.
        dtype: name, as in "bfloat16".
        device: ordinal of the CUDA device; -1 in the simulator. Or a `gpus.Gpu` that is not here.
        writeable: whether a kernel may write to it.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    writeable: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether the elements of the last axis are neighbours."""
        has_neighbours = self.shape and self.shape[-1] > 1 and 0 not in self.shape
        return not has_neighbours or self.strides[-1] == 1

    @property
    def is_contiguous(self) -> bool:
        """Whether all elements are neighbours, in C order."""
        wanted = contiguous_strides(self.shape)
        axes = zip(self.shape, self.strides, wanted, strict=True)
        return 0 in self.shape or all(n == 1 or step == want for n, step, want in axes)

    def span(self) -> tuple[int, int]:
        """The range of bytes (from, to) that its elements lie in, counted from the pointer."""
        if 0 in self.shape:
            return 0, 0
        steps = [(n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)]
        low, high = sum(s for s in steps if s < 0), 1 + sum(s for s in steps if s > 0)
        return low * self.itemsize, high * self.itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array in C order."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def fresh(shape: tuple[int, ...], dtype: str, device: int) -> ArrayView:
    """The view of a contiguous array still to be allocated; allocators align to 16 bytes."""
    return ArrayView(0, tuple(shape), contiguous_strides(shape), dtype, device)


@cache
def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype with this name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def overlap(a: ArrayView, b: ArrayView) -> bool:
    """Whether two arrays share an element's memory. Exact; reads metadata only."""
    return np.shares_memory(_ghost(a), _ghost(b))


class Apart:
    """That `out`, which a call writes, shares no memory with the arrays that it reads."""

    def __init__(self, views: dict[str, ArrayView]):
        self._views = views
        self._spans = {name: view.span() for name, view in views.items()}

    def expect(self, pointers: dict[str, int], but: tuple[str, ...] = ()) -> None:
        """Raise ValueError if `out` shares memory with an array, all at these addresses.

        `but` names arrays that it may share memory with.
        """
        first, end = (pointers["out"] + offset for offset in self._spans["out"])
        for name, (low, high) in self._spans.items():
            # Most arrays lie apart, which is quick to see; those that interleave need a proof.
            apart = pointers[name] + high <= first or end <= pointers[name] + low
            if name != "out" and name not in but and not apart:
                out = replace(self._views["out"], pointer=pointers["out"])
                if overlap(out, replace(self._views[name], pointer=pointers[name])):
                    raise ValueError(f"out must not overlap {name}, but they share memory")


def _ghost(view: ArrayView) -> np.ndarray:
    """A NumPy array with the view's address and strides, never to be read."""
    interface = {
        "shape": view.shape,
        "typestr": f"|V{view.itemsize}",
        "data": (view.pointer, True),
        "strides": tuple(stride * view.itemsize for stride in view.strides),
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
