"""The search for the best config of one problem class: ask, compile, judge, tell, and crown.

Optuna proposes; what it proposes is moved to the nearest feasible config that nobody has tried.
Compilers work ahead in other processes. Where there is a GPU the judge is a `Measurer`; offline it
is the model. The default and the configs that the model likes best come first.
"""

import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import Trial

from numflash.configs import Config
from numflash_tuner import model
from numflash_tuner.measure import Measurer
from numflash_tuner.pool import CompilePool, Examined
from numflash_tuner.records import Record
from numflash_tuner.space import Space
from numflash_tuner.studies import Ledger

SAMPLERS = ("tpe", "grid", "random", "cmaes")
_FAVOURITES = 8
"""Configs of distinct machine code that the model has tried first."""
_HOPELESS = 1.25
"""Without a GPU, a config whose estimate is so many times the best time is not compiled: estimates
are within a few percent of what the model says of machine code."""
_SLOW, _FEW_SAMPLES = 1.25, 3
"""A config that is so many times as slow as the best after so many samples is stopped."""
_FINALISTS, _FINAL_ROUNDS = 5, 15
_TIE = 0.01
"""Times this close are equal; the config with less shared memory wins."""
MODEL_MARGIN = 0.05
"""What a prediction must gain over the default to displace it: the model is no better."""
_ASK_ATTEMPTS = 20
_OF_THE_CODE = ("compile_failed", "spilled", "over_budget", "wrong_result")
"""Failures that all configs of the same machine code share."""


@dataclass(frozen=True)
class Limits:
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
    """The sampler with a name of SAMPLERS. Raises ImportError if its package is missing."""
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if name == "cmaes":
        try:
            import cmaes  # noqa: F401
        except ImportError as error:
            raise ImportError("the sampler cmaes needs: pip install cmaes") from error
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    # The grid is walked here; the sampler only fills in what is not asked for.
    return optuna.samplers.RandomSampler(seed=seed)


