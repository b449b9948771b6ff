"""Recorded exhaustive runs, and the measurer that answers from them."""

import dataclasses
import json
import statistics

import pytest

from numflash.problem.classes import ProblemClass
from tuner.measuring import replay
from tuner.measuring.measurer import Measurer
from tuner.measuring.replay import Replay
from tuner.records import Record, ResourceUsage

PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
OTHER = dataclasses.replace(PROBLEM, mask="full")
DEVICE = {"name": "NVIDIA A100-SXM4-80GB", "arch": "sm_80", "num_sms": 108}
RESOURCES = ResourceUsage(128, 0, 49152, 128, 3, "shared memory", ("a warning",), 900.0)
FAST = Record(
    "m64n64w4", "measured", resources=RESOURCES, predicted_ms=1.5, parts={"matrix": 1.0},
    samples_ms=(1.9, 2.0, 2.0, 2.1, 2.3), clock_mhz=1410.0, seconds=0.5, finished=1e9,
)  # fmt: skip
SLOW = Record("m16n32w1", "measured", samples_ms=(50.0, 51.0, 52.0, 53.0), seconds=1.0)
WRONG = Record("m32n32w2", "wrong_result", "out is off by 1", samples_ms=(1.0,), seconds=0.25)
HUNG = Record("m32n64w2", "timeout", "time took longer than 30 s; killed", seconds=31.0)
GUESS = Record("m64n32w4", "predicted", predicted_ms=1.0)
BEHIND = Record("m16n64w1", "slow", "the model's estimate is far behind", predicted_ms=9.0)
RECORDS = {record.config: record for record in (FAST, SLOW, WRONG, HUNG, GUESS, BEHIND)}


@pytest.fixture
def recording():
    return replay.Recording(DEVICE, PROBLEM, {"numba-cuda": "0.30.4"}, RECORDS)


@pytest.fixture
def measurer(recording) -> Measurer:
    return Replay(recording)


def _never(samples):
    return False


def test_a_recording_comes_back_as_it_was(tmp_path, recording):
    path = tmp_path / "run.json"
    replay.save(path, DEVICE, PROBLEM, RECORDS, {"numba-cuda": "0.30.4"})
    assert replay.load(path) == recording
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_device_may_be_a_dataclass_and_compilers_are_those_installed(tmp_path):
    @dataclasses.dataclass
    class Key:
        name: str
        num_sms: int

    replay.save(tmp_path / "run.json", Key("NVIDIA L4", 58), PROBLEM, {})
    loaded = replay.load(tmp_path / "run.json")
    assert loaded.device == {"name": "NVIDIA L4", "num_sms": 58}
    assert "numba-cuda" in loaded.compilers


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    replay.save(path, DEVICE, PROBLEM, RECORDS)
    before = path.read_text()
    with pytest.raises(ValueError, match="m64n64w4"):
        replay.save(path, DEVICE, PROBLEM, {"m1": FAST})
    with pytest.raises(TypeError):
        replay.save(path, {"name": object()}, PROBLEM, RECORDS)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def _with(**changes):
    return lambda content: {**content, **changes}


@pytest.mark.parametrize(
    "change",
    [
        _with(schema=2),
        _with(problem="forward"),
        _with(records=[]),
        _with(records={"m1": {"config": "m1", "outcome": "lost"}}),
        _with(records={"m1": {"config": "m2", "outcome": "timeout"}}),
        lambda content: {name: content[name] for name in ("schema", "problem")},
        lambda content: [content],
    ],
)
def test_what_is_no_recording_is_refused(tmp_path, change):
    path = tmp_path / "run.json"
    replay.save(path, DEVICE, PROBLEM, RECORDS)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"run\.json is not a recording"):
        replay.load(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "run.json"
    replay.save(path, DEVICE, PROBLEM, RECORDS)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match="not a recording"):
        replay.load(path)


def test_times_are_drawn_from_those_recorded(measurer):
    record = measurer.measure(PROBLEM, FAST.config, _never)
    assert record.outcome == "measured"
    assert len(record.samples_ms) == len(FAST.samples_ms)
    assert set(record.samples_ms) <= set(FAST.samples_ms)
    assert (record.resources, record.clock_mhz) == (RESOURCES, 1410.0)


