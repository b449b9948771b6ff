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
    """A rank whose messages are moved by a thread of its own, in the order they are posted.

    Each at random: some time after it was posted, while the caller goes on, or not before the
    caller waits for it or for a later one. So what is sent is read long after it was posted, and
    what is received is written long before the wait, or in it. Until then it is NaN, in any of
    the dtypes that travel.
    """

    def __init__(self, comm, seed: int, longest: float = 0.01):
        self._comm, self.rank, self.size, self.agreed = comm, comm.rank, comm.size, comm.agreed
        self._random, self._longest = random.Random(seed * comm.size + comm.rank), longest
        self._worker, self._wanted = ThreadPoolExecutor(1), []

    def exchange(self, sends, receives, what):
        """See `Communicator`."""
        for array, _ in receives:
            array[...] = 0xFF
        wanted = threading.Event()
        delay, in_wait = self._random.random() * self._longest, self._random.random() < 0.5
        self._wanted.append(wanted)
        number = len(self._wanted)

        def deliver() -> None:
            if in_wait:
                wanted.wait()
            time.sleep(delay)
            self._comm.exchange(sends, receives, what)()

        delivered = self._worker.submit(deliver)

        def wait_for_it() -> None:
            for each in self._wanted[:number]:
                each.set()
            delivered.result()

        return wait_for_it

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