class Search:
    """The search in one study."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        pool: CompilePool,
        measurer: Measurer | None,
        limits: Limits,
        *,
        in_order: bool = False,
        ahead: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing runs yet.

        Args:
            space: what may be tried.
            study: where trials are kept.
            pool: compiles for the space's machine.
            measurer: judges compiled configs; None has the model judge.
            limits: when to stop.
            in_order: walk the space in its order instead of asking the sampler.
            ahead: configs being compiled at once.
            clock: seconds.
        """
        self.space, self.ledger = space, Ledger(study)
        self._study, self._pool, self._measurer = study, pool, measurer
        self._limits, self._in_order, self._ahead = limits, in_order, ahead
        self._clock, self._began = clock, clock()
        self._distributions = {
            name: IntDistribution(0, len(choices) - 1)
            for name, choices in space.dimensions.items()
            if len(choices) > 1
        }
        machine, problem = space.machine, space.problem
        self._estimates = {config: self._estimate(config) for config in space.feasible}
        self._broken: set[Config] = set()
        self._by_text = {str(config): config for config in space.feasible}
        self.floor_ms = model.floor_ms(machine, problem)

    def _estimate(self, config: Config) -> float:
        """What the model says before anything is compiled; infinite if no block would fit."""
        try:
            return model.estimate(self.space.machine, self.space.problem, config).ms
        except ValueError:
            return math.inf

    @property
    def size(self) -> int:
        """Configs that the search will have tried when it ends by itself."""
        feasible = len(self.space.feasible)
        return feasible if self._limits.trials is None else min(self._limits.trials, feasible)

    def best(self) -> Record | None:
        """The fastest record so far, of all processes; None if nothing succeeded."""
        records = [r for r in self.ledger.records() if math.isfinite(r.time_ms)]
        records = [r for r in records if r.outcome != "slow"]
        return min(records, key=lambda record: record.time_ms, default=None)

    def run(self, on_record: Callable[[Record], None], on_idle: Callable[[], None]) -> None:
        """Try configs until a limit is reached or all are tried.

        Args:
            on_record: told each record when it is done.
            on_idle: called several times a second while compilers are waited for.

        A KeyboardInterrupt leaves the study as it should be, ready to go on.
        """
        self.ledger.give_up_abandoned()
        for record in self.ledger.records():
            self._note_broken(record)
        if not self.ledger.taken():
            self._enqueue_first()
        waiting: dict[Future, list[tuple[Trial, Config, float]]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and self._may_begin(waiting):
                    begun = self._begin()
                    exhausted = begun is None
                    if begun is not None:
                        self._look_at(*begun, waiting, on_record)
                if not waiting:
                    return
                done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                on_idle()
                for future in done:
                    for trial, config, began in waiting.pop(future):
                        record = self._judge(config, future.result())
                        self._finish(trial, record, began, on_record)
                if self._is_over():
                    return
        finally:
            for trial, _, _ in (each for several in waiting.values() for each in several):
                self.ledger.give_up(trial)

    def _may_begin(self, waiting: dict) -> bool:
        running = sum(map(len, waiting.values()))
        if running >= self._ahead or self._is_over():
            return False
        return self._limits.trials is None or len(self.ledger.taken()) < self._limits.trials

    def _is_over(self) -> bool:
        limits = self._limits
        if limits.seconds is not None and self._clock() - self._began > limits.seconds:
            return True
        if limits.trials is not None and len(self.ledger.records()) >= limits.trials:
            return True
        best = self.best()
        if limits.target is None or best is None:
            return False
        return best.time_ms <= (1 + limits.target) * max(self.floor_ms.values())

    def _enqueue_first(self) -> None:
        """The default, and the model's favourites, each of machine code of its own."""
        first = [str(self.space.default)]
        seen = {_compiled(self.space.default)}
        for config in sorted(self._estimates, key=self._estimates.get):
            if len(first) > _FAVOURITES:
                break
            if _compiled(config) not in seen:
                seen.add(_compiled(config))
                first.append(str(config))
        if not self._in_order:
            for text in first:
                if text in self._by_text:
                    self._enqueue(self._by_text[text])

    def _enqueue(self, config: Config) -> None:
        values = self.space.feasible[config]
        chosen = {n: self.space.dimensions[n].index(values[n]) for n in self._distributions}
        self._study.enqueue_trial(chosen)

    def _begin(self) -> tuple[Trial, Config] | None:
        """A trial, and the config that it has claimed; None if every config is taken."""
        while True:
            taken = self.ledger.taken()
            free = [
                config
                for text, config in self._by_text.items()
                if text not in taken and _compiled(config) not in self._broken
            ]
            if not free:
                return None
            if self._in_order:
                self._enqueue(free[0])
            for _ in range(_ASK_ATTEMPTS):
                trial = self._study.ask(self._distributions)
                self.ledger.begin(trial)
                wanted = self._proposed(trial)
                if wanted in free:
                    if self.ledger.claim(trial, str(wanted)):
                        return trial, wanted
                    self.ledger.give_up(trial)
                    break
                self.ledger.give_up(trial)
                self._enqueue(self._nearest(trial.params, free))

    def _proposed(self, trial: Trial) -> Config | None:
        """The config that a trial stands for; None if it is not feasible."""
        values = {
            n: choices[trial.params.get(n, 0)] for n, choices in self.space.dimensions.items()
        }
        config, failure = self.space.config(values)
        return config if failure is None else None

    def _nearest(self, chosen: dict[str, int], free: list[Config]) -> Config:
        """The free config the fewest steps away; of several the one with the best estimate."""
        dimensions, feasible = self.space.dimensions, self.space.feasible

        def steps(config: Config) -> int:
            values = feasible[config]
            return sum(abs(dimensions[n].index(values[n]) - i) for n, i in chosen.items())

        return min(free, key=lambda config: (steps(config), self._estimates[config]))

    def _look_at(self, trial: Trial, config: Config, waiting: dict, on_record) -> None:
        """Have a config compiled, unless the model knows already that it is hopeless."""
        began, estimate, best = self._clock(), self._estimates[config], self.best()
        is_default = config == self.space.default
        if self._measurer is None and best is not None and not is_default:
            times = estimate / best.time_ms
            if times > _HOPELESS:
                why = f"not compiled: the model's estimate is {times:.1f} times the best time"
                record = Record(str(config), "slow", why, predicted_ms=estimate)
                self._finish(trial, record, began, on_record)
                return
        future = self._pool.submit(config, self.space.problem.traits)
        waiting.setdefault(future, []).append((trial, config, began))

    def _judge(self, config: Config, examined: Examined) -> Record:
        """The record of a config that came out of the compiler."""
        record = Record(str(config), "predicted", machinery=examined.machinery)
        if examined.failure is not None:
            return record.failed(*examined.failure)
        if (failure := self.space.judge_machinery(examined.machinery)) is not None:
            return record.failed(*failure)
        prediction = model.predict(
            self.space.machine, self.space.problem, config, examined.machinery, examined.code
        )
        record = replace(record, predicted_ms=prediction.ms, parts=prediction.parts)
        if self._measurer is None:
            return record
        measured = self._measurer.measure(self.space.problem, str(config), self._is_slow)
        return replace(
            measured,
            machinery=examined.machinery,
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
        self.ledger.finish(trial, record)
        self._note_broken(record)
        on_record(record)

    def _note_broken(self, record: Record) -> None:
        """Remember machine code that failed: other layouts of it need not be tried."""
        if record.outcome in _OF_THE_CODE and record.config in self._by_text:
            self._broken.add(_compiled(self._by_text[record.config]))

    def crown(self) -> tuple[Record, Record]:
        """(the default's record, the winner's), after measuring the finalists against each other.

        Raises:
            LookupError: nothing that was tried can be used.
        """
        records = {record.config: record for record in self.ledger.records()}
        usable = [r for r in records.values() if r.outcome in ("measured", "predicted")]
        if not usable:
            raise LookupError(f"no config of {self.space.problem} worked: {_outcomes(records)}")
        usable.sort(key=lambda record: record.time_ms)
        default = records.get(str(self.space.default))
        finalists = usable[:_FINALISTS]
        if default is not None and default.outcome in ("measured", "predicted"):
            finalists += [] if default in finalists else [default]
        if self._measurer is not None and len(finalists) > 1:
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
        best = min(tied, key=lambda record: (record.machinery.smem_bytes, record.time_ms))
        default = next((r for r in finalists if r.config == str(self.space.default)), default)
        default = default or best
        is_only_predicted = self._measurer is None and math.isfinite(default.time_ms)
        if is_only_predicted and best.time_ms > (1 - MODEL_MARGIN) * default.time_ms:
            best = default
        return default, best

    def importances(self) -> dict[str, float]:
        """Each dimension's share in the variation of the time; empty while too little is known."""
        try:
            return optuna.importance.get_param_importances(
                self._study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except (ValueError, RuntimeError, ImportError):
            return {}


def _compiled(config: Config) -> Config:
    """What stands for all configs of the same machine code."""
    return getattr(config, "compiled", config)


def _outcomes(records: dict[str, Record]) -> str:
    """How often each failure occurred, and one reason for each."""
    found: dict[str, list[str]] = {}
    for record in records.values():
        found.setdefault(record.outcome, []).append(record.reason)
    return "; ".join(f"{len(why)} {outcome} ({why[0]})" for outcome, why in found.items())
