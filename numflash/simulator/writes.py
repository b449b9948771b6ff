"""What the blocks of a launch have written to global memory, and who may read it.

A block sees what another has written, and may write over it, after it has acquired what that block
released since, or what a block released that had acquired it (PTX ISA 8.8: causality order). Reads
and writes without that are errors, whichever comes first in this order of threads. Reductions may
meet reductions, and what many blocks release or acquire is theirs.

A block's threads are taken as one: barriers between who writes and who releases, and between who
acquires and who reads, are not followed. Followed are elements of pointers, loads and stores by
instructions, and bulk copies of consecutive bytes; not those of tensor maps.
"""

from collections.abc import Iterator

import numpy as np

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.memory import GlobalPointer

_PAGE = 4096


class Writes:
    """The last writer of each byte, and what each block has acquired.

    Args:
        positions: of the blocks, by their numbers.
    """

    def __init__(self, positions: list):
        self._positions = positions
        n = len(positions)
        # A time is that between two releases of a block: (block, how many came before). Bytes hold
        # the number of the time in which they were written, 0 for none in this launch.
        self._times: list[tuple[int, int]] = [(-1, 0)]
        self._now = [0] * n
        self._stored: dict[int, np.ndarray] = {}
        self._summed: dict[int, np.ndarray] = {}
        # By block: how many times of each block it has seen. Arrays are never changed.
        self._seen = [np.zeros(n, np.int64)] * n
        # By address: the time of a release, and what its block had seen with it.
        self._released: dict[int, tuple[int, np.ndarray]] = {}

    def seen_by(self, block: int) -> np.ndarray:
        """What a block has seen by now, for a copy that ends later."""
        return self._seen[block]

    def load(self, block: int, address: int, n_bytes: int) -> None:
        """A block reads. Raises SimulationError where others wrote what it does not see."""
        self._check("reads", block, address, n_bytes, self._seen[block], self._stored)
        self._check("reads", block, address, n_bytes, self._seen[block], self._summed)

    def store(self, block: int, address: int, n_bytes: int, seen=None) -> None:
        """A block writes; `seen` what it saw when it began. Raises SimulationError, as `load`."""
        seen = self._seen[block] if seen is None else seen
        self._check("writes", block, address, n_bytes, seen, self._stored)
        self._check("writes", block, address, n_bytes, seen, self._summed)
        self._enter(self._stored, block, address, n_bytes)

    def add(self, block: int, address: int, n_bytes: int, seen) -> None:
        """A block reduces. Raises SimulationError where others stored what it did not see."""
        self._check("adds to", block, address, n_bytes, seen, self._stored)
        self._enter(self._summed, block, address, n_bytes)

    def acquire(self, block: int, address: int, n_bytes: int = 4) -> None:
        """A block reads a word by an acquire."""
        found = self._synchronised(block, address, n_bytes)
        if found is not None:
            self._seen[block] = np.maximum(self._seen[block], found)

    def release(self, block: int, address: int, n_bytes: int = 4) -> None:
        """A block writes a word by a release."""
        self._synchronised(block, address, n_bytes)
        self._enter(self._stored, block, address, n_bytes)
        time = self._time(block)
        seen = self._seen[block].copy()
        seen[block] = self._times[time][1] + 1
        self._released[address] = time, seen
        self._seen[block], self._now[block] = seen, 0

    def meet(self, blocks: list[int]) -> None:
        """Each of these blocks releases what it has done, and acquires what the others have."""
        seen = np.maximum.reduce([self._seen[block] for block in blocks])
        for block in blocks:
            if self._now[block]:
                seen[block] += 1
                self._now[block] = 0
        for block in blocks:
            self._seen[block] = seen

    def _synchronised(self, block: int, address: int, n_bytes: int) -> np.ndarray | None:
        """What the release saw that wrote a word last; None where none in this launch did."""
        stamps = self._stored.get(address // _PAGE)
        time = 0 if stamps is None else stamps[address % _PAGE]
        released = self._released.get(address)
        if released and released[0] == time:
            return released[1]
        self.load(block, address, n_bytes)
        return None

    def _time(self, block: int) -> int:
        """The number of a block's time, which begins with its first write."""
        if not self._now[block]:
            self._now[block] = len(self._times)
            self._times.append((block, int(self._seen[block][block])))
        return self._now[block]

    def _enter(self, pages: dict, block: int, address: int, n_bytes: int) -> None:
        time = self._time(block)
        for page, part in _parts(address, n_bytes):
            if page not in pages:
                pages[page] = np.zeros(_PAGE, np.int32)
            pages[page][part] = time

    def _check(self, what, block: int, address: int, n_bytes: int, seen, pages: dict) -> None:
        for page, part in _parts(address, n_bytes):
            stamps = pages.get(page)
            if stamps is None:
                continue
            stamps = stamps[part]
            alike = (stamps == stamps[0]).all()
            for time in set((stamps[:1] if alike else stamps).tolist()):
                writer, number = self._times[time]
                if writer not in (-1, block) and number >= seen[writer]:
                    raise SimulationError(
                        f"block {self._positions[block]} {what} what block "
                        f"{self._positions[writer]} has written in this launch, and has not "
                        "acquired a release that came after it"
                    )


def _parts(address: int, n_bytes: int) -> Iterator[tuple[int, slice]]:
    """The pages of a range of bytes, and which of their bytes are in it."""
    end = address + n_bytes
    while address < end:
        first = address % _PAGE
        last = min(_PAGE, first + end - address)
        yield address // _PAGE, slice(first, last)
        address += last - first


class WatchedPointer(GlobalPointer):
    """A pointer of a launch whose blocks run together: `Writes` hears of what they do."""

    __slots__ = ()

    def __init__(self, pointer: GlobalPointer):
        for name in GlobalPointer.__slots__:
            setattr(self, name, getattr(pointer, name))

    def __getitem__(self, offset):
        return self._one("load", offset)[0]

    def __setitem__(self, offset, value):
        self._one("store", offset)[0] = value

    def acquire(self, offset):
        """See `GlobalPointer.acquire`."""
        return self._one("acquire", offset)[0]

    def release(self, offset, value) -> None:
        """See `GlobalPointer.release`."""
        self._one("release", offset)[0] = value

    def block(
        self, offset: int, n_bytes: int, alignment: int | None = None, access: str = "load"
    ) -> np.ndarray:
        """See `GlobalPointer.block`."""
        found = super().block(offset, n_bytes, alignment)
        if access != "none":
            self._tell(access, self._position(offset), n_bytes)
        return found

    def _one(self, access: str, offset) -> np.ndarray:
        """Element `offset`, which is accessed in this way, as an array."""
        position = self._position(offset)
        self._tell(access, position, self.flat.itemsize)
        return self.flat[position : position + 1]

    def _tell(self, access: str, position: int, n_bytes: int) -> None:
        block = current_thread().block
        address = self._address + position * self.flat.itemsize
        getattr(block.writes, access)(block.number, address, n_bytes)
