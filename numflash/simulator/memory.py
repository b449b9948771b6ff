"""Simulated memory: poisoned when it begins, checked when it is touched.

Shared and local memory start as 0xFF bytes, which is NaN in every floating-point format, so that
what a kernel reads before it wrote shows in the result. Global arrays are reached through
`GlobalPointer`, which refuses to leave the array.
"""

import math
import sys
from functools import cache

import numpy as np
from numba.core import types
from numba.np import numpy_support

from numflash.simulator.errors import SimulationError

POISON = 0xFF
# The hardware keeps the first kilobyte of shared memory; a block's part begins aligned.
_SHARED_START = 1024
_STATIC_BYTES = 48 * 1024
_MOST_STARTS = 64


@cache
def numpy_dtype(dtype) -> np.dtype:
    """The NumPy dtype of what a kernel may name as an array's dtype: a Numba type or NumPy's."""
    if isinstance(dtype, types.Type):
        return _NARROW_FLOATS.get(str(dtype)) or np.dtype(numpy_support.as_dtype(dtype))
    return np.dtype(dtype)


def _narrow_floats() -> dict[str, np.dtype]:
    import ml_dtypes

    return {
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "__nv_bfloat16": np.dtype(ml_dtypes.bfloat16),
        "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
        "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    }


_NARROW_FLOATS = _narrow_floats()


class SharedMemory:
    """The shared memory of one block: a dynamic part, and behind it statically declared arrays.

    Attributes:
        bytes: all of it; the index of a byte is its 32-bit address.
        dynamic: the dynamic part, whose address is a multiple of 1024.
    """

    def __init__(self, dynamic_bytes: int):
        end = _SHARED_START + dynamic_bytes
        size = -(-end // _SHARED_START) * _SHARED_START + _STATIC_BYTES
        room = np.full(size + _SHARED_START, POISON, np.uint8)
        skipped = -room.__array_interface__["data"][0] % _SHARED_START
        self.bytes = room[skipped : skipped + size]
        self.dynamic = self.bytes[_SHARED_START:end]
        self._base = self.bytes.__array_interface__["data"][0]
        self._first_free = size - _STATIC_BYTES
        self._static: dict[tuple, np.ndarray] = {}
        self._typed: dict[np.dtype, np.ndarray] = {}
        # By its id: an array, which the entry keeps alive, and its first byte.
        self._starts: dict[int, tuple[np.ndarray, int]] = {}

    def array(self, shape, dtype, alignment=None, *, site) -> np.ndarray:
        """`cuda.shared.array`. `site` tells declarations apart; shape 0 is the dynamic part."""
        dtype = numpy_dtype(dtype)
        if shape == 0:
            if dtype not in self._typed:
                whole_elements = self.dynamic.size // dtype.itemsize * dtype.itemsize
                self._typed[dtype] = self.dynamic[:whole_elements].view(dtype)
            return self._typed[dtype]
        # Functions of one factory share their code, not their arrays.
        key = (site, shape, dtype)
        if key not in self._static:
            self._static[key] = self._declare(shape, dtype, alignment or 16)
        return self._static[key]

    def _declare(self, shape, dtype, alignment) -> np.ndarray:
        start = -(-self._first_free // alignment) * alignment
        end = start + math.prod(shape if isinstance(shape, tuple) else (shape,)) * dtype.itemsize
        if end > self.bytes.size:
            raise SimulationError(
                f"shared memory: more than {_STATIC_BYTES} bytes in arrays of fixed size"
            )
        self._first_free = end
        return self.bytes[start:end].view(dtype).reshape(shape)

    def address(self, array: np.ndarray, index: int) -> int:
        """The 32-bit address of element `index` of an array in shared memory, in bytes.

        Raises:
            SimulationError: the array lies elsewhere.
            IndexError: it has no such element.
        """
        known = self._starts.get(id(array))
        start = self._find(array) if known is None else known[1]
        if not 0 <= index <= array.size:
            raise IndexError(f"shared memory: element {index} of {array.size}")
        return start + int(index) * array.itemsize

    def _find(self, array: np.ndarray) -> int:
        """The address of an array's first byte, remembered: NumPy is slow to say it."""
        start = array.__array_interface__["data"][0] - self._base
        if not 0 <= start <= self.bytes.size:
            raise SimulationError("an array that is not in shared memory is used as if it were")
        if len(self._starts) == _MOST_STARTS:
            self._starts.clear()
        self._starts[id(array)] = array, start
        return start

    def check_range(self, what: str, address: int, n_bytes: int, alignment: int) -> None:
        """Raise SimulationError where n_bytes at `address` are misaligned or lie outside."""
        if address % alignment:
            raise SimulationError(
                f"{what}: shared address {address:#x} is not a multiple of {alignment} bytes"
            )
        end = address + n_bytes
        in_dynamic = address >= _SHARED_START and end <= _SHARED_START + self.dynamic.size
        in_static = self.bytes.size - _STATIC_BYTES <= address and end <= self._first_free
        if not (in_dynamic or in_static):
            raise SimulationError(
                f"{what}: bytes {address:#x} to {address + n_bytes - 1:#x} lie outside the "
                "block's shared memory"
            )


def calling_site(depth: int) -> tuple:
    """The instruction that calls, not only its line: a line can declare two arrays."""
    frame = sys._getframe(depth + 1)
    return frame.f_code, frame.f_lasti


class GlobalPointer:
    """A `Pointer` kernel parameter: element 0 of `array`, whose strides may have any sign.

    Offsets are in elements, as in `pointer[offset]`. Touching memory outside the smallest range
    that holds the array raises IndexError.
    """

    __slots__ = ("flat", "base", "name", "_bytes", "_address")

    def __init__(self, array: np.ndarray, storage: np.dtype, name: str = "array"):
        itemsize = array.itemsize
        extents = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        low = sum(extent for extent in extents if extent < 0)
        high = sum(extent for extent in extents if extent > 0) + itemsize
        if array.size == 0:
            low = high = 0
        self.base = -low // itemsize
        self.name = name
        self._bytes = bytes_between(array, low, high)
        self._address = self._bytes.__array_interface__["data"][0]
        self.flat = self._bytes.view(storage)

    def _position(self, offset: int, count: int = 1) -> int:
        position = self.base + int(offset)
        if position < 0 or position + count > self.flat.size:
            raise IndexError(
                f"{self.name}: elements {offset} to {offset + count - 1} lie outside the array "
                f"(elements {-self.base} to {self.flat.size - self.base - 1})"
            )
        return position

    def __getitem__(self, offset):
        return self.flat[self._position(offset)]

    def __setitem__(self, offset, value):
        self.flat[self._position(offset)] = value

    def acquire(self, offset):
        """Element `offset`, by a load that acquires."""
        return self[offset]

    def release(self, offset, value) -> None:
        """Element `offset` = value, by a store that releases."""
        self[offset] = value

    def block(
        self, offset: int, n_bytes: int, alignment: int | None = None, access: str = "load"
    ) -> np.ndarray:
        """The n_bytes at element `offset` as bytes, for one vector access.

        `access` is what happens to them at once: "load", "store", or "none" for what has an order
        of its own, copies that write and reductions.

        Raises:
            ValueError: the address is not a multiple of the alignment, n_bytes by default, which
                faults on the hardware.
        """
        alignment, itemsize = alignment or n_bytes, self.flat.itemsize
        first = self._position(offset, -(-n_bytes // itemsize)) * itemsize
        if (self._address + first) % alignment:
            raise ValueError(
                f"{self.name}: a {alignment}-byte access at element {offset} is misaligned"
            )
        return self._bytes[first : first + n_bytes]


def bytes_between(array: np.ndarray, low: int, high: int) -> np.ndarray:
    """The memory from `low` to `high` bytes around element 0 of `array`, as a flat byte array."""

    class Window:
        owner = array
        __array_interface__ = {
            "shape": (high - low,),
            "typestr": "|u1",
            "data": (array.__array_interface__["data"][0] + low, not array.flags.writeable),
            "version": 3,
        }

    return np.asarray(Window())
