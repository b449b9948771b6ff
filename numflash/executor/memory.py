"""The memory of a block's loads and stores: each address space, with its bounds.

Addresses are those of the host's memory for global arrays. Variables in constant and global
memory, and the windows through which generic addresses reach shared and local memory and the
parameters, lie where no array of the host does.
"""

import bisect
import math
from collections.abc import Callable

import numpy as np

from numflash.executor.types import BITS
from numflash.simulator.memory import POISON, bytes_between

SHARED_WINDOW = 1 << 40
LOCAL_WINDOW = 1 << 41
PARAMETER_WINDOW = 1 << 42
CONSTANTS = 1 << 43
_WINDOW_BYTES = 1 << 32
RANK_BYTES = 1 << 24
"""From the shared memory of a block to that of the next rank, as in addresses of sm_90."""

WINDOWS = {
    "global": 0,
    "const": 0,
    "param": PARAMETER_WINDOW,
    "shared::cluster": SHARED_WINDOW,
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
}
"""The offset that makes an address in a space generic.

That of a block's shared memory is its address in the cluster's.
"""


class Region:
    """Consecutive bytes at an address."""

    def __init__(self, name: str, start: int, content: np.ndarray, writeable: bool = True):
        self.name, self.start, self.bytes, self.writeable = name, start, content, writeable
        self.end = start + content.size
        self._views: dict[tuple, tuple[int, np.ndarray]] = {}

    def view(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """(address of its first row, (n, count) elements of `size` bytes)."""
        key = size, count
        if key not in self._views:
            row = size * count
            skipped = min(-self.start % row, self.bytes.size)
            whole = (self.bytes.size - skipped) // row * row
            rows = self.bytes[skipped : skipped + whole].view(BITS[size]).reshape(-1, count)
            self._views[key] = self.start + skipped, rows
        return self._views[key]

    def __str__(self) -> str:
        return f"{self.name} ({self.start:#x} to {self.end - 1:#x})"


def array_region(name: str, array: np.ndarray) -> Region:
    """The memory from the first to the last element of an array of any strides."""
    extents = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low = sum(extent for extent in extents if extent < 0)
    high = sum(extent for extent in extents if extent > 0) + array.itemsize
    if not math.prod(array.shape):
        low = high = 0
    start = array.__array_interface__["data"][0] + low
    return Region(name, start, bytes_between(array, low, high), array.flags.writeable)


class Memory:
    """All memory that a block can reach but local memory, which is each lane's.

    Args:
        global_regions, shared, parameters, constants: the block's own.
        reach: gives the shared memory of another rank; None where the cluster has no such.
    """

    def __init__(
        self, global_regions: list[Region], shared: Region, parameters, constants, reach: Callable
    ):
        self.shared, self.parameters, self.constants = shared, parameters, constants
        self._reach = reach
        self.globals = sorted([*global_regions, constants], key=lambda region: region.start)
        self._starts = [region.start for region in self.globals]

    def find(self, space: str, low: int, n_bytes: int) -> Region:
        """The region of a space that holds n_bytes at an address.

        Raises IndexError, and what `Block.reach` does of another block's shared memory.
        """
        regions = self._regions(space, low)
        if regions is self.globals:
            # Arrays may overlap, as views of one: the last that begins before holds it or not.
            regions = regions[: bisect.bisect_right(self._starts, low)]
        for region in reversed(regions):
            if region.start <= low and low + n_bytes <= region.end:
                return region
        named = ", ".join(str(each) for each in self._regions(space, low) if each.bytes.size)
        raise IndexError(
            f"{n_bytes} bytes at {space.split('::')[0]} address {low:#x} lie outside every array: "
            f"{named or 'there is none'}"
        )

    def _regions(self, space: str, address: int) -> list[Region]:
        """Those of a space, or those that an address may be in."""
        if space == "shared":
            return [self.shared]
        if space == "shared::cluster":
            rank = address // RANK_BYTES
            is_own = rank == self.shared.start // RANK_BYTES
            return [self.shared if is_own else self._reach(rank) or self.shared]
        return [self.parameters] if space == "param" else self.globals


def space_of(address: int) -> tuple[str, int]:
    """(space, start of its window) of a generic address."""
    for space, start in WINDOWS.items():
        if start and start <= address < start + _WINDOW_BYTES:
            return space, start
    return "global", 0


def poisoned(n_bytes: int) -> np.ndarray:
    """Bytes that nothing has written yet."""
    return np.full(n_bytes, POISON, np.uint8)
