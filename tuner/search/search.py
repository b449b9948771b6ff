"""The search for the best config of one problem class: ask, compile, judge, tell.

Optuna proposes; each proposal is moved to the nearest feasible config that nobody has tried.
Every second proposal is the model's, corrected by measurements. Compilers work ahead in other
processes. Where there is a GPU the judge is a `Measurer`; offline it is the model. The default
and the configs that the model likes best come first, and no winner is named before the default is
tried: it has to be beaten. Offline the default is judged alone, and a config that could not
displace it even if the compiler did as well as can be (`model.at_best`) is not compiled, as its
record says.
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

from .. import SAMPLERS, model
from ..measuring.measurer import Measurer
from ..records import FAILURES, Record
from ..space.configs import Space
from .candidates import Candidates, distinct
from .contest import USABLE, Contest
from .ordered import OrderedSampler
from .pool import CompilePool, Examined
from .studies import ENVIRONMENT, Ledger

_FAVOURITES = 8
"""Configs of distinct machine code that the model has tried first."""
_SLOW, _FEW_SAMPLES = 1.25, 3
"""A config that is so many times as slow as the best after so many samples is stopped."""
_FEW_TRIALS = 10
"""With so many times the parameters that matter can be told."""
_HOPELESS_RUN = 12
"""So many failures in a row, which need not be the configs' fault, are the environment's."""
_POLL_SECONDS = 0.1
_OF_THE_CODE = ("compile_failed", "spilled", "over_budget", "wrong_result")
"""Failures that all configs of the same machine code share."""


@dataclass(frozen=True)
class StoppingRules:
    """Rules for the end of a search.

    Attributes:
        trials: configs tried in the study, by all processes and earlier runs together; None for
            all there are.
        seconds: of this run; None for no limit.
        target: stop once the best is within this part of the model's floor; None to go on.
    """

    trials: int | None = None
    seconds: float | None = None
    target: float | None = None

    def size(self, space: Space, is_measured: bool) -> int:
        """Trials of a space after which a search ends by itself.

        Where the model judges, it counts one of several configs that it cannot tell apart.
        """
        if not is_measured:
            return distinct(space, self.trials)
        feasible = len(space.feasible)
        return feasible if self.trials is None else min(self.trials, feasible)


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
    # The grid is walked here; the sampler only fills in the rest.
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
            space: of the configs that may be tried.
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
        self._default = str(space.default)
        self._first = [self._default, *first]
        favourites = self.candidates.favourites(_FAVOURITES if self._is_guided else 0)
        self._favourites = [self.candidates.texts[number] for number in favourites]
        self._knows_default = self._default not in self.candidates.numbers
        self._contest = Contest(space, self.candidates, measurer, self._first)
        self._broken: set[str] = set()
        self._failed_in_a_row = 0
        self._asks_model = False
        self.floor_ms = model.floor_ms(space.machine, space.problem)

    @property
    def size(self) -> int:
        """Configs that the search will have tried when it ends by itself."""
        return self._rules.size(self.space, self._measurer is not None)

    def records(self) -> list[Record]:
        """Records of all processes' trials, in order of trial; finalists as last measured."""
        return [self._contest.finals.get(r.config, r) for r in self.ledger.records()]

    def fastest(self) -> Record | None:
        """The fastest record so far, of all processes; None if nothing succeeded."""
        usable = [r for r in self.ledger.records() if r.outcome in USABLE]
        return min(usable, key=lambda record: record.time_ms, default=None)

    def run(self, on_record: Callable[[Record], None], on_idle: Callable[[], None]) -> None:
        """Try configs until a limit is reached or all are tried.

        Args:
            on_record: told each record when it is done.
            on_idle: called several times a second while compilers are waited for.

        However the search ends, it leaves the study ready to go on.

        Raises:
            LookupError: many configs in a row failed for reasons that are hardly theirs.
            NoCompilerError: compiler processes cannot be started.
        """
        self.ledger.give_up_abandoned()
        tried = self.ledger.tried()
        for record in self.ledger.records():
            if record.config in tried:
                self._note_broken(record)
        waiting: list[_Waiting] = []
        try:
            while True:
                awaited = self._awaits_default()
                while self._may_begin(len(waiting)) and (begun := self._begin()) is not None:
                    waiting += self._look_at(*begun, on_record)
                if waiting:
                    wait([each.future for each in waiting], _POLL_SECONDS, FIRST_COMPLETED)
                elif self._needs_default() and self.ledger.is_running(self._default):
                    # Another process is at it, or was until it died.
                    self.ledger.give_up_abandoned()
                    time.sleep(_POLL_SECONDS)
                elif not awaited or (self._awaits_default() and not self._may_begin(0)):
                    return
                on_idle()
                self.ledger.beat()
                for each in [each for each in waiting if each.future.done()]:
                    record = self._judge(each.config, each.future.result())
                    self._finish(each.trial, record, each.began, on_record)
                    waiting.remove(each)
                if self._is_over():
                    return
        finally:
            self.ledger.give_up_own()

    def _may_begin(self, waiting: int) -> bool:
        taken = self.ledger.taken()
        if waiting >= self._ahead or (self._awaits_default() and self._default in taken):
            return False
        if self._lacks_default() and self._default not in taken:
            return True
        has_room = self._rules.trials is None or len(taken) < self._rules.trials
        return has_room and not self._is_limited()

    def _is_over(self) -> bool:
        return self._is_limited() and not self._lacks_default()

    def _lacks_default(self) -> bool:
        """Whether something may win that the default has not been compared with."""
        self._knows_default = self._knows_default or self._default in self.ledger.tried()
        return not self._knows_default and self.fastest() is not None

    def _awaits_default(self) -> bool:
        """Whether the model as judge has yet to see the default, by which it leaves out others."""
        is_tried = self._knows_default or self._default in self.ledger.tried()
        return self._measurer is None and not is_tried

    def _needs_default(self) -> bool:
        return self._awaits_default() or self._lacks_default()

    def _is_limited(self) -> bool:
        """Whether a stopping rule holds."""
        rules = self._rules
        if rules.seconds is not None and self._clock() - self._began > rules.seconds:
            return True
        if rules.trials is not None and len(self.ledger.tried()) >= rules.trials:
            return True
        best = self.fastest()
        if rules.target is None or best is None:
            return False
        return best.time_ms <= (1 + rules.target) * max(self.floor_ms.values())

    @property
    def _is_guided(self) -> bool:
        """Whether the model proposes configs, too."""
        return self._sampler not in ("grid", "random")

    def _begin(self) -> tuple[Trial, Config] | None:
        """A trial, and the config that it has claimed; None if every config is taken."""
        candidates = self.candidates
        while True:
            taken = self.ledger.taken()
            is_free = candidates.free(taken, self._broken) & ~self._foreseen()
            may_win = is_free & ~self._hopeless()
            is_free = may_win if may_win.any() else is_free
            if self._default in candidates.numbers and self._default not in taken:
                # Also where other layouts of its code have failed: it gets a record of its own.
                is_free[candidates.numbers[self._default]] = True
            if not is_free.any():
                return None
            trial = self._ask(is_free)
            number = candidates.at(trial.params)
            # A trial that somebody has enqueued with Optuna need not be free, nor a config.
            is_wanted = number is not None and is_free[number]
            if is_wanted and self.ledger.claim(trial, candidates.texts[number]):
                return trial, candidates.configs[number]
            self.ledger.give_up(trial)

    def _ask(self, is_free: np.ndarray) -> Trial:
        """A trial of a free config: the first ones in order; then sampler and model take turns."""
        candidates = self.candidates
        texts = self._first + self._favourites
        numbers = [candidates.numbers[text] for text in texts if text in candidates.numbers]
        number = next((n for n in numbers if is_free[n]), None)
        if number is None and self._sampler == "grid":
            number = int(is_free.argmax())
        elif number is None:
            self._asks_model = self._is_guided and not self._asks_model
            if self._asks_model:
                number = candidates.favourite(self._times_ms(), is_free)
        if number is None:
            trial = self.ledger.ask(candidates.distributions)
            number = candidates.at(trial.params)
            if number is not None and is_free[number]:
                return trial
            number = candidates.nearest(trial.params, is_free)
            self.ledger.give_up(trial)
        return self.ledger.ask(candidates.distributions, candidates.choices(number))

    def _foreseen(self) -> np.ndarray:
        """Numbers (a mask) that the model as judge cannot tell from ones that work, or may yet."""
        if self._measurer is not None:
            return np.zeros(len(self.candidates.configs), bool)
        failed = {r.config for r in self.ledger.records() if r.outcome in FAILURES}
        return self.candidates.twins(self.ledger.taken() - failed, self._first)

    def _times_ms(self) -> dict[str, float]:
        """The times of compiled configs, also of those stopped because they were slow."""
        tried = [r for r in self.ledger.records() if r.resources is not None]
        return {r.config: r.time_ms for r in tried if math.isfinite(r.time_ms)}

    def _look_at(self, trial: Trial, config: Config, on_record) -> list[_Waiting]:
        """Have a config compiled, unless the model knows already that it is hopeless."""
        began = self._clock()
        if (why := self._why_hopeless(str(config))) is not None:
            estimate = float(self.candidates.estimates[self.candidates.numbers[str(config)]])
            why = f"not compiled: {why}"
            record = Record(str(config), "estimated", why, predicted_ms=estimate)
            self._finish(trial, record, began, on_record)
            return []
        future = self._pool.submit(config, self.space.problem.traits)
        return [_Waiting(trial, config, began, future)]

    def _hopeless(self) -> np.ndarray:
        """Numbers (a mask) whose machine code the model as judge need not see: none could win."""
        hopeless = np.zeros(len(self.candidates.configs), bool)
        best = self.fastest() if self._measurer is None else None
        if best is not None:
            hopeless = self.candidates.at_best >= best.time_ms
        if best is not None and (default := self._time_of_default()) is not None:
            hopeless |= self.candidates.at_best * (1 + self._contest.gains_needed) >= default
        # The default and what is remembered are tried in any case.
        firsts = [text for text in self._first if text in self.candidates.numbers]
        hopeless[[self.candidates.numbers[text] for text in firsts]] = False
        return hopeless

    def _why_hopeless(self, config: str) -> str | None:
        """The same of one config, in words; None if it may win."""
        number = self.candidates.numbers[config]
        if not self._hopeless()[number]:
            return None
        at_best, default = float(self.candidates.at_best[number]), self._time_of_default()
        if default is not None and default / at_best - 1 <= self._contest.gains_needed[number]:
            return (
                f"with as few registers and instructions as can be it would gain "
                f"{default / at_best - 1:.1%} over the default, and must gain more than "
                f"{self._contest.gains_needed[number]:.1%}, the model's error, to displace it"
            )
        return (
            f"with as few registers and instructions as can be it would take {at_best:.4g} ms, "
            f"the best takes {self.fastest().time_ms:.4g} ms"
        )

    def _time_of_default(self) -> float | None:
        """Milliseconds of the default; None while it was not tried, or where it failed."""
        found = [r.time_ms for r in self.ledger.records() if r.config == self._default]
        return found[0] if found and math.isfinite(found[0]) else None

    def _judge(self, config: Config, examined: Examined) -> Record:
        """The record of a config that came out of the compiler."""
        record = Record(str(config), "predicted", resources=examined.resources)
        if examined.failure is not None:
            return record.failed(*examined.failure)
        if (failure := self.space.judge_resources(examined.resources)) is not None:
            return record.failed(*failure)
        machine, problem, resources = self.space.machine, self.space.problem, examined.resources
        prediction = model.predict(machine, problem, config, resources, examined.code)
        known = {"resources": resources, "predicted_ms": prediction.ms, "parts": prediction.parts}
        if self._measurer is None:
            return replace(record, **known)
        measured = self._measurer.measure(self.space.problem, str(config), self._is_slow)
        return replace(measured, **known)

    def _is_slow(self, samples: list[float]) -> bool:
        """Whether a config is so far behind that more samples are wasted."""
        best = self.fastest()
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
        """(the default's record, the winner's), whose reason says why a faster one did not win.

        Args:
            again: measure the finalists against each other first, where there is a GPU.

        Raises:
            LookupError: nothing that was tried can be used, or the default was not tried.
        """
        return self._contest.winner(self.ledger.records(), self._lacks_default(), again)

    def importances(self) -> dict[str, float]:
        """Each dimension's share in the variation of the time; empty while too little is known."""
        if sum(record.outcome in USABLE for record in self.ledger.records()) < _FEW_TRIALS:
            return {}
        try:
            return optuna.importance.get_param_importances(
                self._study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except Exception:  # whatever it is, it costs a chart
            return {}