def test_many_draws_have_the_recorded_spread(measurer):
    times = measurer.remeasure(PROBLEM, [FAST.config], 4000)[FAST.config]
    assert set(times) == set(FAST.samples_ms)
    assert statistics.fmean(times) == pytest.approx(statistics.fmean(FAST.samples_ms), rel=5e-3)
    assert statistics.pstdev(times) == pytest.approx(statistics.pstdev(FAST.samples_ms), rel=0.05)


def test_a_seed_gives_a_config_its_samples_in_any_order(recording):
    def samples(seed, *configs):
        measurer = Replay(recording, seed)
        return {c: measurer.measure(PROBLEM, c, _never).samples_ms for c in configs}

    forward = samples(1, FAST.config, SLOW.config)
    assert forward == samples(1, SLOW.config, FAST.config)
    assert forward != samples(2, FAST.config, SLOW.config)


def test_configs_do_not_vary_together(recording):
    twin = dataclasses.replace(FAST, config="m32n64w4")
    measurer = Replay(dataclasses.replace(recording, records={**RECORDS, twin.config: twin}))
    drawn = measurer.remeasure(PROBLEM, [FAST.config, twin.config], 50)
    assert drawn[FAST.config] != drawn[twin.config]


def test_measuring_again_draws_again(measurer):
    drawn = {measurer.measure(PROBLEM, FAST.config, _never).samples_ms for _ in range(5)}
    assert len(drawn) > 1


def test_a_slow_config_is_stopped(measurer):
    record = measurer.measure(PROBLEM, SLOW.config, lambda samples: len(samples) == 2)
    assert (record.outcome, len(record.samples_ms)) == ("slow", 2)
    assert "2 of 4" in record.reason


@pytest.mark.parametrize("failed", [WRONG, HUNG, GUESS, BEHIND], ids=lambda record: record.outcome)
def test_what_has_no_time_is_replayed_as_it_is(measurer, failed):
    record = measurer.measure(PROBLEM, failed.config, _never)
    assert dataclasses.replace(record, finished=failed.finished) == failed
    assert record.finished > 0
    assert measurer.seconds == failed.seconds


def test_an_unknown_config_is_invalid_and_costs_nothing(measurer):
    record = measurer.measure(PROBLEM, "m128n128w8", _never)
    assert (record.outcome, record.reason) == ("invalid", "it is not in the recording")
    assert measurer.seconds == 0


def test_another_class_is_refused(measurer):
    with pytest.raises(ValueError, match="causal"):
        measurer.measure(OTHER, FAST.config, _never)
    with pytest.raises(ValueError, match="causal"):
        measurer.remeasure(OTHER, [FAST.config], 1)


def test_configs_are_measured_again(measurer):
    found = measurer.remeasure(PROBLEM, [FAST.config, WRONG.config, "m128n128w8"], 7)
    assert len(found[FAST.config]) == 7
    assert found[WRONG.config] == found["m128n128w8"] == []


def test_the_time_it_would_have_taken_is_counted(measurer):
    whole = measurer.measure(PROBLEM, SLOW.config, _never)
    assert whole.seconds == pytest.approx(1.0, abs=0.01)
    assert measurer.seconds == whole.seconds
    stopped = measurer.measure(PROBLEM, SLOW.config, lambda samples: True)
    preparation = 1.0 - 0.206
    assert stopped.seconds == pytest.approx(preparation + 0.05, abs=0.005)
    assert measurer.seconds == whole.seconds + stopped.seconds
    before = measurer.seconds
    measurer.remeasure(PROBLEM, [SLOW.config, HUNG.config], 10)
    assert measurer.seconds - before == pytest.approx(preparation + 0.515, abs=0.02)


def test_what_the_exhaustive_run_found_and_took(recording):
    assert recording.seconds == pytest.approx(32.75)
    assert recording.best is FAST
    for records in ({}, {HUNG.config: HUNG}, {GUESS.config: GUESS}):
        with pytest.raises(ValueError, match="no time"):
            _ = dataclasses.replace(recording, records=records).best
