"""Ranks as threads of this process."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numflash.distributed.communicators.local import local


def on_ranks(size: int, work: Callable[[Any], Any], comms=None, timeout: float = 300.0) -> list:
    """What `work(comm)` returned on each rank, by rank.

    Raises:
        the first error, by rank, that is not the consequence of another rank's end.
    """
    comms = local(size, timeout=timeout) if comms is None else comms
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(comms[rank])
        except BaseException as error:
            errors[rank] = error
            if hasattr(comms[rank], "abandon"):
                comms[rank].abandon(repr(error))  # so that nobody waits for the deadline

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 30)
    raised = [error for error in errors if error is not None]
    if raised:
        ours = [error for error in raised if type(error).__name__ != "CommunicatorError"]
        raise (ours or raised)[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


class Late:
    """A rank whose messages are delivered by a thread of its own, each after a random time.

    As on a GPU: what is posted is done in that order, while the caller goes on. Messages may read
    what is sent long after they were posted, and write what is received long before the wait.
    """

    def __init__(self, comm, seed: int, longest: float = 0.01):
        self._comm, self.rank, self.size, self.agreed = comm, comm.rank, comm.size, comm.agreed
        self._random, self._longest = random.Random(seed * comm.size + comm.rank), longest
        self._worker = ThreadPoolExecutor(1)

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        for array, _ in receives:
            array[...] = 0xFF  # NaN until it arrives, in any of the dtypes that travel
        delays = [self._random.random() * self._longest for _ in range(2)]

        def deliver() -> None:
            time.sleep(delays[0])
            wait = self._comm.exchange(sends, receives, what)
            time.sleep(delays[1])
            wait()

        return self._worker.submit(deliver).result

    def all_gather(self, array, what):
        """See `Communicator`."""
        return self._worker.submit(self._comm.all_gather, array, what).result()

    def agree(self, text):
        """See `Communicator`."""
        return self._worker.submit(self._comm.agree, text).result()


def late(size: int, seed: int, timeout: float = 300.0) -> list[Late]:
    """Communicators of `size` ranks, by rank; seeds differ in when messages come."""
    return [Late(comm, seed) for comm in local(size, timeout=timeout)]


def grid(within: int, across: int, make: Callable[[int], Sequence] = local) -> list[tuple]:
    """For each rank of `across` groups of `within` ranks its pair of communicators."""
    groups = [make(within) for _ in range(across)]
    lines = [make(across) for _ in range(within)]
    return [(groups[a][w], lines[w][a]) for a in range(across) for w in range(within)]
