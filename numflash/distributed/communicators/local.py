"""Ranks that are threads of one process: in the simulator, on one GPU, or on several.

Who posts the second end of a message copies it, so that a message needs no wait of the other
rank, and on GPUs nobody waits for one: streams wait for events (`ordering`). Threads wait for each
other where a rank's wait comes before the other rank has posted its end.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Agreed, CommunicatorError
from numflash.distributed.communicators.ordering import Ordering


@dataclass
class _End:
    """One rank's end of a message.

    Attributes:
        rank, what: whose, and in which step.
        array: of bytes, that are sent or filled.
        mark: behind what the array needs first.
    """

    rank: int
    what: str
    array: Any
    mark: Any


class _Message:
    """Two ends, of which the second may be missing yet.

    Attributes:
        ends: the sender's and the receiver's, until it is done.
        is_done: whether it was copied, or on GPUs the copy is on its way.
        mark: behind the copy.
    """

    def __init__(self):
        self.ends: list[_End | None] = [None, None]
        self.is_done, self.mark = False, None


class _Meeting:
    """What the ranks of a group share.

    Attributes:
        changed: guards the rest, and is notified of each change.
        fault: why the group cannot be used any more, or None.
        texts: of a round of agreement, by its number and the rank.
    """

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.fault: str | None = None
        self.texts: dict[int, dict[int, str]] = defaultdict(dict)
        # By (sender, receiver): those with one end, all of them of the same side.
        self._halves: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)

    def post(self, place: tuple[int, int], side: int, end: _End) -> tuple[_Message, bool]:
        """The message that an end belongs to, and whether this is its second end."""
        with self.changed:
            halves = self._halves[place]
            if halves and halves[0].ends[side] is None:
                message, is_second = halves.popleft(), True
            else:
                message, is_second = _Message(), False
                halves.append(message)
            message.ends[side] = end
        return message, is_second

    def finish(self, message: _Message, mark: Any) -> None:
        """Say that a message is copied."""
        with self.changed:
            # Each rank keeps its own array until its wait: none holds another's memory.
            message.ends.clear()
            message.mark, message.is_done = mark, True
            self.changed.notify_all()

    def break_off(self, why: str) -> None:
        """Say that the group cannot be used any more: the first reason stays."""
        with self.changed:
            self.fault = self.fault or why
            self.changed.notify_all()

    def wait_for(self, is_so: Callable[[], bool], deadline: float) -> bool:
        """Wait until it is so, the group is broken or the deadline is over; whether it is so."""
        with self.changed:
            left = max(0.0, deadline - time.monotonic())
            self.changed.wait_for(lambda: is_so() or self.fault is not None, left)
            return is_so()


class Local:
    """One rank of `local`; see `Communicator`."""

    def __init__(self, meeting: _Meeting, rank: int):
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self._ordering, self._rounds = Ordering(), 0
        self.agreed = Agreed()

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        self._expect_no_fault(what)
        mine = []
        for side, ends in enumerate((sends, receives)):
            for array, peer in ends:
                if not 0 <= peer < self.size:
                    raise ValueError(f"{what}: no rank {peer} among {self.size}")
                place = (self.rank, peer) if side == 0 else (peer, self.rank)
                end = _End(self.rank, what, array, self._ordering.of(array).mark(array))
                message, is_second = self._meeting.post(place, side, end)
                if is_second:
                    self._copy(message)
                mine.append((message, side, end, peer))

        def wait() -> None:
            deadline = time.monotonic() + self._meeting.timeout
            while mine:
                self._await(*mine[0], deadline)
                del mine[0]

        return wait

    def all_gather(self, array, what):
        """See `Communicator`."""
        arrays = Arrays.of(array, "array")
        whole = arrays.empty((self.size, *array.shape), arrays.dtype_of(array))
        whole[self.rank] = array
        others = [rank for rank in range(self.size) if rank != self.rank]
        own = arrays.as_bytes(arrays.contiguous(array))
        sends = [(own, rank) for rank in others]
        receives = [(arrays.as_bytes(whole[rank]), rank) for rank in others]
        self.exchange(sends, receives, what)()
        return whole

    def agree(self, text):
        """See `Communicator`."""
        what, meeting = "the agreement of ranks", self._meeting
        self._expect_no_fault(what)
        self._rounds += 1
        with meeting.changed:
            texts = meeting.texts[self._rounds]
            texts[self.rank] = text
            meeting.texts.pop(self._rounds - 2, None)  # all have left it: they are in a later one
            meeting.changed.notify_all()
        deadline = time.monotonic() + meeting.timeout
        if not meeting.wait_for(lambda: len(texts) == self.size, deadline):
            self._expect_no_fault(what)
            absent = [str(rank) for rank in range(self.size) if rank not in texts]
            who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent)}"
            raise self._fault(f"{what}: {who} did not come within {meeting.timeout:g} s")
        by_rank = [texts[rank] for rank in range(self.size)]
        return None if len(set(by_rank)) == 1 else by_rank

    def abandon(self, why: str) -> None:
        """Tell the others that this rank has left, so that they need not wait for the deadline."""
        self._meeting.break_off(f"rank {self.rank} left: {why}")

    def _copy(self, message: _Message) -> None:
        source, target = message.ends
        sizes = source.array.nbytes, target.array.nbytes
        if sizes[0] != sizes[1]:
            raise self._fault(
                f"{target.what}: rank {source.rank} sends {sizes[0]} bytes (in {source.what}) and "
                f"rank {target.rank} receives {sizes[1]}"
            )
        with self._faults(target.what):
            ordering = self._ordering.of(target.array)
            mark = ordering.copy(target.array, source.array, (source.mark, target.mark))
        del source, target
        self._meeting.finish(message, mark)

    def _await(self, message: _Message, side: int, end: _End, peer: int, deadline: float) -> None:
        meeting, n_bytes = self._meeting, end.array.nbytes
        if not meeting.wait_for(lambda: message.is_done, deadline):
            self._expect_no_fault(end.what)
            does = f"taken {n_bytes} bytes of" if side == 0 else f"sent {n_bytes} bytes to"
            raise self._fault(
                f"{end.what}: rank {peer} has not {does} rank {self.rank} within "
                f"{meeting.timeout:g} s"
            )
        self._ordering.of(end.array).wait(end.array, message.mark)

    def _expect_no_fault(self, what: str) -> None:
        if (fault := self._meeting.fault) is not None:
            raise CommunicatorError(
                f"{what}: the communicator cannot be used any more after a fault: {fault}"
            )

    def _fault(self, text: str) -> CommunicatorError:
        """The error of a fault, after which no rank can use the group."""
        self._meeting.break_off(f"on rank {self.rank}, {text}")
        return CommunicatorError(text)

    @contextmanager
    def _faults(self, what: str):
        try:
            yield
        except Exception as error:
            raise self._fault(f"{what}: {type(error).__name__}: {error}") from error


def local(size: int, *, timeout: float = 300.0) -> tuple[Local, ...]:
    """Communicators of ranks that are threads of this process, by rank.

    For the simulator, for several ranks on one GPU, and for several GPUs in one process. Each rank
    is called from a thread of its own. A fault of one rank is one of all: after it each call on
    each rank raises.

    Args:
        size: how many ranks.
        timeout: seconds that a rank waits for another before it raises CommunicatorError.

    Raises:
        ValueError: fewer than one rank, no time.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from numflash.distributed import local
        >>> def work(comm):
        ...     return comm.agree("causal" if comm.rank else "full")
        >>> with ThreadPoolExecutor(2) as pool:
        ...     print(*pool.map(work, local(2)))
        ['full', 'causal'] ['full', 'causal']
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    meeting = _Meeting(size, timeout)
    return tuple(Local(meeting, rank) for rank in range(size))
