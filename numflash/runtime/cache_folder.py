"""The folder where numflash keeps files, and who may write there."""

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import BinaryIO

from numflash.runtime.trust import UntrustedError, make_folder, require_trust, sharing_group

_log = logging.getLogger("numflash")


def cache_dir() -> Path:
    """The folder of numflash's files: NUMFLASH_CACHE_DIR, or a folder in the user's cache."""
    if chosen := os.environ.get("NUMFLASH_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "numflash"
    except RuntimeError:  # a user without a home, as in some containers
        return _nowhere()


@cache
def _nowhere() -> Path:
    """A path below which no file can be: others could guess one in the temporary folder."""
    _log.warning("this user has no home: nothing is cached unless NUMFLASH_CACHE_DIR is set")
    return Path(os.devnull, "numflash")


def folder_for(name: str) -> Path:
    """A folder of the cache to write to, made if absent.

    Raises:
        OSError: it cannot be made, or others may write it (UntrustedError).
    """
    root = cache_dir()
    root.parent.mkdir(parents=True, exist_ok=True)
    make_folder(root)
    group = _group()
    make_folder(root / name, group)
    require_trust(root / name, (root / name).stat(), group)
    return root / name


def open_file(path: Path) -> BinaryIO:
    """A file in a folder of the cache, open for reading.

    Raises:
        OSError: it cannot be read, or others may write it or its folder (UntrustedError).
    """
    group = _group()
    require_trust(path.parent, path.parent.stat(), group)
    file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        require_trust(path, os.fstat(file.fileno()), group)
    except UntrustedError:
        file.close()
        raise
    return file


def refusal(path: Path | None = None) -> str | None:
    """Why the cache, or one of its files, is not used; None if it is, or is absent.

    Args:
        path: a file in a folder of the cache; None asks about the cache itself.
    """
    try:
        if path is None:
            _group()
        else:
            open_file(path).close()
    except UntrustedError as error:
        return str(error)
    except OSError:
        pass
    return None


def _group() -> int | None:
    """The group with which this user shares the cache; None if it is the user's alone.

    Raises:
        OSError: the cache is absent, or others may write it (UntrustedError).
    """
    root = cache_dir()
    info = root.stat()
    group = sharing_group(info) if os.environ.get("NUMFLASH_CACHE_DIR") else None
    require_trust(root, info, group)
    return group
