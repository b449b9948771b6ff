"""What wins a search: beyond the model's error, by measurement, and in ties."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("optuna")
import optuna

from numflash.problem.classes import ProblemClass
from tests.host.tuner.test_search import (
    DQ,
    FORWARD,
    InstantPool,
    make_search,
    run,
    space_of,
)
from tests.support.covering import thorough
from tests.support.synthetic_recording import recording_of
from tuner.measuring.replay import Recording, Replay
from tuner.model import errors
from tuner.records import Record, ResourceUsage
from tuner.search.candidates import Candidates, distinct
from tuner.search.search import StoppingRules
from tuner.search.studies import Ledger
from tuner.space import machines
from tuner.space.configs import Space


def chosen(times, *, measured=False, smem=None, final=None, space=None):
    """(default, best) of a search in which configs took these times."""
    space = space or space_of()
    study = optuna.create_study(direction="minimize")
    ledger = Ledger(study)
    for config, ms in times.items():
        resources = ResourceUsage(128, 0, (smem or {}).get(config, 1000), 128, 2, "registers")
        record = Record(config, "predicted", resources=resources, predicted_ms=ms)
        if measured:
            record = replace(record, outcome="measured", samples_ms=(ms,) * 5)
        ledger.finish(study.ask(), record)
    measurer = None
    if measured:
        final = {**times, **(final or {})}
        records = {
            config: Record(config, "measured", samples_ms=(ms,) * 5)
            for config, ms in final.items()
        }
        measurer = Replay(Recording({}, DQ, {}, records))
    default, best = make_search(space, measurer, study=study).winner()
    reasons.append(best.reason)
    return default.config, best.config


reasons = []
"""Of the winners of `chosen`."""


DEFAULT = str(space_of().default)
A, B = "sm80-m64n64w4s1", "sm80-m64n32w4s1"


def test_a_prediction_displaces_the_default_only_beyond_the_models_error():
    least = 1 + errors.ERRORS["sm80 backward"]
    assert chosen({DEFAULT: least, A: 1.01}) == (DEFAULT, DEFAULT)
    assert reasons[-1] == (
        f"{A} is predicted to gain {least / 1.01 - 1:.1%} over the default, and must gain more "
        f"than {errors.ERRORS['sm80 backward']:.1%}, the model's error, to displace it"
    )
    assert chosen({DEFAULT: least, A: 0.99}) == (DEFAULT, A) and reasons[-1] == ""
    assert chosen({DEFAULT: 1.0, A: 1.1}) == (DEFAULT, DEFAULT) and reasons[-1] == ""


@thorough
def test_between_two_kernels_both_errors_count():
    problem = ProblemClass.parse("forward float16-d64-dv64-vec causal q512 k512 bh1024 g1")
    space = Space(problem, machines.find("H100"))
    default, own = str(space.default), "sm90-m128n128w8s2-overlap-pingpong-persistent"
    assert default.startswith("sm90-") and default != own
    both = (1 + errors.ERRORS["sm80 forward"]) * (1 + errors.ERRORS["sm90 forward"])
    other = "sm80-m128n128w4s1"
    assert chosen({default: both, other: 1.01}, space=space)[1] == default
    assert f"{other} is predicted to gain" in reasons[-1]
    assert f"must gain more than {both - 1:.1%}, the model's error" in reasons[-1]
    assert chosen({default: both, other: 0.99}, space=space)[1] == other
    # A slower one of the same kind, whose gain is beyond its error, wins over a faster one whose
    # gain is within both.
    assert chosen({default: 1.13, own: 0.995, other: 0.98}, space=space)[1] == own
    assert reasons[-1].startswith(f"{other} is predicted to gain 15.3% over the default")


@thorough
def test_offline_nothing_is_tried_that_the_model_cannot_tell_from_what_was():
    space = space_of(FORWARD)
    candidates = Candidates(space)
    told = [record.config for record in run(make_search(space))]
    estimates = [candidates.estimates[candidates.numbers[config]] for config in told]
    finite = [each for each in estimates if math.isfinite(each)]
    assert len(set(finite)) == len(finite)
    assert StoppingRules().size(space, is_measured=False) == len(told)
    assert StoppingRules(trials=7).size(space, is_measured=False) == 7
    # Every estimate there is was tried, by the default where it has it.
    assert set(estimates) == set(candidates.estimates.tolist())
    assert str(space.default) in told
    assert len(told) < len(candidates.configs) / 3


@thorough
def test_offline_a_twin_of_what_failed_is_tried():
    space = space_of(FORWARD)
    candidates = Candidates(space)
    twins = candidates.twins([str(space.default)])
    others = [c for c, is_twin in zip(candidates.configs, twins, strict=True) if is_twin]
    codes = {config.compiled for config in others}
    assert len(codes) > 1, "the default has no twin of other machine code"
    failing = [c for c in others if c.compiled == space.default.compiled]
    pool = InstantPool(space, spills=map(str, failing))
    told = {record.config: record for record in run(make_search(space, pool=pool))}
    tried = [told[str(c)].outcome for c in others if str(c) in told]
    assert tried.count("predicted") == 1, tried


@thorough
def test_with_a_gpu_twins_are_tried():
    space = space_of()
    told = run(make_search(space, Replay(recording_of(space, 0))))
    assert len(told) == len(space.feasible) > distinct(space)
    assert StoppingRules().size(space, is_measured=True) == len(told)


def test_a_measurement_displaces_the_default_by_any_gain():
    assert chosen({DEFAULT: 1.0, A: 0.97}, measured=True) == (DEFAULT, A)


def test_finalists_are_measured_again_before_one_wins():
    assert chosen({DEFAULT: 1.0, A: 0.8, B: 0.9}, measured=True, final={A: 0.95}) == (DEFAULT, B)


def test_ties_go_to_less_shared_memory():
    times = {DEFAULT: 2.0, A: 1.0, B: 1.005}
    assert chosen(times, measured=True, smem={A: 2000, B: 1000}) == (DEFAULT, B)
    assert reasons[-1] == (
        f"{A} is faster by less than 1%, which counts as equal, and takes more shared memory"
    )
    assert chosen(times, measured=True, smem={A: 1000, B: 2000}) == (DEFAULT, A)
    assert reasons[-1] == ""


@thorough
def test_nothing_that_works_is_an_error_that_says_what_failed():
    space = space_of()
    search = make_search(space, pool=InstantPool(space, spills=map(str, space.feasible)))
    run(search)
    with pytest.raises(LookupError, match=r"\d+ spilled \(64 bytes"):
        search.winner()


@thorough
def test_importances_are_shares():
    space = space_of()
    search = make_search(space, Replay(recording_of(space, 0)))
    assert search.importances() == {}  # nothing is known yet
    run(search)
    shares = search.importances()
    assert set(shares) <= set(space.dimensions)
    assert math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6)
