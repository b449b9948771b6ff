"""Tuning the forward on 8-bit floats: its space, and a search that no model guides."""

import itertools

import pytest

pytest.importorskip("optuna")
from numflash.problem.classes import ProblemClass
from numflash.selection import store
from tests.host.tuner.test_search import make_search, run
from tests.host.tuner.test_session import DEVICE, MACHINE, InstantPool, Stopwatch
from tuner.search import candidates, guide, session
from tuner.search.candidates import Candidates
from tuner.search.search import StoppingRules
from tuner.search.session import Options, Session
from tuner.space import machines
from tuner.space.configs import Budgets, Space
from tuner.space.dimensions import GEOMETRY

FP8 = ProblemClass.parse("forward float16-d64-dv64-vec-fp8 full q4096 k4096 bh64 g1")
KEY_SCALES = ProblemClass.parse("forward float16-d64-dv64-vec-fp8-keyscales full q512 k512 bh8 g1")
IN_16_BITS = ProblemClass.parse("forward float16-d64-dv64-vec full q4096 k4096 bh64 g1")


def space_of(problem=FP8, machine=MACHINE):
    """The space of a class."""
    return Space(problem, machine, Budgets())


@pytest.mark.parametrize(
    ("gpu", "beginnings"),
    [
        ("Tesla T4", {"fp8-sm75": ""}),
        ("NVIDIA A100-SXM4-80GB", {"fp8-sm80": ""}),
        ("sm_89", {"fp8-sm89": "either"}),
        ("NVIDIA H200", {"fp8-sm90": "", "fp8-sm89": "half"}),
        ("sm_100", {"fp8-sm89": "half"}),
        ("sm_120", {"fp8-sm89": "either"}),
    ],
)
def test_a_gpu_has_the_configs_of_its_instructions(gpu, beginnings):
    found = space_of(machine=machines.find(gpu))
    halves: dict = {}
    for config in found.feasible:
        kind = "half" if getattr(config, "half", False) else ""
        halves.setdefault(str(config)[: len("fp8-sm80")], set()).add(kind)
    wanted = {
        name: {"", "half"} if kind == "either" else {kind} for name, kind in beginnings.items()
    }
    assert halves == wanted
    assert found.default in found.feasible


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "sm_89", "NVIDIA H200"])
def test_tiles_hold_keys_of_one_scale_unless_each_keys_is_looked_up(gpu):
    machine = machines.find(gpu)
    tiles = {config.tile_n for config in space_of(machine=machine).feasible}
    assert {64, 128} <= tiles <= {32, 64, 128}
    assert "have several scales" in space_of(machine=machine).examples["scales of keys"]
    looked_up = space_of(KEY_SCALES, machine)
    assert {192, 256} <= {config.tile_n for config in looked_up.feasible}
    assert "scales of keys" not in looked_up.excluded
    is_hopper = any(str(config).startswith("fp8-sm90") for config in looked_up.feasible)
    assert is_hopper is (gpu == "NVIDIA H200")


def test_shared_memory_and_registers_prune_by_the_sizes_of_codes():
    problem = ProblemClass.parse("forward float16-d256-dv256-vec-fp8 full q4096 k4096 bh64 g1")
    ada = machines.find("sm_89")
    for machine in (ada, machines.find("NVIDIA H200")):
        found = space_of(problem, machine)
        assert found.excluded["shared memory of the device"] and found.excluded["registers"]
    largest = max(config.smem_bytes(FP8.traits) for config in space_of(machine=ada).feasible)
    in_16_bits = space_of(IN_16_BITS, ada).feasible
    # Three stages of 128 keys of either kind: codes have half of the bytes.
    assert largest <= ada.limits.max_smem_per_block
    assert any(str(each) == "fp8-sm89-m128n128w8s3" for each in space_of(machine=ada).feasible)
    assert not any(str(each) == "sm80-m128n128w8s3" for each in in_16_bits)


def test_registers_that_were_seen_to_suffice_are_not_said_to_be_too_few():
    # Compiled without a spill: 96 accumulators in 128 registers.
    for gpu, config in (
        ("sm_89", "fp8-sm89-m128n128w8s1b2"),
        ("H200", "fp8-sm89-m128n32w4s1b4-half"),
    ):
        assert config in map(str, space_of(machine=machines.find(gpu)).feasible)


