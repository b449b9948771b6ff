"""Whether a file may be believed: who else could have written it, and who may read a new one.

A GPU executes the kernels in the cache, so whoever writes there acts for this user. A file or
folder is believed if it belongs to this user or to root and nobody else may write it. A group of
this user's may write a folder that is shared on purpose: files that its members own are then
believed, too.

On Windows the folder of a user is the system's to protect, and everything is believed.
"""

import logging
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger("numflash")
_said: set[str] = set()


class UntrustedError(PermissionError):
    """Others may write or own a file or folder; it is neither read nor written."""


def require_trust(path: Path, info: os.stat_result, group: int | None = None) -> None:
    """Raise unless a file or folder can be believed; who could have written it is logged once.

    Args:
        path: for messages.
        info: what the system says of it.
        group: the group that shares it; None if nobody does.

    Raises:
        UntrustedError: others may write or own it.
    """
    if sys.platform == "win32":
        return
    reason = _who_else(info, group)
    if reason is None:
        return
    text = (
        f"{path} is not used: {reason}, and what it holds would run as this user. Take that right "
        f"away, or name another folder in NUMFLASH_CACHE_DIR"
    )
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)
    raise UntrustedError(text)


def _who_else(info: os.stat_result, group: int | None) -> str | None:
    """Who else could have written a file; None if nobody."""
    if info.st_mode & stat.S_IWOTH:
        return "everyone may write it"
    if info.st_mode & stat.S_IWGRP and info.st_gid != group:
        return f"the group {info.st_gid} may write it"
    if info.st_uid not in (0, os.geteuid()) and group is None:
        return f"it belongs to the user {info.st_uid}"
    return None


def sharing_group(info: os.stat_result) -> int | None:
    """The group that may write a folder which the world may not; None if there is none.

    A group counts that this user belongs to, or has given the folder to: any other is a
    stranger's.
    """
    if sys.platform == "win32" or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) != stat.S_IWGRP:
        return None
    is_own = info.st_uid == os.geteuid() or info.st_gid in (os.getegid(), *os.getgroups())
    return info.st_gid if is_own else None


def make_folder(path: Path, group: int | None = None) -> None:
    """Make a folder, if absent, that is this user's alone, or the group's that shares it.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    if group is not None:
        with suppress(OSError):  # it is this user's alone
            os.chown(path, -1, group)
            path.chmod(0o2770)


def share(handle: int, folder: Path, rights: int) -> None:
    """Give a new file to the group that may write its folder, if one may.

    Args:
        handle: of the open file, which this user has made.
        folder: where it is.
        rights: what the group may do at least: 0o040 to read, 0o060 to write too.
    """
    group = sharing_group(folder.stat())
    if group is not None:
        with suppress(OSError):  # it is this user's alone
            os.fchown(handle, -1, group)
            os.fchmod(handle, os.fstat(handle).st_mode & 0o777 | rights)
