"""Studies keep the values of choices, and samplers still see their order."""

import pytest

pytest.importorskip("optuna")
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from tuner.search.ordered import OrderedSampler

CHOICES = {
    "tile": (16, 32, 48, 64, 96, 128, 192, 256),
    "on": (False, True),
    "generation": ("sm80", "sm90"),
    "registers": (0, 152, 232),
}
OTHERS = {"x": FloatDistribution(0.5, 8.0, log=True), "n": IntDistribution(2, 64, step=2)}


def tpe():
    """The sampler of most searches."""
    return optuna.samplers.TPESampler(seed=1, constant_liar=True)


def cmaes():
    """The sampler that leaves categorical parameters out."""
    pytest.importorskip("cmaes")
    return optuna.samplers.CmaEsSampler(seed=1, warn_independent_sampling=False)


def proposals(sampler, choices, count=40):
    """The places of what is proposed, one after the other; some trials fail, one is enqueued."""
    study = optuna.create_study(sampler=sampler)
    found = []
    for number in range(count):
        if number == 20:
            places = {"tile": 3, "on": 1, "generation": 0, "registers": 2}
            study.enqueue_trial({n: _at(choices[n], place) for n, place in places.items()})
        trial = study.ask({**choices, **OTHERS})
        places = {n: _place(choices[n], trial.params[n]) for n in choices}
        found.append({**places, **{n: trial.params[n] for n in OTHERS}})
        if number % 7 == 3:
            study.tell(trial, state=TrialState.FAIL)
        elif number % 7 != 5:  # these go on
            cost = (places["tile"] - 5) ** 2 + places["registers"] + (not places["on"])
            study.tell(trial, cost + trial.params["x"])
    return found, study


def _place(distribution, value):
    is_categorical = isinstance(distribution, CategoricalDistribution)
    return distribution.choices.index(value) if is_categorical else value


def _at(distribution, place):
    is_categorical = isinstance(distribution, CategoricalDistribution)
    return distribution.choices[place] if is_categorical else place


@pytest.mark.parametrize("make", [tpe, cmaes])
def test_proposals_are_those_for_places_in_an_order(make):
    ordered = {n: CategoricalDistribution(c) for n, c in CHOICES.items()}
    places = {n: IntDistribution(0, len(c) - 1) for n, c in CHOICES.items()}
    found, study = proposals(OrderedSampler(make()), ordered)
    assert found == proposals(make(), places)[0]
    # Without the order it would be another search.
    assert found != proposals(make(), ordered)[0]
    for trial in study.trials:
        assert {n: trial.distributions[n] for n in ordered} == ordered
        assert all(trial.params[n] in choices for n, choices in CHOICES.items())
