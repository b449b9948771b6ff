"""Files that many processes change: a lock per folder, and replacing a file as a whole.

A lock is one of the system's on a file `.lock`, so that it dies with its owner and holds between
hosts where the file system's locks do. That file stays: removing it would let two owners in.

Nothing is written through a symbolic link: a file that somebody else may have linked elsewhere is
not opened, and where a file is replaced the link is.
"""

import errno
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from numflash.runtime.trust import share

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_SECONDS = 10.0
"""Seconds to wait for a lock."""
LEFTOVER_SECONDS = 3600.0
"""A temporary file older than this has no writer any more."""
_POLL_SECONDS = 0.005
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
# A lock of the threads among themselves: on NFS a file's lock is the whole process's.
_threads = threading.Lock()


def _forget_threads() -> None:
    # A fork copies the lock in whatever state another thread has it.
    global _threads
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def refuse_link(path: Path) -> None:
    """Raise OSError if a symbolic link is in the place of a file that is written to."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link is not written through", str(path))


def open_unlinked(path: str | os.PathLike, flags: int) -> int:
    """As `os.open`, and an opener for `open`: OSError where a symbolic link is in its place."""
    refuse_link(Path(path))
    return os.open(path, flags | _NO_FOLLOW, 0o666)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        TimeoutError: others held it for LOCK_SECONDS.
        OSError: the folder is absent or cannot be written, or its file system has no locks.
    """
    path = folder / ".lock"
    deadline = time.monotonic() + LOCK_SECONDS
    late = TimeoutError(f"the lock {path} was held by others for {LOCK_SECONDS:g} seconds")
    threads = _threads
    if not threads.acquire(timeout=LOCK_SECONDS):
        raise late
    try:
        handle = open_for_all(path)
        try:
            while not _try_lock(handle, path):
                if time.monotonic() > deadline:
                    raise late
                time.sleep(_POLL_SECONDS)
            try:
                yield
            finally:
                # Closing alone would leave it to a child forked meanwhile.
                _unlock(handle)
        finally:
            os.close(handle)
    finally:
        threads.release()


def open_for_all(path: Path) -> int:
    """A handle of a file that all who share its folder may write, made if absent.

    Raises:
        OSError: it cannot be opened or made, or a symbolic link is in its place.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return open_unlinked(path, os.O_RDWR)
    share(handle, path.parent, 0o060)
    return handle


def require_replaceable(path: Path) -> None:
    """Raise OSError where `replace_file` could not write. Nothing is changed."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "only a file can be replaced", str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole: it keeps its content or holds all of `text`, whatever happens.

    A group that may write its folder may read it.

    Raises:
        OSError: it cannot be written, or is a folder, a device or a pipe.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "only a file can be replaced", str(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n", opener=_read_by_others) as file:
            file.write(text)
            share(file.fileno(), path.parent, 0o040)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sys.platform != "win32":
        # The file is in place; only a crash of the machine could still undo the rename.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _read_by_others(path: str, flags: int) -> int:
    # The umask does not matter: a file of the cache that others may write is not believed.
    return os.open(path, flags, 0o644)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that died long ago."""
    for path in folder.glob("*.part"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _try_lock(handle: int, path: Path) -> bool:
    """Whether the lock is taken now. Raises OSError where files cannot be locked."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return True


def _unlock(handle: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_UN)
