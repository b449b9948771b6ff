"""Tensor maps as bulk copies read them: which bytes of a tensor a tile is."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from numflash.problem.tensor_maps import TensorLayout
from numflash.simulator.errors import SimulationError
from numflash.simulator.memory import bytes_between

_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "uint8": np.dtype(np.uint8),
}
_CHUNK = 16


class SimulatedTensorMap:
    """A `TensorMap` kernel parameter: the tensor that `layout` describes in an array.

    Args:
        array: element 0 is the first of the tensor, or of row 0 where the map is ragged; no tile
            leaves the array's memory.
        layout: the rest of the map.

    Raises:
        ValueError: a tensor that the driver refuses, or one that leaves the array.
    """

    alignment = 128
    """Of a tile in shared memory, in bytes."""

    extent = None
    """`Writes` does not hear of tiles."""

    def __init__(self, array: np.ndarray, layout: TensorLayout):
        self.layout, self.dtype = layout, _DTYPES[layout.dtype]
        self.item_bytes = self.dtype.itemsize
        self.rank = len(layout.extents)
        self.n_bytes = math.prod(layout.box) * self.item_bytes
        strides = (self.item_bytes, *layout.strides)
        self._check(array, strides)
        last = sum((n - 1) * s for n, s in zip(layout.extents, strides, strict=True))
        last -= layout.shift_bytes
        below, above = _extent(array)
        if last + self.item_bytes > above:
            raise ValueError(
                f"a tensor map leaves its array: the last element is {last} bytes behind the "
                f"first, the array has {above} there"
            )
        self._memory, self._strides = bytes_between(array, below, above), strides
        self._first = -below - layout.shift_bytes

    def _check(self, array, strides) -> None:
        layout = self.layout
        if not 1 <= self.rank <= 5 or len(strides) != self.rank or len(layout.box) != self.rank:
            raise ValueError(f"a tensor map of {layout}: one to five dimensions, a stride fewer")
        axes = layout.row_axes
        if axes and len({layout.strides[axis - 1] for axis in axes}) > 1:
            raise ValueError(
                f"a ragged tensor map with strides of {layout.strides} bytes: dimensions "
                f"{axes[0]} and {axes[1]} must both step by a row"
            )
        if min(layout.extents) < 1:
            raise ValueError(f"a tensor map of extents {layout.extents}")
        if array.__array_interface__["data"][0] % 16 or any(s % 16 or s < 0 for s in strides[1:]):
            raise ValueError(
                f"a tensor map with strides of {layout.strides} bytes: they and the address must "
                "be multiples of 16"
            )
        row = layout.box[0] * self.item_bytes
        if row % _CHUNK or max(layout.box) > 256 or min(layout.box) < 1:
            raise ValueError(
                f"a tensor map with tiles of {layout.box}: 1 to 256 in each dimension, and a "
                "multiple of 16 bytes in the first"
            )
        if layout.swizzle_bytes not in _PATTERNS:
            raise ValueError(
                f"a tensor map with a swizzle of {layout.swizzle_bytes} bytes: it must be 0, 32, "
                "64 or 128"
            )
        if layout.swizzle_bytes not in (0, row):
            raise ValueError(
                f"a tensor map with rows of {row} bytes and a swizzle of {layout.swizzle_bytes}: "
                "the simulator knows rows as long as the swizzle"
            )

    def chunks(self, address: int) -> np.ndarray:
        """The numbers of the shared memory's 16-byte chunks that a tile at `address` has."""
        chunks = np.arange(address // _CHUNK, (address + self.n_bytes) // _CHUNK)
        return swizzled(chunks, self.layout.swizzle_bytes)

    def check(self, coordinates: tuple[int, ...]) -> None:
        """Raise SimulationError where the tile at `coordinates` leaves a ragged map's array.

        The unit would read or write there: its own bounds are those of the dimensions.
        """
        if not self.layout.row_axes:
            return
        low, high = self._overlap(coordinates)
        if any(first >= end for first, end in zip(low, high, strict=True)):
            return
        (x, y), shift = self.layout.row_axes, self.layout.shift
        # None is behind the last: x and y of the last element are those of the last row.
        if (first := low[x] + low[y] - shift) < 0:
            raise SimulationError(
                f"the tile at {coordinates} of a ragged tensor map begins with row {first}, "
                f"x + y - {shift}, of its array"
            )

    def read(self, coordinates: tuple[int, ...]) -> np.ndarray:
        """The tile at `coordinates`, (chunks, 16) bytes, zeros outside the tensor."""
        tile = np.zeros(self.layout.box[::-1], f"V{self.item_bytes}")
        inside, elements = self._elements(coordinates)
        tile[inside] = elements
        return tile.reshape(-1).view(np.uint8).reshape(-1, _CHUNK)

    def write(
        self, coordinates: tuple[int, ...], chunks: np.ndarray, combine: Callable | None = None
    ) -> None:
        """Write the tile but what lies outside the tensor, or combine it with what is there."""
        tile = chunks.reshape(-1).view(f"V{self.item_bytes}").reshape(self.layout.box[::-1])
        inside, elements = self._elements(coordinates)
        if combine is None:
            elements[...] = tile[inside]
        else:
            held, given = elements.view(self.dtype), tile[inside].reshape(-1)
            held[...] = combine(held.reshape(-1), given.view(self.dtype)).reshape(held.shape)

    def _elements(self, coordinates):
        """Index of the part of a tile inside the tensor, and a view of its elements there.

        In the order of NumPy: the slowest dimension first.
        """
        low, high = self._overlap(coordinates)
        shape = tuple(end - first for first, end in zip(low, high, strict=True))[::-1]
        offset = self._first + sum(c * s for c, s in zip(low, self._strides, strict=True))
        if 0 in shape:
            offset = 0
        elements = np.ndarray(
            shape, f"V{self.item_bytes}", self._memory, offset, self._strides[::-1]
        )
        inside = tuple(
            slice(first - c, end - c) for first, end, c in zip(low, high, coordinates, strict=True)
        )
        return inside[::-1], elements

    def _overlap(self, coordinates):
        """(first, end) coordinates of the part inside the tensor, one for each dimension."""
        low = [max(0, c) for c in coordinates]
        dimensions = zip(coordinates, self.layout.box, self.layout.extents, low, strict=True)
        return low, [max(first, min(c + n, extent)) for c, n, extent, first in dimensions]


# Of a swizzle's bytes: which of the bits from 4 on of an address change by those from 7 on.
_PATTERNS = {0: 0, 32: 1, 64: 3, 128: 7}


def swizzled(chunks: np.ndarray, swizzle_bytes: int) -> np.ndarray:
    """Chunk numbers under a swizzle of 0 (none), 32, 64 or 128 bytes.

    Bits 4 to 6 of an address change by bits 7 to 9 where it is 128; with 64 only two bits change,
    with 32 one.
    """
    return chunks ^ (chunks >> 3 & _PATTERNS[swizzle_bytes])


def _extent(array: np.ndarray) -> tuple[int, int]:
    """The bytes of an array's memory before and from element 0, as (-before, from)."""
    extents = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return sum(e for e in extents if e < 0), sum(e for e in extents if e > 0) + array.itemsize
