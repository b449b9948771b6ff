"""Ranks that are threads of one process: in the simulator, on one GPU, or on several."""

import queue
import threading

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Agreed, CommunicatorError


class _Meeting:
    """What the ranks of a group share."""

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout = size, timeout
        self.mail = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.barrier, self.board = threading.Barrier(size), [None] * size


class Local:
    """One rank of `local`; see `Communicator`."""

    def __init__(self, meeting: _Meeting, rank: int):
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self.agreed = Agreed()

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        mail = self._meeting.mail
        taken = []
        for array, peer in sends:
            done = threading.Event()
            mail[self.rank, peer].put((array, done))
            taken.append((done, peer))

        def wait() -> None:
            for into, peer in receives:
                try:
                    array, done = mail[peer, self.rank].get(timeout=self._meeting.timeout)
                except queue.Empty:
                    raise CommunicatorError(f"{what}: rank {peer} did not come") from None
                into[...] = array
                done.set()
            for done, peer in taken:
                if not done.wait(self._meeting.timeout):
                    raise CommunicatorError(f"{what}: rank {peer} did not come")

        return wait

    def all_gather(self, array, what):
        """See `Communicator`."""
        arrays = Arrays.of(array, "array")
        whole = arrays.empty((self.size, *array.shape), arrays.dtype_of(array))
        for rank, each in enumerate(self._post(array)):
            whole[rank] = each
        self._meeting.barrier.wait(self._meeting.timeout)
        return whole

    def agree(self, text):
        """See `Communicator`."""
        texts = list(self._post(text))
        self._meeting.barrier.wait(self._meeting.timeout)
        return None if len(set(texts)) == 1 else texts

    def _post(self, value) -> list:
        self._meeting.board[self.rank] = value
        self._meeting.barrier.wait(self._meeting.timeout)
        return self._meeting.board


def local(size: int, *, timeout: float = 300.0) -> tuple[Local, ...]:
    """Communicators of `size` ranks that are threads of this process, by rank."""
    meeting = _Meeting(size, timeout)
    return tuple(Local(meeting, rank) for rank in range(size))
