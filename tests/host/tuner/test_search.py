"""The search: what is tried first, what never twice, when it stops, and what wins."""

import itertools
import math
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("optuna")
import optuna

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from tests.support.covering import FULL, some, thorough
from tests.support.synthetic_recording import recording_of
from tuner import SAMPLERS, model
from tuner.measuring.replay import Replay
from tuner.model import errors
from tuner.records import Record, ResourceUsage
from tuner.search.candidates import Candidates
from tuner.search.pool import Examined
from tuner.search.search import Search, StoppingRules, make_sampler
from tuner.search.studies import Ledger
from tuner.space import machines
from tuner.space.configs import Budgets, Space

MACHINE = machines.find("NVIDIA A100-SXM4-80GB")
DQ = ProblemClass.parse("backward-dq float16-d128-dv128-vec full q4096 k4096 bh64 g1")
FORWARD = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")


class InstantPool:
    """A CompilePool that knows the outcome at once: `spills` configs do, all others are fine."""

    def __init__(self, space, spills=()):
        self.space, self.spills, self.submitted = space, set(spills), []

    def submit(self, config, traits):
        """The future of a config, already done."""
        self.submitted.append(str(config))
        future = Future()
        spill = 64 if str(config) in self.spills else 0
        resources = ResourceUsage(
            128, spill, config.smem_bytes(traits), config.num_threads, 2, "registers"
        )
        future.set_result(Examined(resources))
        return future


class LatePool(InstantPool):
    """One whose compilers are done only when they are waited for."""

    def __init__(self, space):
        super().__init__(space)
        self.waiting, self.together = [], 0

    def submit(self, config, traits):
        """The future of a config, not done yet."""
        future = Future()
        self.waiting.append((future, super().submit(config, traits).result()))
        self.together = max(self.together, len(self.waiting))
        return future

    def finish(self):
        """Be done with all."""
        for future, examined in self.waiting:
            future.set_result(examined)
        self.waiting = []


def make_search(space, measurer=None, rules=None, *, sampler="tpe", pool=None, study=None, **more):
    """A search in memory."""
    if study is None:
        study = optuna.create_study(sampler=make_sampler(sampler, 0), direction="minimize")
    pool = pool or InstantPool(space)
    return Search(space, study, pool, measurer, rules or StoppingRules(), sampler=sampler, **more)


def run(search):
    """Run a search; the records that it told of."""
    told = []
    search.run(told.append, lambda: None)
    return told


def space_of(problem=DQ, budgets=None):
    """The space of a class on an A100."""
    return Space(problem, MACHINE, budgets or Budgets())


