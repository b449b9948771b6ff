"""Owners of trials: the process of a host that works on one, and whether it still does.

An owner is what `this_process` returns, as JSON keeps it: host, pid, the process's start and
`beat`, the time at which it was last seen at work, in seconds since the epoch (UTC).
"""

import contextlib
import functools
import os
import socket
import sys
from pathlib import Path

# Many beats of 30 s, and clocks of hosts that are minutes apart.
_SILENT_SECONDS = 600


def this_process(now: float) -> dict:
    """This process, seen at work now; distinct from a later one with the same number."""
    return {**_identity(os.getpid()), "beat": now}


def is_gone(owner: dict, now: float) -> bool:
    """Whether an owner has died: certain of a process of this host, presumed after a silence."""
    if owner["host"] == _host():
        start = _start(owner["pid"])
        if start != owner["start"]:
            return True
        if start is not None and start.isdigit():
            return False
    return now - owner.get("beat", 0.0) > _SILENT_SECONDS


@functools.cache
def _identity(pid: int) -> dict:
    return {"host": _host(), "pid": pid, "start": _start(pid)}


@functools.cache
def _host() -> str:
    """The place within which process numbers are distinct: containers may share a host's name."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _start(pid: int) -> str | None:
    """When a process of this host began: a number where the system tells; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    if sys.platform == "win32":
        return "unknown"
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "running"
