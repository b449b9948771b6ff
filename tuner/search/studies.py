"""Studies of Optuna, shared by processes and hosts, and their trials.

Every trial that counts carries the config that it tried; `Ledger.claim` prevents that a config
is tried twice, however many processes and hosts work on a study. A process that dies leaves its
trial running: the next one to look gives it up, and its config is free again. A process of
another host is taken for dead when it has shown no work for some minutes.
"""

import contextlib
import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from ..records import Record
from .owners import is_gone, this_process
from .storages import StorageError, hide_password, journal_path, open_storage, reason_of, shown

__all__ = ["ENVIRONMENT", "FORMAT", "Ledger", "StorageError", "journal_path", "open_study"]

FORMAT = "values"
"""The form of trials' parameters; part of the names of studies, which once held indices."""
ENVIRONMENT = ("timeout", "launch_failed", "compile_failed")
"""Outcomes that may be the machine's fault: a later run tries the config once more."""
_BEAT_SECONDS = 30
# Databases of Optuna 4 keep a trial's start in the local time of its host, unknown without an
# owner: local times are up to 26 hours apart.
_ORPHANED_SECONDS = 27 * 3600
# Between a trial's beginning and its claim lies one answer of the sampler.
_CHOOSING_SECONDS = 20
_PAUSES_SECONDS = 1, 2, 4, 8
"""Between attempts to reach a storage that fails. Servers take up to 10 s to start again."""
_COUNTED = TrialState.COMPLETE, TrialState.PRUNED

_log = logging.getLogger("numflash")
# The storage's name in messages, and its URL.
_places: "WeakKeyDictionary[optuna.Study, tuple[str, str | None]]" = WeakKeyDictionary()
_Answer = TypeVar("_Answer")


def open_study(url: str | None, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """The study with this name, made if there is none. Raises StorageError."""
    storage = open_storage(url, name)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # of a new study nobody need be told
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
            direction="minimize",
        )
    except Exception as error:
        reason = hide_password(reason_of(error), url)
        raise StorageError(
            f"the study cannot be opened in {shown(url, name)}: {reason}"
        ) from error
    finally:
        optuna.logging.set_verbosity(before)
    _places[study] = shown(url, name), url
    return study


def earlier_records(url: str | None, names: Iterable[str]) -> list[list[Record]]:
    """The records that stand in studies with these names, none for one that does not exist.

    Raises StorageError.
    """
    shared = None if url is None else open_storage(url, "")
    found = []
    for name in names:
        if shared is None and not journal_path(name).exists():
            found.append([])
            continue
        storage = shared or open_storage(None, name)
        try:
            exists = name in optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage) if exists else None
        except _outages() as error:
            reason = hide_password(reason_of(error), url)
            raise StorageError(f"{shown(url, name)} cannot be read: {reason}") from error
        found.append([] if study is None else Ledger(study).standing())
    return found


