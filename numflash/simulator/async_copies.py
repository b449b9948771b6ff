"""Asynchronous copies of threads (`cp.async`): bytes that no thread may touch until the wait.

The hardware orders copies neither among each other nor with stores: a copy may arrive at any time
between its issue and the end of its thread's wait. Here the bytes hold 0xFF meanwhile. Another
write to them then, by a copy of any thread or a store, is an error, and so is a copy that no
thread waits for: it could arrive on top of later data.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.memory import POISON
from numflash.simulator.parts import Part

_POISON_BYTE = bytes([POISON])


@dataclass(eq=False, slots=True)
class _Copy:
    """One copy under way: the bytes it writes, and those it reads, behind which come zeros.

    `group` counts the groups that its thread had committed before it was issued.
    """

    thread: int
    group: int
    address: int
    target: np.ndarray
    origin: np.ndarray

    def __str__(self) -> str:
        end = self.address + self.target.size - 1
        return (
            f"a cp.async of thread {self.thread}, in its group {self.group}, to shared bytes "
            f"{self.address:#x} to {end:#x}"
        )


@dataclass(eq=False, slots=True)
class _Copies:
    """The copies of a thread: those of no group yet, and the groups it has not waited for."""

    issued: list[_Copy] = field(default_factory=list)
    groups: list[list[_Copy]] = field(default_factory=list)
    num_committed: int = 0


class AsyncCopies(Part):
    """The asynchronous copies of a block."""

    def __init__(self, block):
        super().__init__(block)
        self._threads: dict[int, _Copies] = defaultdict(_Copies)
        # By the numbers of the words that they write.
        self._under_way: dict[int, _Copy] = {}

    def issue(self, array, offset: int, n_bytes: int, origin: np.ndarray) -> None:
        """Begin to copy `origin`, then zeros, to n_bytes at element `offset` of `array`."""
        thread = current_thread().index
        copies = self._threads[thread]
        address = self.block.shared.address(array, offset)
        target = self.block.shared.bytes[address : address + n_bytes]
        copy = _Copy(thread, copies.num_committed, address, target, origin)
        for word in range(address // 4, (address + n_bytes) // 4):
            other = self._under_way.get(word)
            if other is not None:
                raise SimulationError(
                    f"{copy} is issued while {other} is under way: they may arrive in any order. "
                    f"Thread {other.thread} must have waited for its copy before"
                )
            self._under_way[word] = copy
        target[:] = POISON
        copies.issued.append(copy)

    def commit(self) -> None:
        """Make a group of the copies that the running thread issued since the last one."""
        copies = self._threads[current_thread().index]
        copies.groups.append(copies.issued)
        copies.num_committed += 1
        copies.issued = []

    def wait(self, pending: int) -> None:
        """Deliver all groups of the running thread but the newest `pending`."""
        groups = self._threads[current_thread().index].groups
        arriving = max(0, len(groups) - pending)
        for group in groups[:arriving]:
            for copy in group:
                self._deliver(copy)
        del groups[:arriving]

    def finish(self) -> None:
        """Refuse copies that were not waited for."""
        for copy in self._under_way.values():
            raise SimulationError(
                f"block {tuple(self.block.blockIdx)} ended and {copy} has not been waited for"
            )

    def _deliver(self, copy: _Copy) -> None:
        target = copy.target
        if target.tobytes().strip(_POISON_BYTE):
            raise SimulationError(
                f"what {copy} writes was also written by something else between its issue and the "
                "wait for it: which of them is last is not known"
            )
        for word in range(copy.address // 4, (copy.address + target.size) // 4):
            del self._under_way[word]
        target[: copy.origin.size] = copy.origin
        target[copy.origin.size :] = 0
