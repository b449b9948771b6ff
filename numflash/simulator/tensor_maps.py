"""Tensor maps as bulk copies read them: which bytes of a tensor a tile is."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from numflash.problem.tensor_maps import TensorLayout
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
        array: element 0 is the first of the tensor; no tile leaves the array's memory.
        layout: the rest of the map.

    Raises:
        ValueError: a tensor that the driver refuses, or one that leaves the array.
    """

    alignment = 128
    """Of a tile in shared memory, in bytes."""

    def __init__(self, array: np.ndarray, layout: TensorLayout):
        self.layout, self.dtype = layout, _DTYPES[layout.dtype]
        self.item_bytes = self.dtype.itemsize
        self.rank = len(layout.extents)
        self.n_bytes = math.prod(layout.box) * self.item_bytes
        strides = (self.item_bytes, *layout.strides)
        self._check(array, strides)
        last = sum((n - 1) * s for n, s in zip(layout.extents, strides, strict=True))
        below, above = _extent(array)
        if last + self.item_bytes > above:
            raise ValueError(
                f"a tensor map leaves its array: the last element is {last} bytes behind the "
                f"first, the array has {above} there"
            )
        flat = bytes_between(array, below, above)[-below:]
        # In the order of NumPy: the slowest dimension first.
        self._tensor = np.lib.stride_tricks.as_strided(
            flat[: len(flat) // self.item_bytes * self.item_bytes].view(f"V{self.item_bytes}"),
            layout.extents[::-1],
            strides[::-1],
        )

    def _check(self, array, strides) -> None:
        layout = self.layout
        if not 1 <= self.rank <= 5 or len(strides) != self.rank or len(layout.box) != self.rank:
            raise ValueError(f"a tensor map of {layout}: one to five dimensions, a stride fewer")
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

    def read(self, coordinates: tuple[int, ...]) -> np.ndarray:
        """The tile at `coordinates`, (chunks, 16) bytes, zeros outside the tensor."""
        tile = np.zeros(self.layout.box[::-1], f"V{self.item_bytes}")
        inside, elements = self._overlap(coordinates)
        tile[inside] = self._tensor[elements]
        return tile.reshape(-1).view(np.uint8).reshape(-1, _CHUNK)

    def write(
        self, coordinates: tuple[int, ...], chunks: np.ndarray, combine: Callable | None = None
    ) -> None:
        """Write the tile but what lies outside the tensor, or combine it with what is there."""
        tile = chunks.reshape(-1).view(f"V{self.item_bytes}").reshape(self.layout.box[::-1])
        inside, elements = self._overlap(coordinates)
        if combine is None:
            self._tensor[elements] = tile[inside]
        else:
            tensor, given = self._tensor.view(self.dtype), tile[inside].reshape(-1)
            held = tensor[elements]
            tensor[elements] = combine(held.reshape(-1), given.view(self.dtype)).reshape(
                held.shape
            )

    def _overlap(self, coordinates):
        """Index of the part inside the tensor, in the tile and in the tensor."""
        inside, elements = [], []
        dimensions = zip(coordinates, self.layout.box, self.layout.extents, strict=True)
        for first, n, extent in dimensions:
            low, high = max(0, first), min(first + n, extent)
            high = max(low, high)
            inside.insert(0, slice(low - first, high - first))
            elements.insert(0, slice(low, high))
        return tuple(inside), tuple(elements)


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
