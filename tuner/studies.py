"""Where trials are kept: Optuna studies in a journal file or a database, shared by processes.

Every trial that counts carries the config that it tried; `Ledger.claim` sees to it that no config
is tried twice, however many processes and hosts work on a study. A process that dies leaves its
trial running: the next one to look gives it up, and its config is free again.
"""

import contextlib
import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from numflash.cache import cache_dir
from numflash.files import locked
from numflash_tuner.records import Record

_CONNECT_SECONDS = 10
# No trial takes as long: compiling and measuring both have limits far below.
_ABANDONED_SECONDS = 1800
# Between a trial's beginning and its claim lies one answer of the sampler.
_CHOOSING_SECONDS = 10
_COUNTED = TrialState.COMPLETE, TrialState.PRUNED


class StorageError(RuntimeError):
    """A storage cannot be used; the message names it and says why."""


def journal_path(name: str) -> Path:
    """The journal file of a study."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[:80].strip("-")
    return cache_dir() / "studies" / f"{readable}-{sha256(name.encode()).hexdigest()[:8]}.journal"


def open_storage(url: str | None, name: str) -> BaseStorage:
    """The storage for a study.

    Args:
        url: of a database that SQLAlchemy knows, as in "postgresql://user@host/database", or the
            path of a journal file; None is a journal file in numflash's cache.
        name: of the study.

    Raises:
        StorageError: it does not answer, or cannot be written.
    """
    if url is not None and "://" in url:
        return _open_database(url)
    path = journal_path(name) if url is None else Path(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            _cut_torn_line(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise StorageError(f"the journal {path} cannot be written: {error}") from error
    except (ValueError, KeyError) as error:
        aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        raise StorageError(
            f"the journal {path} is damaged ({error}); move it away, for example to {aside}, to "
            "begin anew"
        ) from error


def _cut_torn_line(path: Path) -> None:
    """Remove the end of a line that a killed process did not finish."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _open_database(url: str) -> RDBStorage:
    import sqlalchemy

    options = {}
    try:
        parsed = sqlalchemy.make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "postgresql":
            options = {"connect_args": {"connect_timeout": _CONNECT_SECONDS}}
            if parsed.drivername == "postgresql" and _can_import("psycopg"):
                parsed = parsed.set(drivername="postgresql+psycopg")
        engine = {**options, "pool_pre_ping": True}
        return RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs=engine)
    except sqlalchemy.exc.ArgumentError as error:
        raise StorageError(f"the storage must be a database URL or a path: {error}") from error
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise StorageError(
            f"the driver for {shown} is missing: {error}; for PostgreSQL, "
            'pip install "numflash[postgresql]"'
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise StorageError(f"the storage {shown} does not answer: {reason}") from error


def _can_import(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def open_study(url: str | None, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """The study with this name, made if there is none. Raises StorageError."""
    storage = open_storage(url, name)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # of a new study nobody need be told
    try:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
            direction="minimize",
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"the study cannot be opened in {url or name}: {reason}") from error
    finally:
        optuna.logging.set_verbosity(before)


class Ledger:
    """Which configs of a study are tried, by whom, and what came of it."""

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.time):
        self.study, self._clock = study, clock
        self._read: dict[int, Record | None] = {}

    def records(self) -> list[Record]:
        """What was tried, in order of trial."""
        for trial in self._trials():
            if trial.state in _COUNTED and trial.number not in self._read:
                try:
                    record = Record.from_json(trial.user_attrs["record"])
                except (KeyError, ValueError):
                    record = None  # somebody else's trial
                self._read[trial.number] = record
        found = (self._read[number] for number in sorted(self._read))
        return [record for record in found if record is not None]

    def taken(self) -> set[str]:
        """The configs that were tried or are being tried."""
        return {
            trial.user_attrs["config"]
            for trial in self._trials()
            if "config" in trial.user_attrs
            and (trial.state in _COUNTED or trial.state == TrialState.RUNNING)
        }

    def begin(self, trial: Trial) -> None:
        """Note who works on a trial."""
        trial.set_user_attr("owner", _owner())

    def claim(self, trial: Trial, config: str) -> bool:
        """Take a config for a trial; False if another trial has it.

        Of trials that want a config at once the one that was begun first gets it: a later one
        waits until every earlier one has said which config it wants (Lamport's bakery).
        """
        trial.set_user_attr("config", config)
        while True:
            earlier = [t for t in self._trials() if t.number != trial.number]
            if any(self._has(t, config, trial.number) for t in earlier):
                return False
            if not any(self._is_choosing(t) for t in earlier if t.number < trial.number):
                return True
            time.sleep(0.02)

    def _has(self, trial: FrozenTrial, config: str, before: int) -> bool:
        if trial.user_attrs.get("config") != config:
            return False
        running = trial.state == TrialState.RUNNING and trial.number < before
        return trial.state in _COUNTED or running

    def _is_choosing(self, trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING or "config" in trial.user_attrs:
            return False
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return self._clock() - begun < _CHOOSING_SECONDS

    def finish(self, trial: Trial, record: Record) -> None:
        """Keep the record of a trial."""
        trial.set_user_attr("record", record.to_json())
        if record.outcome in ("measured", "predicted"):
            self.study.tell(trial, record.time_ms)
            return
        if record.outcome == "slow":
            trial.report(record.time_ms, len(record.samples_ms))
        self.study.tell(trial, state=TrialState.PRUNED)

    def give_up(self, trial: Trial) -> None:
        """Free the config of a trial that was not tried after all."""
        with contextlib.suppress(Exception):
            self.study.tell(trial, state=TrialState.FAIL)

    def give_up_abandoned(self) -> int:
        """Give up the trials of processes that are gone; how many."""
        abandoned = [
            t for t in self._trials() if t.state == TrialState.RUNNING and self._is_gone(t)
        ]
        for trial in abandoned:
            with contextlib.suppress(Exception):
                self.study.tell(trial.number, state=TrialState.FAIL)
        return len(abandoned)

    def _is_gone(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner and owner["host"] == socket.gethostname():
            return _process_start(owner["pid"]) != owner["start"]
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return self._clock() - begun > _ABANDONED_SECONDS

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)


@functools.cache
def _owner_of(pid: int) -> dict:
    return {"host": socket.gethostname(), "pid": pid, "start": _process_start(pid)}


def _owner() -> dict:
    """This process, distinct from a later one with the same number."""
    return _owner_of(os.getpid())


def _process_start(pid: int) -> str | None:
    """When a process of this host began, as far as the system tells; None if it is gone."""
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
