"""The search for the best config of one problem class: ask, compile, judge, tell, choose.

Optuna proposes; what it proposes is moved to the nearest feasible config that nobody has tried.
Every second proposal is the model's, corrected by what has been measured.
Compilers work ahead in other processes. Where there is a GPU the judge is a `Measurer`; offline it
is the model. The default and the configs that the model likes best come first.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.trial import Trial

from numflash.configs import Config
from numflash_tuner import SAMPLERS, model
from numflash_tuner.candidates import Candidates
from numflash_tuner.measuring.measurer import Measurer
from numflash_tuner.ordered import OrderedSampler
from numflash_tuner.pool import CompilePool, Examined
from numflash_tuner.records import FAILURES, Record
from numflash_tuner.space import Space
from numflash_tuner.studies import ENVIRONMENT, Ledger

_FAVOURITES = 8
"""Configs of distinct machine code that the model has tried first."""
_HOPELESS = 1.25
"""Without a GPU, a config whose estimate is so many times the best time is not compiled: estimates
were 0.93 to 1.03 of what the model says of machine code, over the shipped tables."""
_SLOW, _FEW_SAMPLES = 1.25, 3
"""A config that is so many times as slow as the best after so many samples is stopped."""
_FINALISTS, _FINAL_ROUNDS = 5, 15
_TIE = 0.01
"""Times this close are equal; the config with less shared memory wins."""
_ASK_ATTEMPTS = 20
_FEW_TRIALS = 10
"""From so many on it can be told which parameters matter."""
_USABLE = ("measured", "predicted")
"""Outcomes of configs that may win."""
_HOPELESS_RUN = 12
"""So many failures in a row that need not be the config's fault are the environment's."""
_OF_THE_CODE = ("compile_failed", "spilled", "over_budget", "wrong_result")
"""Failures that all configs of the same machine code share."""


@dataclass(frozen=True)
class StoppingRules:
    """When to stop.

    Attributes:
        trials: configs tried in the study, by all processes and earlier runs together; None for
            all there are.
        seconds: of this run; None for no limit.
        target: stop once the best is within this part of the model's floor; None to go on.
    """

    trials: int | None = None
    seconds: float | None = None
    target: float | None = None


def make_sampler(name: str, seed: int | None) -> optuna.samplers.BaseSampler:
    """The sampler with a name of SAMPLERS.

    Raises:
        ValueError: no sampler has this name.
        ImportError: its package is missing.
    """
    if name not in SAMPLERS:
        raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    if name == "tpe":
        return OrderedSampler(optuna.samplers.TPESampler(seed=seed, constant_liar=True))
    if name == "cmaes":
        try:
            import cmaes  # noqa: F401
        except ImportError as error:
            raise ImportError("the sampler cmaes needs: pip install cmaes") from error
        found = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return OrderedSampler(found)
    # The grid is walked here; the sampler only fills in what is not asked for.
    return optuna.samplers.RandomSampler(seed=seed)


@dataclass(frozen=True)
class _Waiting:
    """A trial whose config is being compiled."""

    trial: Trial
    config: Config
    began: float
    future: "Future[Examined]"


class Search:
    """The search in one study."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        pool: CompilePool,
        measurer: Measurer | None,
        rules: StoppingRules,
        *,
        sampler: str = "tpe",
        first: Sequence[str] = (),
        ahead: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing runs yet.

        Args:
            space: what may be tried.
            study: where trials are kept; its sampler is asked.
            pool: compiles for the space's machine.
            measurer: judges compiled configs; None has the model judge.
            rules: when to stop.
            sampler: of SAMPLERS. "grid" walks the space in its order; "random" is not guided by
                the model.
            first: configs to try after the default, before anything else.
            ahead: configs being compiled at once.
            clock: seconds.
        """
        self.space, self.ledger, self.candidates = space, Ledger(study), Candidates(space)
        self._study, self._pool, self._measurer = study, pool, measurer
        self._rules, self._sampler, self._ahead = rules, sampler, ahead
        self._clock, self._began = clock, clock()
        self._first = [str(space.default), *first]
        self._broken: set[str] = set()
        self._failed_in_a_row = 0
        self._asks_model = False
        self.floor_ms = model.floor_ms(space.machine, space.problem)

    @property
    def size(self) -> int:
        """Configs that the search will have tried when it ends by itself.

        Where the model judges, of those that it cannot tell apart one, unless that fails.
        """
        feasible = len(self.space.feasible)
        if self._measurer is None:
            feasible = self.candidates.distinct
        return feasible if self._rules.trials is None else min(self._rules.trials, feasible)

    def best(self) -> Record | None:
        """The fastest record so far, of all processes; None if nothing succeeded."""
        usable = [r for r in self.ledger.records() if r.outcome in _USABLE]
        return min(usable, key=lambda record: record.time_ms, default=None)

    def run(self, on_record: Callable[[Record], None], on_idle: Callable[[], None]) -> None:
        """Try configs until a limit is reached or all are tried.

        Args:
            on_record: told each record when it is done.
            on_idle: called several times a second while compilers are waited for.

        Whatever ends it early leaves the study as it should be, ready to go on.

        Raises:
            LookupError: many configs in a row failed for reasons that are hardly theirs.
            NoCompilerError: compiler processes cannot be started.
        """
        self.ledger.give_up_abandoned()
        tried = self.ledger.tried()
        for record in self.ledger.records():
            if record.config in tried:
                self._note_broken(record)
        self._enqueue_first()
        waiting: list[_Waiting] = []
        try:
            while True:
                while self._may_begin(len(waiting)) and (begun := self._begin()) is not None:
                    waiting += self._look_at(*begun, on_record)
                if not waiting:
                    return
                wait([each.future for each in waiting], 0.1, FIRST_COMPLETED)
                on_idle()
                self.ledger.beat()
                for each in [each for each in waiting if each.future.done()]:
                    record = self._judge(each.config, each.future.result())
                    self._finish(each.trial, record, each.began, on_record)
                    waiting.remove(each)
                if self._is_over():
                    return
        finally:
            for each in waiting:
                self.ledger.give_up(each.trial)

    def _may_begin(self, waiting: int) -> bool:
        if waiting >= self._ahead or self._is_over():
            return False
        return self._rules.trials is None or len(self.ledger.taken()) < self._rules.trials

    def _is_over(self) -> bool:
        rules = self._rules
        if rules.seconds is not None and self._clock() - self._began > rules.seconds:
            return True
        if rules.trials is not None and len(self.ledger.tried()) >= rules.trials:
            return True
        best = self.best()
        if rules.target is None or best is None:
            return False
        return best.time_ms <= (1 + rules.target) * max(self.floor_ms.values())

    @property
    def _is_guided(self) -> bool:
        """Whether the model has a say in what is tried."""
        return self._sampler not in ("grid", "random")

    def _enqueue_first(self) -> None:
        """The default, what the caller wants first, and in a new study the model's favourites."""
        taken = self.ledger.taken()
        texts = [text for text in self._first if text in self.candidates.numbers]
        numbers = [self.candidates.numbers[text] for text in texts if text not in taken]
        if self._is_guided and not taken:
            numbers += self.candidates.favourites(_FAVOURITES)
        for number in dict.fromkeys(numbers):
            self._enqueue(number)

    def _enqueue(self, number: int) -> None:
        self.ledger.enqueue(self.candidates.choices(number))

    def _begin(self) -> tuple[Trial, Config] | None:
        """A trial, and the config that it has claimed; None if every config is taken.

        The sampler and the corrected model propose in turn.
        """
        candidates = self.candidates
        while True:
            is_free = candidates.free(self.ledger.taken(), self._broken) & ~self._foreseen()
            if not is_free.any():
                return None
            if self._sampler == "grid":
                self._enqueue(int(is_free.argmax()))
            elif self._is_guided and self._asks_model:
                self._enqueue(candidates.favourite(self._times_ms(), is_free))
            for _ in range(_ASK_ATTEMPTS):
                trial = self.ledger.ask(candidates.distributions)
                wanted = candidates.at(trial.params)
                if wanted is not None and is_free[wanted]:
                    if self.ledger.claim(trial, candidates.texts[wanted]):
                        self._asks_model = not self._asks_model
                        return trial, candidates.configs[wanted]
                    self.ledger.give_up(trial)
                    break
                self.ledger.give_up(trial)
                self._enqueue(candidates.nearest(trial.params, is_free))

    def _foreseen(self) -> np.ndarray:
        """Which numbers the model, being the judge, cannot tell from one that works or may yet."""
        if self._measurer is not None:
            return np.zeros(len(self.candidates.configs), bool)
        failed = {r.config for r in self.ledger.records() if r.outcome in FAILURES}
        return self.candidates.twins(self.ledger.taken() - failed, self._first)

    def _times_ms(self) -> dict[str, float]:
        """The times of what was compiled, also of what was stopped because it was slow."""
        tried = [r for r in self.ledger.records() if r.resources is not None]
        return {r.config: r.time_ms for r in tried if math.isfinite(r.time_ms)}

    def _look_at(self, trial: Trial, config: Config, on_record) -> list[_Waiting]:
        """Have a config compiled, unless the model knows already that it is hopeless."""
        began, best = self._clock(), self.best()
        estimate = float(self.candidates.estimates[self.candidates.numbers[str(config)]])
        is_default = config == self.space.default
        if self._measurer is None and best is not None and not is_default:
            times = estimate / best.time_ms
            if times > _HOPELESS:
                why = f"not compiled: the model's estimate is {times:.1f} times the best time"
                record = Record(str(config), "slow", why, predicted_ms=estimate)
                self._finish(trial, record, began, on_record)
                return []
        future = self._pool.submit(config, self.space.problem.traits)
        return [_Waiting(trial, config, began, future)]

    def _judge(self, config: Config, examined: Examined) -> Record:
        """The record of a config that came out of the compiler."""
        record = Record(str(config), "predicted", resources=examined.resources)
        if examined.failure is not None:
            return record.failed(*examined.failure)
        if (failure := self.space.judge_resources(examined.resources)) is not None:
            return record.failed(*failure)
        prediction = model.predict(
            self.space.machine, self.space.problem, config, examined.resources, examined.code
        )
        record = replace(record, predicted_ms=prediction.ms, parts=prediction.parts)
        if self._measurer is None:
            return record
        measured = self._measurer.measure(self.space.problem, str(config), self._is_slow)
        return replace(
            measured,
            resources=examined.resources,
            predicted_ms=prediction.ms,
            parts=prediction.parts,
        )

    def _is_slow(self, samples: list[float]) -> bool:
        """Whether a config is so far behind that more samples are wasted."""
        best = self.best()
        if best is None or len(samples) < _FEW_SAMPLES:
            return False
        return statistics.median(samples) > _SLOW * best.time_ms

    def _finish(self, trial: Trial, record: Record, began: float, on_record) -> None:
        seconds = self._clock() - began
        record = replace(record, seconds=round(seconds, 3), finished=time.time())
        if not self.ledger.finish(trial, record):
            return
        self._note_broken(record)
        on_record(record)
        self._failed_in_a_row += 1
        if record.outcome not in ENVIRONMENT:
            self._failed_in_a_row = 0
        if self._failed_in_a_row >= _HOPELESS_RUN:
            raise LookupError(
                f"{self._failed_in_a_row} configs of {self.space.problem} in a row failed, the "
                f"last with {record.outcome}: {record.reason}"
            )

    def _note_broken(self, record: Record) -> None:
        """Remember machine code that failed: other layouts of it need not be tried."""
        if record.outcome in _OF_THE_CODE:
            self._broken.add(record.config)

    def winner(self, again: bool = True) -> tuple[Record, Record]:
        """(the default's record, the winner's).

        Args:
            again: measure the finalists against each other first, where there is a GPU.

        Raises:
            LookupError: nothing that was tried can be used.
        """
        records = {record.config: record for record in self.ledger.records()}
        usable = [r for r in records.values() if r.outcome in _USABLE]
        if not usable:
            raise LookupError(f"no config of {self.space.problem} worked: {_outcomes(records)}")
        usable.sort(key=lambda record: record.time_ms)
        default = records.get(str(self.space.default))
        if self._measurer is None:
            usable = self._beyond_error(usable, default)
        firsts = [record for record in usable[_FINALISTS:] if record.config in self._first]
        finalists = usable[:_FINALISTS] + firsts
        if again and self._measurer is not None and len(finalists) > 1:
            configs = [record.config for record in finalists]
            samples = self._measurer.remeasure(self.space.problem, configs, _FINAL_ROUNDS)
            again = [
                replace(record, samples_ms=tuple(samples[record.config]))
                for record in finalists
                if samples.get(record.config)
            ]
            finalists = again or finalists
        best = min(finalists, key=lambda record: record.time_ms)
        tied = [r for r in finalists if r.time_ms <= (1 + _TIE) * best.time_ms]
        best = min(tied, key=lambda record: (record.resources.smem_bytes, record.time_ms))
        default = next((r for r in finalists if r.config == str(self.space.default)), default)
        if default is None:
            outcome, why = self.space.failure(self.space.default) or (
                "invalid",
                "it was not tried",
            )
            default = Record(str(self.space.default), outcome, why)
        return default, best

    def _beyond_error(self, usable: list[Record], default: Record | None) -> list[Record]:
        """The default, and what gains more over it than the model's error may feign."""
        if default is None or not math.isfinite(default.time_ms):
            return usable
        space, candidates = self.space, self.candidates

        def is_beyond(record: Record) -> bool:
            config = candidates.configs[candidates.numbers[record.config]]
            needed = model.gain_needed(space.machine, space.problem, config, space.default)
            return default.time_ms > (1 + needed) * record.time_ms

        return [record for record in usable if record is default or is_beyond(record)]

    def importances(self) -> dict[str, float]:
        """Each dimension's share in the variation of the time; empty while too little is known."""
        if sum(record.outcome in _USABLE for record in self.ledger.records()) < _FEW_TRIALS:
            return {}
        try:
            return optuna.importance.get_param_importances(
                self._study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except (ValueError, RuntimeError, ImportError):
            return {}


def _outcomes(records: dict[str, Record]) -> str:
    """How often each failure occurred, and one reason for each."""
    found: dict[str, list[str]] = {}
    for record in records.values():
        found.setdefault(record.outcome, []).append(record.reason)
    return "; ".join(f"{len(why)} {outcome} ({why[0]})" for outcome, why in found.items())
