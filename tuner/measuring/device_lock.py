"""The lock of a device: of the processes that share it one measures at a time.

Unlike that of `numflash.runtime.files.locked` it is waited for as long as others hold it, which
may be minutes, and does not keep the other threads of its owner from the cache.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from numflash.runtime.cache_folder import folder_for
from numflash.runtime.files import open_for_all

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_log = logging.getLogger("numflash")


@contextmanager
def device_lock(name: str) -> Iterator[None]:
    """Wait for the lock of a device, and hold it.

    Where the cache directory cannot be written, or has no locks, a warning is logged instead.

    Args:
        name: of the device, unique among those that share a cache directory.
    """
    file = re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".lock"
    handle = None
    try:
        try:
            handle = open_for_all(folder_for("locks") / file)
            _lock(handle)
        except OSError as error:
            _log.warning("measuring without the lock that keeps other processes away: %s", error)
        yield
    finally:
        if handle is not None:
            # This gives the lock back, as does the end of the process.
            os.close(handle)


def _lock(handle: int) -> None:
    """Wait for the lock of an open file. Raises OSError where files cannot be locked."""
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    while True:
        # Windows gives up after ten seconds.
        with suppress(PermissionError):
            msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
            return