def test_the_model_says_that_it_does_not_know_them_and_how_to_go_on():
    assert guide.unknown(IN_16_BITS) is None
    why = guide.unknown(FP8)
    assert "e4m3" in why and "measure it on a GPU, without --offline" in why
    with (
        Session(DEVICE, MACHINE, None, Options(StoppingRules(4), jobs=1)) as offline,
        pytest.raises(ValueError, match="cannot predict"),
    ):
        offline.spaces([IN_16_BITS, FP8])
    # Memory and products are not sure: q, k and v are bytes, their rate is not known.
    floor = guide.floor_ms(space_of())
    assert set(floor) == {"exponential", "floor"} and floor["floor"] == floor["exponential"] > 0
    assert set(guide.floor_ms(space_of(IN_16_BITS))) == {*floor, "memory", "matrix"}


def test_configs_that_numflash_prefers_by_rule_are_tried_first_and_nothing_is_predicted():
    ada = machines.find("sm_89")
    space = space_of(machine=ada)
    search = make_search(space, Stopwatch(), StoppingRules(trials=12))
    told = run(search)
    layout = {name: getattr(space.default, name) for name in GEOMETRY}
    preferred = [each for each in space.preferred if each in space.feasible]
    assert layout == {name: getattr(preferred[0], name) for name in GEOMETRY}
    assert told[0].config == str(space.default)
    firsts = {record.config for record in told[: len(preferred)]}
    assert firsts == set(map(str, preferred)) and len(firsts) > 3
    assert {record.outcome for record in told} <= {"measured", "slow"}
    assert {record.predicted_ms for record in told} == {record.parts for record in told} == {None}


def test_times_alone_guide_a_search():
    space = space_of(machine=machines.find("sm_89"))
    known = Candidates(space)
    is_free = known.free((), ())
    assert len(set(known.estimates)) == 1
    # Two stages are twice as fast, and 128 keys three times.
    times = {
        text: 6.0
        / config.num_stages ** (config.num_stages < 3)
        / (3 if config.tile_n == 128 else 1)
        for text, config in zip(known.texts, known.configs, strict=True)
    }
    few = dict(itertools.islice(times.items(), candidates._FEWEST_TIMES - 1))
    assert known.favourite(few, is_free) is None
    some = dict(itertools.islice(times.items(), 0, None, 3))
    best = known.configs[known.favourite(some, known.free(some, ()))]
    assert (best.num_stages, best.tile_n) == (2, 128)


def test_a_search_of_all_finds_the_fastest():
    space = space_of(FP8, machines.find("sm_120"))
    search = make_search(space, Stopwatch(), StoppingRules(), sampler="grid")
    told = run(search)
    assert {record.config for record in told} == set(map(str, space.feasible))
    _, best = search.winner()
    fastest = min(space.feasible, key=lambda each: Stopwatch.samples(str(each), 5)[2])
    assert best.time_ms <= 1.02 * Stopwatch.samples(str(fastest), 5)[2]


@pytest.fixture
def instant(tmp_path, monkeypatch):
    """No compilers, and a cache of the test's own."""
    monkeypatch.setattr(session, "CompilePool", InstantPool)
    monkeypatch.setattr(InstantPool, "spill_bytes", 0)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


def test_a_measured_run_remembers_the_winner_under_its_precision(instant):
    watch = Stopwatch()
    options = Options(StoppingRules(8), seed=0, jobs=1)
    with Session(DEVICE, MACHINE, watch, options) as run_:
        for number, space in enumerate(run_.spaces([FP8, IN_16_BITS])):
            run_.tune(space, 2 - number, str(space.problem), quiet=True)
    found = {entry.problem: entry for entry in store.read(DEVICE)}
    assert set(found) == {FP8, IN_16_BITS}
    assert found[FP8].config.startswith("fp8-sm80-") and found[FP8].origin == "measured"
    assert found[IN_16_BITS].config.startswith("sm80-")
