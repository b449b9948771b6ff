"""The on-disk cache of compiled kernels: one file each, named by the hash of its content key.

A file is a header line of JSON and the machine code, with a checksum over both. It appears by an
atomic rename, so that any number of processes can write; what cannot be read, is cut short or was
written by another version counts as absent; what cannot be written is simply compiled again.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

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
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"numflash-{user}"


def _path(key: str) -> Path:
    return cache_dir() / "cubins" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.cubin"


def read(key: str) -> tuple[dict, bytes] | None:
    """(header, code) stored under `key`, or None."""
    try:
        data = _path(key).read_bytes()
    except OSError:
        return None
    if not data.startswith(_MAGIC):
        return None
    checksum, _, rest = data[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        _log.warning("%s is damaged; compiling again", _path(key))
        return None
    header, _, code = rest.partition(b"\n")
    try:
        fields = json.loads(header)
    except ValueError:
        return None
    # The name is a hash of the key; the key itself settles it.
    return (fields, code) if fields.pop("key", None) == key else None


def write(key: str, header: dict, code: bytes) -> None:
    """Store `header` and `code` under `key`; a failure is logged, never raised."""
    rest = json.dumps({"key": key, **header}).encode() + b"\n" + code
    data = _MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest
    path = _path(key)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
