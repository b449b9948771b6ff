"""The storages of Optuna that studies are kept in: a journal file, or a database.

Every message about a storage hides the password in its URL.
"""

import contextlib
import functools
import json
import logging
import os
import random
import re
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from numflash.runtime.cache_folder import cache_dir, folder_for, open_file
from numflash.runtime.files import locked, open_for_all, open_unlinked, refuse_link

_CONNECT_SECONDS = 10
# Several processes that make the same tables at once are in each other's way.
_MAKING_ATTEMPTS = 10
# Up to the last "@" before a query; if there is none, the text before the first.
_PASSWORD = re.compile(r"(?P<user>://[^:/?#\s]*:)(?P<password>[^?\s]*|\S*?)@")

_log = logging.getLogger("numflash")
# Folders of studies that were said to be unwritable.
_told: set[Path] = set()


class StorageError(RuntimeError):
    """A storage cannot be used; the message names it and says why."""


def journal_path(name: str) -> Path:
    """The journal file of a study."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[:80].strip("-")
    return cache_dir() / "studies" / f"{readable}-{sha256(name.encode()).hexdigest()[:8]}.journal"


def shown(url: str | None, name: str) -> str:
    """The name of a study's storage in messages; the arguments are those of `open_storage`."""
    if _is_database(url):
        hidden = _PASSWORD.sub(r"\g<user>***@", url)
        return f"the storage {_without_parameters(hidden)}"
    return f"the journal {_journal(url, name)}"


def hide_password(text: str, url: str | None) -> str:
    """A text on one line, without the password of a URL wherever the text repeats it."""
    found = _PASSWORD.search(url or "")
    if found is not None and found["password"]:
        for password in {found["password"], unquote(found["password"])}:
            # As a word of its own: a short one is part of others.
            text = re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", "***", text)
    return " ".join(_without_parameters(text).split())


def _without_parameters(text: str) -> str:
    return re.sub(r"\b(password=)[^&\s'\"]+", r"\1***", text)


def open_storage(url: str | None, name: str) -> BaseStorage:
    """The storage for a study.

    Args:
        url: of a database that SQLAlchemy knows, as in "postgresql://user@host/database", or the
            path of a journal file; None is a journal file in numflash's cache. Where that cannot
            be written, or no longer, it continues in memory, and the log says so.
        name: of the study.

    Raises:
        StorageError: it does not answer, or cannot be written.
    """
    if _is_database(url):
        return _open_database(url)
    path = _journal(url, name)
    try:
        if url is None:
            return JournalStorage(_CacheJournal(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path)
        return JournalStorage(JournalFileBackend(str(path), _JournalLock(path)))
    except OSError as error:
        raise StorageError(f"the journal {path} cannot be written: {error}") from error
    except (ValueError, KeyError) as error:
        aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        raise StorageError(
            f"the journal {path} is damaged ({error}); move it away, for example to {aside}, to "
            "begin again"
        ) from error


def reason_of(error: BaseException) -> str:
    """The message of a storage's driver, without the words that Optuna and SQLAlchemy add."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return str(error) or type(error).__name__


def _is_database(url: str | None) -> bool:
    return url is not None and "://" in url


def _journal(url: str | None, name: str) -> Path:
    return journal_path(name) if url is None else Path(url)


class _CacheJournal(BaseJournalBackend):
    """A journal in the cache; once it cannot be written its lines are kept in memory."""

    def __init__(self, path: Path):
        self._path, self._lines = path, []
        try:
            os.close(open_for_all(folder_for(path.parent.name) / path.name))
            open_file(path).close()
            self._file = JournalFileBackend(str(path), _JournalLock(path))
        except OSError as error:
            self._leave([], error)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The lines from a number on."""
        if self._file is not None:
            return self._file.read_logs(log_number_from)
        return iter(self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines."""
        if self._file is not None:
            try:
                self._file.append_logs(logs)
                return
            except OSError as error:
                self._leave(list(self._file.read_logs(0)), error)
        logs = json.loads(json.dumps(logs))  # as they would be read from a file
        # The file may have taken the first of them before it failed.
        written = (n for n in range(len(logs), 0, -1) if self._lines[-n:] == logs[:n])
        self._lines += logs[next(written, 0) :]

    def _leave(self, lines: list[dict[str, Any]], error: OSError) -> None:
        self._file, self._lines = None, lines
        folder = self._path.parent
        if folder in _told:
            return
        _told.add(folder)
        _log.warning(
            "studies cannot be written in %s (%s): what is tried is kept in memory, and this run "
            "cannot be continued later",
            folder,
            error,
        )


class _JournalLock:
    """The lock of a journal's writers, which dies with its owner.

    Its taker first removes the rest of a line that a killed writer has left: readers ignore a
    line without an end, and the next line would be appended to it.
    """

    def __init__(self, path: Path):
        self._path, self._held = path, contextlib.ExitStack()

    def acquire(self) -> bool:
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self._path.parent))
            _cut_torn_line(self._path)
            self._held = held.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _cut_torn_line(path: Path) -> None:
    opened = functools.partial(open, path, "r+b", opener=open_unlinked)
    with contextlib.suppress(FileNotFoundError), opened() as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _open_database(url: str) -> RDBStorage:
    import sqlalchemy

    place = shown(url, "")
    found = _PASSWORD.search(url)
    if found is not None and "@" in found["password"]:
        raise StorageError(f'{place} has "@" in its password: write %40 for it')
    options = {}
    try:
        parsed = sqlalchemy.make_url(url)
        if parsed.get_backend_name() == "postgresql":
            options = {"connect_args": {"connect_timeout": _CONNECT_SECONDS}}
            if parsed.drivername == "postgresql" and _can_import("psycopg"):
                parsed = parsed.set(drivername="postgresql+psycopg")
        engine = {**options, "pool_pre_ping": True}
        return _make_tables(parsed.render_as_string(hide_password=False), engine)
    except (sqlalchemy.exc.NoSuchModuleError, ImportError) as error:
        raise StorageError(
            f"the driver for {place.removeprefix('the storage ')} is missing: "
            f'{hide_password(str(error), url)}; for PostgreSQL, pip install "numflash[postgresql]"'
        ) from error
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        reason = hide_password(str(error), url)
        raise StorageError(f"{place} is neither a database's URL nor a path: {reason}") from error
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, OSError) as error:
        reason = hide_password(reason_of(error), url)
        raise StorageError(f"{place} does not answer: {reason}") from error
    except RuntimeError as error:
        reason = hide_password(str(error), url)
        raise StorageError(
            f"{place} belongs to another version of Optuna: {reason} Or use another database."
        ) from error


def _make_tables(url: str, engine: dict) -> RDBStorage:
    """The storage, with its tables, which other processes may be making too."""
    for _ in range(_MAKING_ATTEMPTS):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except Exception as error:
            if not _is_answered(error):
                raise
            time.sleep(random.uniform(0.05, 0.25))
    return RDBStorage(url, engine_kwargs=engine)


def _is_answered(error: Exception) -> bool:
    """Whether a database answered a statement with this error.

    Two processes that make the same tables get an error whose name differs between databases:
    OperationalError of SQLite, ProgrammingError, IntegrityError or InternalError of PostgreSQL.
    """
    import sqlalchemy.exc

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, sqlalchemy.exc.DatabaseError) and cause.statement is not None


def _can_import(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True
