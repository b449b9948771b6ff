"""Ranks as threads of this process."""

import threading
from collections.abc import Callable
from typing import Any

from numflash.distributed.communicators.local import local


def on_ranks(size: int, work: Callable[[Any], Any], comms=None, timeout: float = 60.0) -> list:
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
