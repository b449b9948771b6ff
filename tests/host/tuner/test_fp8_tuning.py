"""Tuning the forward on 8-bit floats: its space, its search, and what is remembered."""

import pytest

pytest.importorskip("optuna")
from numflash.problem.classes import ProblemClass
from numflash.selection import store
from tests.host.tuner.test_search import make_search, run
from tests.host.tuner.test_session import DEVICE, MACHINE, InstantPool, Stopwatch
from tuner import model
from tuner.search import session
from tuner.search.candidates import Candidates
from tuner.search.search import StoppingRules
from tuner.search.session import Options, Session
from tuner.space import machines
from tuner.space.configs import Budgets, Space

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


def test_offline_they_are_predicted_as_any_others():
    with Session(DEVICE, MACHINE, None, Options(StoppingRules(4), jobs=1)) as offline:
        found = [space.problem for space in offline.spaces([IN_16_BITS, FP8])]
    assert found == [IN_16_BITS, FP8]
    hopper = machines.find("NVIDIA H200")
    floor, in_16_bits = (model.floor_ms(hopper, problem) for problem in (FP8, IN_16_BITS))
    assert floor["exponential"] == in_16_bits["exponential"]
    # Products are twice as fast. Of q, k and v a byte is read, of out two are written.
    assert floor["matrix"] == pytest.approx(in_16_bits["matrix"] / 2)
    assert floor["memory"] == pytest.approx(5 / 8 * in_16_bits["memory"], rel=0.02)


def test_the_default_comes_first_and_then_what_the_model_likes():
    ada = machines.find("sm_89")
    space = space_of(machine=ada)
    search = make_search(space, Stopwatch(), StoppingRules(trials=9))
    told = run(search)
    assert told[0].config == str(space.default)
    known = Candidates(space)
    favourites = {known.texts[number] for number in known.favourites(8)}
    assert favourites <= {record.config for record in told}
    # Ada multiplies e4m3 twice as fast as float16.
    assert not any(text.endswith("-half") for text in favourites)
    assert {record.outcome for record in told} <= {"measured", "slow"}
    assert all(record.predicted_ms > 0 for record in told)


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
