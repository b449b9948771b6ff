"""mbarriers: phases that end when threads have arrived and bytes have been delivered.

A thread that waits looks again when it is resumed, as a loop of `try_wait` does: where two phases
have ended meanwhile it goes on waiting.
"""

from dataclasses import dataclass, field

import numpy as np

from numflash.simulator.engine import Thread, current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.memory import POISON
from numflash.simulator.parts import Part
from numflash.simulator.waiting import who_waits

_MAX_COUNT = (1 << 20) - 1
# An mbarrier's own bytes hold this, so that a write over them is found.
_CONTENT = np.frombuffer(b"mbarrier", np.uint8)


@dataclass(eq=False, slots=True)
class Mbarrier:
    """One mbarrier. `bytes` counts those announced less those delivered."""

    address: int
    index: int
    count: int
    made_by: int
    pending: int
    bytes: int = 0
    phase: int = 0
    visible_to_copies: bool = False
    # Bytes delivered in this phase, and in earlier ones that nobody has waited for.
    delivered: int = 0
    unseen: int = 0
    waiting: list[Thread] = field(default_factory=list)

    def __str__(self) -> str:
        return f"mbarrier {self.index} (shared address {self.address:#x})"

    def what_it_lacks(self) -> str:
        """The arrivals and bytes that the current phase still waits for, in words."""
        return (
            f"{self}: phase {self.phase} (parity {self.phase % 2}) lacks "
            f"{self.pending} of {self.count} arrivals and {self.bytes} bytes"
        )


class Mbarriers(Part):
    """The mbarriers of a block."""

    def __init__(self, block):
        super().__init__(block)
        self._by_address: dict[int, Mbarrier] = {}

    def init(self, array, index: int, count: int) -> None:
        """Make element `index` of `array` an mbarrier for `count` arrivals a phase."""
        address, index, count = self.block.shared.address(array, index), int(index), int(count)
        self.block.shared.check_range("mbarrier_init", address, 8, 8)
        if not 1 <= count <= _MAX_COUNT:
            raise SimulationError(f"mbarrier_init: a count of {count}, not 1 to 2 ** 20 - 1")
        if address in self._by_address:
            raise SimulationError(f"{self._by_address[address]} is initialised twice")
        made_by = current_thread().index
        self._by_address[address] = Mbarrier(address, index, count, made_by, pending=count)
        self._content(address)[:] = _CONTENT

    def invalidate(self, array, index: int) -> None:
        """Give the bytes of an mbarrier back for any use, another mbarrier included."""
        barrier = self.find(array, index)
        if barrier.bytes or barrier.waiting:
            raise SimulationError(f"mbarrier.inval while it is used: {barrier.what_it_lacks()}")
        self._refuse_unseen(barrier, "mbarrier.inval")
        del self._by_address[barrier.address]
        self._content(barrier.address)[:] = POISON

    def fence_init(self) -> None:
        """Copies see the mbarriers that the running thread has initialised."""
        thread = current_thread().index
        for barrier in self._by_address.values():
            if barrier.made_by == thread:
                barrier.visible_to_copies = True

    def find(self, array, index: int) -> Mbarrier:
        """The mbarrier that is element `index` of `array`. Raises SimulationError."""
        return self.find_at(self.block.shared.address(array, index), index)

    def find_at(self, address: int, index: int) -> Mbarrier:
        """The mbarrier at a shared address, which a kernel calls element `index`.

        Raises SimulationError.
        """
        barrier = self._by_address.get(address)
        if barrier is None:
            raise SimulationError(
                f"element {index} at shared address {address:#x} of block "
                f"{tuple(self.block.blockIdx)} is used as an mbarrier, but mbarrier_init has not "
                "made it one; or a barrier after it is missing"
            )
        if self._content(address).tobytes() != _CONTENT.tobytes():
            raise SimulationError(f"the bytes of {barrier} have been written over")
        return barrier

    def arrive(self, array, index: int, n_bytes: int = 0) -> None:
        """Announce n_bytes, and arrive once."""
        self.arrive_at(self.find(array, index), int(n_bytes))

    def arrive_at(self, barrier: Mbarrier, n_bytes: int = 0) -> None:
        """Announce n_bytes to an mbarrier, and arrive once."""
        if barrier.pending == 0:
            raise SimulationError(
                f"{barrier}: one arrival more than its count of {barrier.count} in phase "
                f"{barrier.phase}, which still waits for {barrier.bytes} bytes"
            )
        if barrier.bytes + n_bytes > _MAX_COUNT:
            raise SimulationError(f"{barrier}: more than 2 ** 20 - 1 bytes pending")
        barrier.bytes += n_bytes
        barrier.pending -= 1
        self._end_phase_if_complete(barrier)

    def deliver(self, barrier: Mbarrier, n_bytes: int) -> None:
        """A copy has brought n_bytes, announced or not yet."""
        if barrier.bytes - n_bytes < -_MAX_COUNT:
            raise SimulationError(f"{barrier}: more than 2 ** 20 - 1 bytes that none announced")
        barrier.bytes -= n_bytes
        barrier.delivered += n_bytes
        self._end_phase_if_complete(barrier)

    def wait(self, array, index: int, parity: int, hasten=None) -> None:
        """Return when the phase of this parity is the last that ended.

        `hasten(barrier)` is called before the thread is suspended, if it has to be.
        """
        while not self.test(array, index, parity, hasten):
            self.find(array, index).waiting.append(current_thread())
            self.block.park()
            hasten = None

    def test(self, array, index: int, parity: int, hasten=None) -> bool:
        """Whether the phase of this parity is the last that ended, as `try_wait` says it.

        `hasten(barrier)` is called before, where it is not.
        """
        if parity not in (0, 1):
            raise SimulationError(f"mbarrier_wait_parity: a parity of {parity}; it is 0 or 1")
        barrier = self.find(array, index)
        if hasten is not None and barrier.phase % 2 == parity:
            hasten(barrier)
        if barrier.phase % 2 == parity:
            return False
        barrier.unseen = 0
        return True

    def report(self) -> list[str]:
        """The threads that wait, and what each barrier lacks."""
        lines = []
        for barrier in self._by_address.values():
            if barrier.waiting:
                lines.append(f"  {barrier.what_it_lacks()}")
                lines += who_waits(barrier.waiting)
        return lines

    def finish(self) -> None:
        """Refuse bytes that nobody has waited for."""
        for barrier in self._by_address.values():
            self._refuse_unseen(barrier, f"block {tuple(self.block.blockIdx)} ended")

    @staticmethod
    def _refuse_unseen(barrier: Mbarrier, when: str) -> None:
        if n_bytes := barrier.unseen + barrier.delivered:
            raise SimulationError(
                f"{when} and nobody has waited for the last {n_bytes} bytes that {barrier} counted"
            )

    def _content(self, address: int) -> np.ndarray:
        return self.block.shared.bytes[address : address + 8]

    def _end_phase_if_complete(self, barrier: Mbarrier) -> None:
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.pending = barrier.count
        barrier.unseen += barrier.delivered
        barrier.delivered = 0
        woken, barrier.waiting = barrier.waiting, []
        for thread in woken:
            self.block.wake(thread)
