"""The feasible configs of a space as a table: the choices of each, and the model's estimate.

Proposals are moved to the nearest row that is free, and rows are ranked by the model, corrected by
measurements: each choice of each dimension gets a factor by which the model errs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution

from numflash.configs import Config
from numflash.problem.classes import ProblemClass

from .. import model
from ..space.configs import Space
from ..space.machines import Machine

_FEWEST_TIMES = 6
"""Measured configs from which the model's errors are learned."""
_RIDGE = 1.0
"""The evidence that an error needs: that of one measured config."""


class Candidates:
    """The feasible configs of a space, numbered.

    Attributes:
        configs, texts: of each number.
        numbers: text -> number.
        estimates: milliseconds by the model before anything is compiled, of each number; infinite
            where no block fits.
        at_best: milliseconds that no machine code of each number is predicted to beat.
        distributions: asked of a sampler: a choice of each dimension that has several.
    """

    def __init__(self, space: Space):
        self.configs: list[Config] = list(space.feasible)
        self.texts = [str(config) for config in self.configs]
        self.numbers = {text: number for number, text in enumerate(self.texts)}
        several = {name: c for name, c in space.dimensions.items() if len(c) > 1}
        self.distributions = {n: CategoricalDistribution(c) for n, c in several.items()}
        self._place_of = {n: {each: i for i, each in enumerate(c)} for n, c in several.items()}
        self._places = np.array(
            [self._place(values) for values in space.feasible.values()], dtype=np.int64
        ).reshape(len(self.configs), len(several))
        self._at = {tuple(place): number for number, place in enumerate(self._places.tolist())}
        codes: dict[Config, int] = {}
        self._codes = np.array(
            [codes.setdefault(getattr(c, "compiled", c), len(codes)) for c in self.configs]
        )
        self._space = space
        self.estimates = np.array([_estimate(space, config) for config in self.configs])
        self._choices = self._one_hot([len(choices) for choices in several.values()])

    @cached_property
    def at_best(self) -> np.ndarray:
        """As above; infinite where no block fits."""
        found = [_estimate(self._space, each, model.at_best) for each in self.configs]
        return np.array(found)

    def _one_hot(self, sizes: list[int]) -> np.ndarray:
        """A row for each config with a 1 for its choice in each dimension."""
        offsets = np.cumsum([0, *sizes])
        choices = np.zeros((len(self.configs), offsets[-1]))
        for dimension, offset in enumerate(offsets[:-1]):
            choices[np.arange(len(self.configs)), offset + self._places[:, dimension]] = 1
        return choices

    def free(self, taken: Iterable[str], broken: Iterable[str]) -> np.ndarray:
        """A mask of the numbers that are neither taken nor of a broken config's machine code."""
        is_free = np.ones(len(self.configs), bool)
        is_free[[self.numbers[text] for text in taken if text in self.numbers]] = False
        codes = [self._codes[self.numbers[text]] for text in broken if text in self.numbers]
        return is_free & ~np.isin(self._codes, codes)

    def twins(self, texts: Iterable[str], wanted: Iterable[str] = ()) -> np.ndarray:
        """A mask of the numbers with the estimate of one of these texts, but the wanted ones."""
        known = [self.numbers[text] for text in texts if text in self.numbers]
        are_twins = np.isin(self.estimates, self.estimates[known]) & np.isfinite(self.estimates)
        are_twins[[self.numbers[text] for text in wanted if text in self.numbers]] = False
        return are_twins

    def at(self, chosen: Mapping[str, Any]) -> int | None:
        """The number of the config with these choices; None if it is not feasible."""
        return self._at.get(self._place(chosen))

    def choices(self, number: int) -> dict[str, Any]:
        """The choices of a config, as a sampler is asked for them."""
        places = zip(self.distributions.items(), self._places[number], strict=True)
        return {name: distribution.choices[i] for (name, distribution), i in places}

    def nearest(self, chosen: Mapping[str, Any], is_free: np.ndarray) -> int:
        """The free number the fewest steps away; of several the one with the best estimate."""
        place = np.array(self._place(chosen), dtype=np.int64)
        steps = np.abs(self._places - place).sum(axis=1)
        order = np.lexsort((self.estimates, steps))
        return int(order[is_free[order]][0])

    def _place(self, chosen: Mapping[str, Any]) -> tuple[int, ...]:
        """The index of each choice in its dimension."""
        return tuple(places[chosen[name]] for name, places in self._place_of.items())

    def favourite(self, times_ms: dict[str, float], is_free: np.ndarray) -> int:
        """The free number that the model, corrected by these times, likes best."""
        expected = np.log(self.estimates) + self._errors(times_ms)
        expected[~is_free] = math.inf
        best = int(np.argmin(expected))
        return best if is_free[best] else int(np.flatnonzero(is_free)[0])

    def favourites(self, count: int) -> list[int]:
        """The numbers with the best estimates, each of machine code of its own.

        Of those that the model cannot tell from each other only the first.
        """
        order = np.argsort(self.estimates, kind="stable")
        _, first = np.unique(self._codes[order], return_index=True)
        order = order[np.sort(first)]
        _, first = np.unique(self.estimates[order], return_index=True)
        return order[np.sort(first)][:count].tolist()

    def _errors(self, times_ms: dict[str, float]) -> np.ndarray:
        """log(time / estimate) to be expected of each number: a ridge regression on choices."""
        known = self._known(times_ms)
        if len(known) < _FEWEST_TIMES:
            return np.zeros(len(self.configs))
        times = np.array([times_ms[self.texts[number]] for number in known])
        errors = np.log(times / self.estimates[known])
        choices = self._choices[known]
        weights = np.linalg.solve(
            choices.T @ choices + _RIDGE * np.eye(choices.shape[1]),
            choices.T @ (errors - errors.mean()),
        )
        return errors.mean() + self._choices @ weights

    def _known(self, times_ms: dict[str, float]) -> list[int]:
        """The numbers of these configs that have an estimate."""
        known = [self.numbers[text] for text in times_ms if text in self.numbers]
        return [number for number in known if math.isfinite(self.estimates[number])]


def _estimate(space: Space, config: Config, by: Callable = model.estimate) -> float:
    """Milliseconds by formula; infinite where no block fits."""
    return _milliseconds(by, space.machine, space.problem, config)


@lru_cache(maxsize=1 << 15)
def _milliseconds(by: Callable, machine: Machine, problem: ProblemClass, config: Config) -> float:
    """The same, remembered: a space is asked when it is counted, and again when it is searched."""
    try:
        return by(machine, problem, config).ms
    except ValueError:
        return math.inf


def distinct(space: Space, most: int | None = None) -> int:
    """The number of feasible configs that the model can tell apart, counted up to `most`."""
    estimates: set[float] = set()
    for config in space.feasible:
        if len(estimates) == most:
            break
        estimates.add(_estimate(space, config))
    return len(estimates)
