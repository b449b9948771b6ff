"""Arrays that travel: allocated, seen as bytes, cut and joined, whatever library they are of.

NumPy's in the simulator, CuPy's, and PyTorch's on a GPU or in the simulator.
"""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from numflash.distributed.agreement import Shard, agree
from numflash.runtime.mode import SIMULATED
from numflash.runtime.torch_tensors import is_tensor
from numflash.runtime.views import numpy_dtype

_BYTE = np.dtype("uint8")
_ALIGNMENT = 128
"""Bytes, of each array in a bundle: bulk copies of tensors want 16, cache lines 128."""


@dataclass(frozen=True)
class Arrays:
    """The library and the device of arrays.

    Attributes:
        library: torch, cupy or numpy.
        device: PyTorch's, or CuPy's number; None is the host.

    Example:
        >>> import numpy as np
        >>> arrays = Arrays.of(np.zeros(3, "float16"), "x")
        >>> arrays.zeros((2, 2), "float32").dtype.name
        'float32'
    """

    library: Any
    device: Any

    @classmethod
    def of(cls, array, name: str) -> "Arrays":
        """Raises TypeError: an array of another library."""
        if is_tensor(array):
            return cls(sys.modules["torch"], array.device)
        if SIMULATED and isinstance(array, np.ndarray):
            return cls(np, None)
        cupy = sys.modules.get("cupy")
        if cupy is not None and isinstance(array, cupy.ndarray):
            return cls(cupy, array.device.id)
        raise TypeError(
            f"{name} must be a CuPy array or a PyTorch tensor, or in the simulator a NumPy array, "
            f"got {type(array).__module__}.{type(array).__qualname__}"
        )

    @cached_property
    def is_torch(self) -> bool:
        """Whether arrays are PyTorch's."""
        return self.library.__name__ == "torch"

    @staticmethod
    def dtype_of(array) -> str:
        """The name of an array's dtype."""
        return _name_of(array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: str):
        """A new contiguous array."""
        if self.is_torch:
            kind = getattr(self.library, dtype)
            return self.library.empty(shape, dtype=kind, device=self.device)
        if self.device is None:
            return self.library.empty(shape, numpy_dtype(dtype))
        with self._on_device():
            return self.library.empty(shape, numpy_dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str):
        """A new contiguous array of zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def from_host(self, array: np.ndarray):
        """A copy of a NumPy array of whole numbers or float32."""
        if self.is_torch:
            return self.library.from_numpy(np.ascontiguousarray(array)).to(self.device)
        with self._on_device():
            return self.library.asarray(array)

    def astype(self, array, dtype: str):
        """The array in another dtype, itself if it has it."""
        if self.is_torch:
            return array.to(getattr(self.library, dtype))
        return array.astype(numpy_dtype(dtype), copy=False)

    def contiguous(self, array):
        """The array, copied if it is not contiguous."""
        if self.is_torch:
            return array.contiguous()
        return self.library.ascontiguousarray(array)

    def as_bytes(self, array):
        """The memory of a contiguous array, as a flat array of uint8."""
        if self.is_torch:
            return array.view(-1).view(self.library.uint8)
        return array.reshape(-1).view(_BYTE)

    def typed(self, memory, dtype: str, shape: tuple[int, ...]):
        """Bytes of the right number, as an array."""
        kind = getattr(self.library, dtype) if self.is_torch else numpy_dtype(dtype)
        return memory.view(kind).reshape(shape)

    def bundle(self, parts: dict[str, tuple[tuple[int, ...], str]]) -> "Bundle":
        """New arrays in one piece of memory, which travels as one message.

        Args:
            parts: (shape, dtype) by name.
        """
        return self.bundle_at(places_in_bundle(tuple(parts.items())))

    def bundle_at(self, size_and_places: "Places") -> "Bundle":
        """`bundle`, of arrays whose places are known."""
        size, places = size_and_places
        memory = self.empty((size,), "uint8")
        views = {name: self.typed(memory[at], *kind) for name, at, kind in places}
        return Bundle(memory, views)

    def _on_device(self) -> AbstractContextManager:
        """CuPy allocates on the current device, which this makes `device`."""
        return nullcontext() if self.device is None else self.library.cuda.Device(self.device)


@lru_cache(maxsize=64)
def _name_of(dtype) -> str:
    """The name of NumPy's, CuPy's or PyTorch's dtype."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


Places = tuple[int, tuple[tuple[str, slice, tuple[str, tuple[int, ...]]], ...]]