@pytest.mark.parametrize("seed", range(2) if FULL else [0])
@pytest.mark.parametrize("problem", some([DQ, FORWARD], DQ), ids=lambda problem: problem.family)
def test_a_quarter_of_the_time_comes_within_two_percent_of_the_best(problem, seed):
    space = space_of(problem)
    recording = recording_of(space, seed)
    replay = Replay(recording)
    rules = StoppingRules(seconds=recording.seconds / 4)
    search = make_search(space, replay, rules, clock=lambda: replay.seconds)
    run(search)
    _, best = search.winner()
    assert replay.seconds <= recording.seconds / 4 + 60
    assert recording.records[best.config].median_ms <= 1.02 * recording.best.median_ms


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_tries_every_config_once_and_then_ends(sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    space = space_of()
    told = run(make_search(space, Replay(recording_of(space, 0)), sampler=sampler))
    counts = Counter(record.config for record in told)
    assert counts == Counter(map(str, space.feasible))


def test_the_default_and_the_favourites_come_first():
    space = space_of()
    told = run(make_search(space, rules=StoppingRules(trials=9)))
    assert told[0].config == str(space.default)
    estimates = sorted(space.feasible, key=lambda c: model.estimate(MACHINE, DQ, c).ms)
    assert {record.config for record in told[1:4]} <= set(map(str, estimates[:4]))


@thorough
def test_of_favourites_that_the_model_cannot_tell_apart_one_is_tried():
    hopper = ProblemClass.parse("forward bfloat16-d128-dv128-vec full q4096 k4096 bh64 g1")
    candidates = Candidates(Space(hopper, machines.find("H200"), Budgets()))
    found = candidates.favourites(8)
    assert len(found) == len({candidates.estimates[number] for number in found}) == 8
    assert candidates.estimates[found[0]] == candidates.estimates.min()
    assert list(candidates.estimates[found]) == sorted(candidates.estimates[found])


@thorough
def test_without_a_gpu_what_could_not_displace_the_default_is_not_compiled():
    space = space_of()
    search = make_search(space)
    told = run(search)
    estimated = [record for record in told if record.outcome == "estimated"]
    assert estimated and not {record.config for record in estimated} & set(search._pool.submitted)
    default, best = told[0], min(r.time_ms for r in told if r.outcome == "predicted")
    assert default.config == str(space.default)
    for record in estimated:
        config = parse_config(DQ.family, record.config)
        at_best = model.at_best(MACHINE, DQ, config).ms
        needed = model.gain_needed(MACHINE, DQ, config, space.default)
        assert default.time_ms / at_best - 1 <= needed or at_best >= best
        assert record.reason.startswith("not compiled: with as few registers and instructions as")


def test_without_a_gpu_all_that_could_displace_the_default_is_compiled_before_the_rest():
    space = space_of()
    candidates = Candidates(space)
    needed = errors.ERRORS["sm80 backward"]
    # So slow a default that the fastest tenth may displace it, as one that spills would be.
    bar = float(np.quantile(candidates.at_best, 0.1))
    slow = Record(str(space.default), "predicted", predicted_ms=bar * (1 + needed) * 1.0001)
    study = optuna.create_study(direction="minimize")
    ledger = Ledger(study)
    assert ledger.finish(ledger.ask(), slow)
    told = run(make_search(space, study=study))
    outcomes = [record.outcome for record in told]
    compiled = outcomes.count("predicted")
    assert 0 < compiled < len(told) and "predicted" not in outcomes[compiled:]
    assert min(r.time_ms for r in told[:compiled]) < bar
    # What is faster at best than what came out was looked at, or has a twin that was.
    best = min(record.time_ms for record in told[:compiled])
    seen = {candidates.estimates[candidates.numbers[record.config]] for record in told[:compiled]}
    assert set(candidates.estimates[candidates.at_best < min(best, bar)]) <= seen


def test_without_a_gpu_nothing_is_begun_beside_the_default():
    space = space_of()
    pool = LatePool(space)
    search = make_search(space, pool=pool, rules=StoppingRules(trials=3))
    search.run(lambda record: None, pool.finish)
    assert pool.submitted[0] == str(space.default) and pool.together == 1


def test_trials_are_counted_over_runs():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    assert len(run(make_search(space, study=study, rules=StoppingRules(trials=10)))) == 10
    assert len(run(make_search(space, study=study, rules=StoppingRules(trials=15)))) == 5
    assert run(make_search(space, study=study, rules=StoppingRules(trials=15))) == []


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_the_default_and_what_is_remembered_are_tried_whatever_the_sampler(sampler):
    space = space_of()
    incumbent = str(list(space.feasible)[-1])
    search = make_search(space, rules=StoppingRules(trials=2), sampler=sampler, first=[incumbent])
    assert [record.config for record in run(search)] == [str(space.default), incumbent]
    default, _ = search.winner()
    assert default.config == str(space.default) and default.time_ms > 0


def others(space, count):
    """Configs that are not the default, as texts."""
    return [str(config) for config in space.feasible if config != space.default][-count:]


def try_earlier(study, configs, ms=1e-3):
    """As an earlier run would: without a GPU these took that time."""
    ledger = Ledger(study)
    for config in configs:
        trial = ledger.ask()
        assert ledger.claim(trial, config)
        resources = ResourceUsage(128, 0, 1000, 128, 2, "registers")
        record = Record(config, "predicted", resources=resources, predicted_ms=ms)
        assert ledger.finish(trial, record)


def test_the_default_is_tried_first_whatever_was_enqueued():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    search = make_search(space, study=study, rules=StoppingRules(trials=3))
    numbers = [search.candidates.numbers[config] for config in others(space, 8)]
    for number in numbers:
        study.enqueue_trial(search.candidates.choices(number))
    told = [record.config for record in run(search)]
    assert told[0] == str(space.default) and len(told) == 3
    default, best = search.winner()
    assert default.config == str(space.default) and math.isfinite(default.time_ms)
    assert best == default or best.time_ms <= 0.95 * default.time_ms


@pytest.mark.parametrize("rules", [StoppingRules(trials=4), StoppingRules(seconds=0.0)])
def test_a_limit_that_was_reached_before_the_default_was_tried_waits_for_it(rules):
    space = space_of()
    study = optuna.create_study(direction="minimize")
    try_earlier(study, others(space, 4))
    ticks = itertools.count()
    search = make_search(space, study=study, rules=rules, clock=lambda: next(ticks))
    assert str(space.default) in [record.config for record in run(search)]
    default, best = search.winner()
    assert math.isfinite(default.time_ms) and best.config in others(space, 4)


def test_without_the_default_there_is_no_winner():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    try_earlier(study, others(space, 4))
    with pytest.raises(LookupError, match=f"its default, {space.default}, was not tried"):
        make_search(space, study=study).winner()


def test_a_default_that_another_process_is_trying_is_waited_for():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    other, default = Ledger(study), str(space.default)
    trial = other.ask()
    assert other.claim(trial, default)
    search = make_search(space, study=study, rules=StoppingRules(trials=3))
    idled = []

    def idle():
        idled.append(len(search.ledger.records()))
        if len(idled) == 3:
            other.finish(trial, Record(default, "spilled", "64 bytes"))

    told = []
    search.run(told.append, idle)
    # The model judges nothing before it knows the default.
    assert idled[:3] == [0, 0, 0] and len(told) == 2
    assert search.winner()[0].outcome == "spilled"


def test_a_default_that_another_process_is_measuring_is_waited_for():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    other, default, recording = Ledger(study), str(space.default), recording_of(space, 0)
    trial = other.ask()
    assert other.claim(trial, default)
    rules = StoppingRules(trials=3)
    search = make_search(space, Replay(recording), rules, study=study)
    idled = []

    def idle():
        idled.append(len(search.ledger.records()))
        if idled[-1] >= 2 and idled.count(2) == 3:
            other.finish(trial, Record(default, "spilled", "64 bytes"))

    told = []
    search.run(told.append, idle)
    assert idled.count(2) == 3 and len(told) == 2
    assert search.winner()[0].outcome == "spilled"


def test_a_default_whose_code_is_known_to_be_broken_has_a_record_of_its_own():
    space = space_of(FORWARD)
    default = space.default
    same_code = [str(c) for c in space.feasible if c.compiled == default.compiled]
    study = optuna.create_study(direction="minimize")
    ledger = Ledger(study)
    trial = ledger.ask()
    ledger.claim(trial, next(text for text in same_code if text != str(default)))
    broken = next(text for text in same_code if text != str(default))
    ledger.finish(trial, Record(broken, "spilled", "64 bytes"))
    pool = InstantPool(space, spills=same_code)
    search = make_search(space, pool=pool, study=study, rules=StoppingRules(trials=4))
    run(search)
    assert search.winner()[0].outcome == "spilled"


def test_what_is_remembered_is_measured_against_the_finalists():
    space = space_of()
    incumbent = str(list(space.feasible)[-1])
    recording = recording_of(space, 0)
    best = replace(recording.records[incumbent], samples_ms=(1e-3,) * 9)
    recording.records[incumbent] = replace(best, samples_ms=(1e3, 1e3, 1e3))
    search = make_search(space, Replay(recording), StoppingRules(trials=20), first=[incumbent])
    run(search)
    recording.records[incumbent] = best
    assert search.winner()[1].config == incumbent


def test_a_run_in_which_everything_fails_ends():
    space = space_of(FORWARD)

    class Broken(InstantPool):
        def submit(self, config, traits):
            future = Future()
            future.set_result(Examined(failure=("compile_failed", "no memory")))
            return future

    with pytest.raises(LookupError, match=r"12 configs .* in a row failed, .* no memory"):
        run(make_search(space, pool=Broken(space)))


def test_a_target_ends_the_search():
    space = space_of()
    search = make_search(space, rules=StoppingRules(target=100.0))
    assert len(run(search)) < 10
    assert search.fastest().time_ms <= 101 * max(search.floor_ms.values())


@thorough
def test_slow_configs_are_stopped_after_a_few_samples():
    space = space_of()
    told = run(make_search(space, Replay(recording_of(space, 1))))
    slow = [record for record in told if record.outcome == "slow"]
    samples = [len(record.samples_ms) for record in slow]
    # One that is about as slow as allowed may need more samples than the fewest.
    assert all(3 <= n < 9 for n in samples) and samples.count(3) > 0.9 * len(samples)


@thorough
def test_what_fails_is_a_record_and_other_layouts_of_its_code_are_left_out():
    space = space_of(FORWARD)
    default = space.default
    same_code = [config for config in space.feasible if config.compiled == default.compiled]
    assert len(same_code) > 1
    pool = InstantPool(space, spills=map(str, same_code))
    rules = StoppingRules(trials=40)
    told = {record.config: record for record in run(make_search(space, rules=rules, pool=pool))}
    assert told[str(default)].outcome == "spilled" and "64 bytes" in told[str(default)].reason
    # A few may have been on their way together.
    assert sum(str(config) in told for config in same_code) < len(same_code)


class Dying(Replay):
    """A measurer that is interrupted."""

    def measure(self, problem, config, stop):
        """Raise at the fifth config."""
        if len(self._random) == 4:
            raise KeyboardInterrupt
        return super().measure(problem, config, stop)


def test_an_interrupted_search_frees_what_it_was_trying():
    space = space_of()
    study = optuna.create_study(direction="minimize")
    recording = recording_of(space, 0)
    with pytest.raises(KeyboardInterrupt):
        run(make_search(space, Dying(recording), study=study))
    ledger = Ledger(study)
    done = {record.config for record in ledger.records()}
    assert len(done) == 4 and ledger.taken() == done
    told = run(make_search(space, Replay(recording), study=study))
    assert {record.config for record in told} == set(map(str, space.feasible)) - done
