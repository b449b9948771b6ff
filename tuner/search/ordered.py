"""Samplers that know the order of choices, in studies that keep the choices themselves.

To Optuna a parameter with a list of choices is categorical: no choice is nearer to another, and
CMA-ES leaves it out. But the choices of a dimension have an order. So a study keeps values, which
other tools of Optuna show, and its sampler sees the place of each among its choices.
"""

import copy
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

_Space = dict[str, BaseDistribution]


class OrderedSampler(BaseSampler):
    """A sampler for one study whose categorical parameters have ordered choices."""

    def __init__(self, sampler: BaseSampler):
        """`sampler` proposes; categorical parameters are integers to it, from 0 on."""
        self._sampler = sampler
        self._finished: dict[int, FrozenTrial] = {}
        self._choices: dict[str, CategoricalDistribution] = {}

    def reseed_rng(self) -> None:
        """As `BaseSampler.reseed_rng`."""
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> _Space:
        """As `BaseSampler.infer_relative_search_space`."""
        seen = self._sampler.infer_relative_search_space(_Places(study, self), self.seen(trial))
        return {name: self._choices.get(name, seen[name]) for name in seen}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: _Space
    ) -> dict[str, Any]:
        """As `BaseSampler.sample_relative`."""
        space = {name: _places(distribution) for name, distribution in search_space.items()}
        found = self._sampler.sample_relative(_Places(study, self), self.seen(trial), space)
        return {name: _choice(search_space[name], place) for name, place in found.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As `BaseSampler.sample_independent`."""
        place = self._sampler.sample_independent(
            _Places(study, self), self.seen(trial), param_name, _places(param_distribution)
        )
        return _choice(param_distribution, place)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As `BaseSampler.before_trial`."""
        self._sampler.before_trial(_Places(study, self), self.seen(trial))

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state, values) -> None:
        """As `BaseSampler.after_trial`."""
        self._sampler.after_trial(_Places(study, self), self.seen(trial), state, values)

    def seen(self, trial: FrozenTrial) -> FrozenTrial:
        """A trial as the sampler sees it."""
        if trial.number in self._finished:
            return self._finished[trial.number]
        shown = copy.copy(trial)
        shown.params = _places_of(trial.params, trial.distributions)
        shown.distributions = {n: _places(d) for n, d in trial.distributions.items()}
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                self._choices[name] = distribution
        if trial.state.is_finished():
            self._finished[trial.number] = shown
        return shown


class _Places:
    """A study as the sampler sees it."""

    def __init__(self, study: optuna.Study, sampler: OrderedSampler):
        self._study_itself, self._sampler = study, sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study_itself, name)

    def _get_trials(self, *args, **kwargs) -> list[FrozenTrial]:
        return list(map(self._sampler.seen, self._study_itself._get_trials(*args, **kwargs)))

    def get_trials(self, *args, **kwargs) -> list[FrozenTrial]:
        return list(map(self._sampler.seen, self._study_itself.get_trials(*args, **kwargs)))

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()


def _places(distribution: BaseDistribution) -> BaseDistribution:
    """The distribution of a choice's place."""
    if isinstance(distribution, CategoricalDistribution):
        return IntDistribution(0, len(distribution.choices) - 1)
    return distribution


def _places_of(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> dict:
    """Parameters with places instead of choices."""
    return {
        name: int(distributions[name].to_internal_repr(value))
        if isinstance(distributions[name], CategoricalDistribution)
        else value
        for name, value in params.items()
    }


def _choice(distribution: BaseDistribution, place: Any) -> Any:
    """The choice at a place."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[place]
    return place