@lru_cache(maxsize=4096)
def places_in_bundle(parts: tuple[tuple[str, tuple[tuple[int, ...], str]], ...]) -> Places:
    """Where `Arrays.bundle` puts arrays.

    Args:
        parts: (name, (shape, dtype)) of each.

    Returns:
        the bytes of all, and for each (name, its bytes among them, (dtype, shape)).
    """
    found, at = [], 0
    for name, (shape, dtype) in parts:
        begin = -(-at // _ALIGNMENT) * _ALIGNMENT
        at = begin + math.prod(shape) * numpy_dtype(dtype).itemsize
        found.append((name, slice(begin, at), (dtype, shape)))
    return at, tuple(found)


class Bundle(dict):
    """Arrays by name, in one piece of memory.

    Attributes:
        memory: all of it, flat, uint8.
    """

    def __init__(self, memory, views: dict[str, Any]):
        super().__init__(views)
        self.memory = memory


def by_rank(x, ranks: int):
    """(batch, tokens, heads, ...) as (ranks, tokens, batch, heads of a rank, ...): a view."""
    batch, tokens, heads, *others = x.shape
    return x.reshape((batch, tokens, ranks, heads // ranks, *others)).swapaxes(0, 2)


def shard(layout, x, rank: int, axis: int):
    """See `Layout.shard`."""
    _expect_rank(layout, rank)
    _expect_tokens(x, axis, layout.seqlen, "the layout has")
    places = layout.places(rank)
    parts = [x[_along(x, axis, slice(*place))] for place in places]
    if len(parts) == 1:
        return parts[0]
    try:
        arrays = Arrays.of(x, "x")
    except TypeError:  # of another library, as NumPy's of whoever reads data
        return x[_along(x, axis, layout.indices(rank))]
    shape = list(x.shape)
    shape[axis] = layout.tokens(rank)
    whole = arrays.empty(tuple(shape), arrays.dtype_of(x))
    for part, rows in zip(parts, layout.rows(rank), strict=True):
        whole[_along(x, axis, slice(*rows))] = part
    return whole


def gather(layout, x, comm, axis: int):
    """See `Layout.gather`."""

    def check() -> Arrays:
        arrays = Arrays.of(x, "x")
        _expect_ranks(layout, comm)
        _expect_tokens(x, axis, layout.tokens(comm.rank), f"the layout gives rank {comm.rank}")
        return arrays

    arrays = agree(comm, "Layout.gather", {"layout": layout, "x": Shard(x, axis)}, check)
    dtype, axis = arrays.dtype_of(x), axis % len(x.shape)
    received = []
    for rank in range(layout.ranks):
        shape = (*x.shape[:axis], layout.tokens(rank), *x.shape[axis + 1 :])
        received.append(arrays.contiguous(x) if rank == comm.rank else arrays.empty(shape, dtype))
    others = [rank for rank in range(layout.ranks) if rank != comm.rank]
    sends = [(received[comm.rank], rank) for rank in others if layout.tokens(comm.rank)]
    receives = [(received[rank], rank) for rank in others if layout.tokens(rank)]
    as_messages = [
        [(arrays.as_bytes(array), rank) for array, rank in side] for side in (sends, receives)
    ]
    comm.exchange(*as_messages, "gather")()
    whole = arrays.empty((*x.shape[:axis], layout.seqlen, *x.shape[axis + 1 :]), dtype)
    for rank, part in enumerate(received):
        for rows, place in zip(layout.rows(rank), layout.places(rank), strict=True):
            whole[_along(x, axis, slice(*place))] = part[_along(x, axis, slice(*rows))]
    return whole


def _along(x, axis: int, rows: slice | np.ndarray) -> tuple[slice | np.ndarray, ...]:
    return (*[slice(None)] * (axis % len(x.shape)), rows)


def _expect_tokens(x, axis: int, tokens: int, whose: str) -> None:
    if not -len(x.shape) <= axis < len(x.shape):
        raise ValueError(f"axis must be one of x of shape {tuple(x.shape)}, got {axis}")
    if x.shape[axis] != tokens:
        raise ValueError(
            f"x must have {tokens} tokens along axis {axis}, as {whose}, got shape "
            f"{tuple(x.shape)}"
        )


def _expect_rank(layout, rank: int) -> None:
    if not 0 <= rank < layout.ranks:
        raise ValueError(f"rank must be from 0 to {layout.ranks - 1}, got {rank}")


def _expect_ranks(layout, comm) -> None:
    if layout.ranks != comm.size:
        raise ValueError(
            f"layout and comm must have as many ranks, got {layout.ranks} and {comm.size}"
        )
