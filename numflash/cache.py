"""Where numflash keeps files, and the cache of compiled kernels among them.

A kernel is one file, named by the hash of its content key: a header line of JSON and the machine
code, with a checksum over both. It appears by an atomic rename, so that any number of processes
can write; what cannot be read, is cut short or was written by another version counts as absent;
what cannot be written is simply compiled again.

The folders are this user's alone. Where others may write, nothing is read or written (`trust`).
Users can share a folder that NUMFLASH_CACHE_DIR names and that their group, not the world, may
write: `mkdir -m 2770`.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from numflash.trust import UntrustedError, make_folder, require_trust, share, sharing_group

_MAGIC = b"numflash-cubin-1\n"
_log = logging.getLogger("numflash")


def cache_dir() -> Path:
    """Where numflash keeps files: NUMFLASH_CACHE_DIR, or a folder in the user's cache."""
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


def _path(key: str) -> Path:
    return cache_dir() / "cubins" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.cubin"


def read(key: str) -> tuple[dict, bytes] | None:
    """(header, code) stored under `key`, or None."""
    path = _path(key)
    try:
        with open_file(path) as file:
            data = file.read()
    except OSError:
        return None
    if not data.startswith(_MAGIC):
        return None
    checksum, _, rest = data[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        _log.warning("%s is damaged; compiling again", path)
        return None
    header, _, code = rest.partition(b"\n")
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        return None
    # The name is a hash of the key; the key itself settles it.
    if not isinstance(fields, dict) or fields.pop("key", None) != key:
        return None
    return fields, code


def write(key: str, header: dict, code: bytes) -> None:
    """Store `header` and `code` under `key`; a failure is logged, never raised."""
    rest = json.dumps({"key": key, **header}).encode() + b"\n" + code
    data = _MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest
    path = _path(key)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=folder_for("cubins"), suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            share(handle, path.parent, 0o040)
        os.replace(temporary, path)
    except OSError as error:
        _log.info("cannot write %s (%s); this kernel is compiled again next time", path, error)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def contents() -> tuple[int, int]:
    """(number of kernels, bytes) in the cache."""
    try:
        sizes = [file.stat().st_size for file in (cache_dir() / "cubins").glob("*.cubin")]
    except OSError:
        return 0, 0
    return len(sizes), sum(sizes)
