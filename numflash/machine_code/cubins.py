"""The cache of compiled kernels in the folder where numflash keeps files.

A kernel is one file, named by the hash of its content key: a header line of JSON and the machine
code, with a checksum over both. It appears by an atomic rename, so that any number of processes
can write. A file that cannot be read, is cut short or was written by another version counts as
absent. A kernel that cannot be written is compiled again.

The folders are this user's alone. Where others may write, nothing is read or written (`trust`).
Users can share a folder that NUMFLASH_CACHE_DIR names and that their group, not the world, may
write: `mkdir -m 2770`.
"""

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from numflash.runtime.cache_folder import cache_dir, folder_for, open_file
from numflash.runtime.trust import share

_log = logging.getLogger("numflash")
_MAGIC = b"numflash-cubin-1\n"


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