class Ledger:
    """The configs of a study that are tried, the processes that try them, and the results.

    A storage that fails is tried again a few times. Every method but `records`, `tried` and
    `give_up` raises StorageError when that fails, and at once from then on.
    """

    def __init__(
        self,
        study: optuna.Study,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """A ledger of one run: what failed in `ENVIRONMENT` before now may be tried once more.

        Args:
            study: where trials are kept.
            clock: seconds since the epoch.
            sleep: waits for seconds.

        Raises:
            StorageError: the study cannot be read.
        """
        self.study, self._clock, self._sleep = study, clock, sleep
        self._lost: StorageError | None = None
        self._records: dict[int, Record | None] = {}
        self._working: dict[int, Trial] = {}
        self._beaten = clock()
        self._awaited_since: dict[int, float] = {}
        self._earlier_failures = frozenset(self._failures(self._trials()))

    def records(self) -> list[Record]:
        """The latest record of each config, in order of trial; those known if storage fails."""
        with contextlib.suppress(StorageError):
            self._read(self._trials())
        latest = {}
        for number in sorted(self._records):
            if (record := self._records[number]) is not None:
                latest.pop(record.config, None)
                latest[record.config] = record
        return list(latest.values())

    def tried(self) -> set[str]:
        """The configs with a record that stands: without those that may be tried once more."""
        with contextlib.suppress(StorageError):
            self._read(self._trials())
        forgiven = self._forgiven()
        return {
            record.config
            for number, record in self._records.items()
            if record is not None and number not in forgiven
        }

    def standing(self) -> list[Record]:
        """The records of `tried`."""
        tried = self.tried()
        return [record for record in self.records() if record.config in tried]

    def taken(self) -> set[str]:
        """The configs that were tried or are being tried."""
        return {trial.user_attrs["config"] for trial in self._holders(self._trials())}

    def is_running(self, config: str) -> bool:
        """Whether a config is being tried by a process that is not known to be gone."""
        return any(
            t.state == TrialState.RUNNING and t.user_attrs.get("config") == config
            for t in self._trials()
        )

    def ask(
        self,
        distributions: Mapping[str, BaseDistribution] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Trial:
        """A new trial of this process.

        Args:
            distributions: of its parameters.
            params: a value for each of them, before which enqueued trials give way; None has the
                sampler propose, or whoever enqueued a trial with Optuna.

        Raises StorageError also where the study has other choices: somebody else's, or those of
        another version of numflash.
        """
        if params is None:
            return self._asked(distributions or {})
        sampler = self.study.sampler
        self.study.sampler = _Told(sampler, params)
        try:
            while (trial := self._asked(distributions or {})).params != dict(params):
                self.give_up(trial)
        finally:
            self.study.sampler = sampler
        return trial

    def _asked(self, distributions: Mapping[str, BaseDistribution]) -> Trial:
        # Step by step, so that a failed step is repeated alone and the trial is not lost.
        trial = self._reach(self.study.ask)
        self.begin(trial)
        try:
            for name, distribution in distributions.items():
                self._reach(_suggest, trial, name, distribution)
        except ValueError as error:
            self.give_up(trial)
            place, _ = self._place()
            raise StorageError(
                f"the study {self.study.study_name!r} in {place} has other choices ({error}): it "
                "is of another version of numflash; begin again in another --storage"
            ) from error
        return trial

    def begin(self, trial: Trial) -> None:
        """Note that this process works on a trial; `ask` has done so."""
        if trial.number not in self._working:
            self._working[trial.number] = trial
            self._show(trial)

    def beat(self) -> None:
        """Show that this process is at work. To be called often; it writes twice a minute."""
        if 0 <= self._clock() - self._beaten < _BEAT_SECONDS:
            return
        self._beaten = self._clock()
        for trial in list(self._working.values()):
            self._show(trial)

    def _show(self, trial: Trial) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._reach(trial.set_user_attr, "owner", this_process(self._clock()))

    def claim(self, trial: Trial, config: str) -> bool:
        """Take a config for a trial; False if another trial has it.

        Of trials that want a config at once the one that was begun first gets it: a later one
        waits until every earlier one has said which config it wants (Lamport's bakery).
        """
        try:
            self._reach(trial.set_user_attr, "config", config)
        except UpdateFinishedTrialError:
            return False
        while True:
            others = [t for t in self._trials() if t.number != trial.number]
            for holder in self._holders(others):
                is_first = holder.state in _COUNTED or holder.number < trial.number
                if is_first and holder.user_attrs["config"] == config:
                    return False
            if not any(self._is_choosing(t) for t in others if t.number < trial.number):
                return True
            self._sleep(0.02)

    def _is_choosing(self, trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING or "config" in trial.user_attrs:
            return False
        # By this process's clock, from when it first waited: hosts need not agree on the time.
        first = self._awaited_since.setdefault(trial.number, self._clock())
        return self._clock() - first < _CHOOSING_SECONDS and not self._is_gone(trial)

    def finish(self, trial: Trial, record: Record) -> bool:
        """Keep the record of a trial; False if another process gave the trial up meanwhile."""
        text = record.to_json()
        self._records[trial.number] = record
        with contextlib.suppress(UpdateFinishedTrialError):
            self._reach(trial.set_user_attr, "record", text)
            if record.outcome == "slow":
                self._reach(trial.report, record.time_ms, len(record.samples_ms))
            is_time = record.outcome in ("measured", "predicted")
            value, state = (record.time_ms, None) if is_time else (None, TrialState.PRUNED)
            self._reach(self.study.tell, trial, value, state, skip_if_finished=True)
        self._working.pop(trial.number, None)
        # Asked of the storage: an attempt that failed may have been carried out all the same.
        kept = self._trials()[trial.number]
        if kept.state in _COUNTED and kept.user_attrs.get("record") == text:
            return True
        del self._records[trial.number]
        _log.warning(
            "the trial of %s was given up by another process, and its record is dropped",
            record.config,
        )
        return False

    def give_up(self, trial: Trial) -> None:
        """Free the config of a trial that was not tried after all."""
        self._working.pop(trial.number, None)
        with contextlib.suppress(StorageError):
            self._fail(trial)

    def give_up_own(self) -> None:
        """Free whatever this process is trying."""
        for trial in list(self._working.values()):
            self.give_up(trial)

    def give_up_abandoned(self) -> int:
        """Give up the trials of processes that are gone; how many."""
        abandoned = [
            t for t in self._trials() if t.state == TrialState.RUNNING and self._is_gone(t)
        ]
        for trial in abandoned:
            self._fail(trial.number)
        return len(abandoned)

    def _fail(self, trial: Trial | int) -> None:
        # If a trial has ended already, Optuna raises one or the other.
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            self._reach(self.study.tell, trial, state=TrialState.FAIL)

    def _is_gone(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner is not None:
            return is_gone(owner, self._clock())
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return self._clock() - begun > _ORPHANED_SECONDS

    def _holders(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """The trials whose config others may not try."""
        self._read(trials)
        forgiven = self._forgiven()
        return [
            trial
            for trial in trials
            if "config" in trial.user_attrs
            and (trial.state in _COUNTED or trial.state == TrialState.RUNNING)
            and trial.number not in forgiven
        ]

    def _failures(self, trials: Iterable[FrozenTrial]) -> dict[int, str]:
        """Trial and config of failures that may be the environment's fault."""
        self._read(trials)
        found = {n: r for n, r in self._records.items() if r is not None}
        return {n: r.config for n, r in found.items() if r.outcome in ENVIRONMENT}

    def _forgiven(self) -> set[int]:
        """Failures of earlier runs, unless their config has failed again."""
        failures = self._failures(())
        times = Counter(failures.values())
        return {n for n, c in failures.items() if n in self._earlier_failures and times[c] == 1}

    def _read(self, trials: Iterable[FrozenTrial]) -> None:
        for trial in trials:
            if trial.state in _COUNTED and trial.number not in self._records:
                try:
                    record = Record.from_json(trial.user_attrs["record"])
                except (KeyError, ValueError):
                    record = None  # somebody else's trial
                self._records[trial.number] = record

    def _trials(self) -> list[FrozenTrial]:
        return self._reach(self.study.get_trials, deepcopy=False)

    def _reach(self, action: Callable[..., _Answer], *args, **kwargs) -> _Answer:
        """The answer of a call of the storage, which is repeated while the storage fails."""
        if self._lost is not None:
            raise self._lost
        pauses = list(_PAUSES_SECONDS)
        while True:
            try:
                return action(*args, **kwargs)
            except _outages() as error:
                pause = pauses.pop(0) if pauses else None
                reason, cause = reason_of(error), error
            except (json.JSONDecodeError, KeyError) as error:
                # The storage answers, but no longer with this study.
                pause, reason, cause = None, f"it is damaged: {error}", error
            place, url = self._place()
            reason = hide_password(reason, url)
            if pause is None:
                self._lost = StorageError(f"{place} can no longer be used: {reason}")
                raise self._lost from cause
            _log.warning("%s fails (%s); trying again in %g s", place, reason, pause)
            self._sleep(pause)

    def _place(self) -> tuple[str, str | None]:
        """The storage's name in messages, and its URL."""
        return _places.get(self.study, (f"the study {self.study.study_name}", None))


class _Told(optuna.samplers.BaseSampler):
    """Proposes given values; the sampler whose place it takes records them as its own."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, params: Mapping[str, Any]):
        self._sampler, self._params = sampler, params

    def before_trial(self, study, trial):
        """As the sampler does."""
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study, trial):
        """As the sampler does."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        """The values it was given, for samplers that propose several parameters together."""
        self._sampler.sample_relative(study, trial, search_space)
        return {name: self._params[name] for name in search_space if name in self._params}

    def sample_independent(self, study, trial, param_name, param_distribution):
        """The value it was given."""
        return self._params[param_name]


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Have a trial's parameter proposed."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    else:
        suggest = {IntDistribution: trial.suggest_int, FloatDistribution: trial.suggest_float}
        low, high = distribution.low, distribution.high
        suggest[type(distribution)](name, low, high, step=distribution.step, log=distribution.log)


@functools.cache
def _outages() -> tuple[type[Exception], ...]:
    """Errors that Optuna raises when a storage cannot be reached or written."""
    import sqlalchemy.exc

    return StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError
