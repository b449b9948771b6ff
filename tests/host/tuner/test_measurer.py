"""Measuring in a child process: what each way to fail costs."""

import errno
import json
import math
import os
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from numflash.problem.classes import ProblemClass
from numflash.selection.entries import DeviceKey
from tuner.measuring.device_lock import device_lock
from tuner.measuring.measurer import DeviceMeasurer, DeviceUnavailableError, Limits

ROOT = Path(__file__).parents[3]
PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
SMALL = ProblemClass.parse("forward float32-d32-dv32-vec full q8 k8 bh1 g1")
CONFIG = "m16n32w1"

# A child that needs no numflash: a config's name says what it does when it is prepared or timed.
CHILD = textwrap.dedent("""
    import json, os, signal, subprocess, sys, time

    def send(**message):
        print(json.dumps(message), flush=True)

    def note(**entry):
        with open(sys.argv[1], "a") as log:
            log.write(json.dumps({"pid": os.getpid(), **entry}) + "\\n")

    print("a library says hello", flush=True)
    seen = {name: os.environ.get(name) for name in ("NUMFLASH_AUTOTUNE", "NUMFLASH_TUNED")}
    send(hello={"name": "Fake", "arch": "sm_80", "num_sms": 1, "bus": "0000:01:00.0", **seen})
    times = {}
    for line in sys.stdin:
        request = json.loads(line)
        number, do, config = request["id"], request["do"], request.get("config", "")
        note(**request)
        if do == "drop":
            send(id=number)
            continue
        if do == "prepare":
            times[config] = 0
        else:
            times[config] += 1
        kind, _, ms = config.partition("-")
        if do + " hangs" == kind.replace("_", " "):
            process = subprocess.Popen(["sleep", "60"])
            note(started=process.pid)
            time.sleep(60)
        if kind == "floods" and do == "prepare":
            for _ in range(500):
                print("nonsense", flush=True)
                time.sleep(0.01)
        if kind == "crashes" and do == "prepare":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "exits":
            sys.exit("no more of this")
        if kind == "wrong":
            send(id=number, failed="wrong_result", reason="out is off by 1, allowed are 0.1")
            continue
        if kind == "breaks" and times[config] == 2:
            send(id=number, failed="launch_failed", reason="ILLEGAL_ADDRESS", broken=True)
            os._exit(3)
        if kind == "garbles":
            print("{\\n]\\n42\\n[]\\nnull\\n\\xff", flush=True)
            send(id=number - 1, ms=1e9, warm_ms=1e9, batch_heads=1)
        if kind == "pauses":
            time.sleep(0.01)
        ms = float(ms or 1)
        send(id=number, ms=ms, warm_ms=ms, batch_heads=64)
""")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def command(tmp_path, log):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return [sys.executable, "-S", str(script), str(log)]


@pytest.fixture
def measurer(command, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    with DeviceMeasurer(command=command) as measurer:
        yield measurer


def _entries(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def _children(log):
    return len({entry["pid"] for entry in _entries(log)})


def _never(samples):
    return False


def _works(measurer):
    """Whether a harmless config can be measured now."""
    return measurer.measure(PROBLEM, "takes-2", _never).median_ms == 2.0


def test_a_config_is_measured(measurer, log):
    record = measurer.measure(PROBLEM, "takes-1.5", _never)
    assert (record.config, record.outcome, record.reason) == ("takes-1.5", "measured", "")
    assert record.samples_ms == (1.5,) * 25
    assert 0 < record.seconds < 10 and abs(record.finished - time.time()) < 10
    requests = [entry["do"] for entry in _entries(log)]
    assert requests == ["drop", "prepare", *["time"] * 25]


@pytest.mark.parametrize("warm_ms, repeats", [(0.0, 25), (1, 25), (40, 12), (1e3, 5), (1e9, 5)])
def test_repeats_follow_the_budget(warm_ms, repeats):
    assert Limits(budget_ms=500).repeats(warm_ms) == repeats


def test_one_child_serves_many_configs(measurer, log):
    for ms in (1, 2, 3):
        assert measurer.measure(PROBLEM, f"takes-{ms}", _never).median_ms == ms
    assert _children(log) == 1


def test_a_slow_config_is_stopped(measurer, log):
    seen = []

    def stop(samples):
        seen.append(list(samples))
        return len(samples) == 3

    record = measurer.measure(PROBLEM, "takes-7", stop)
    assert (record.outcome, record.samples_ms) == ("slow", (7.0,) * 3)
    assert "3 of 25" in record.reason
    assert seen == [[7.0], [7.0] * 2, [7.0] * 3]
    assert _works(measurer) and _children(log) == 1


def test_what_stop_raises_passes_and_the_child_goes_on(measurer, log):
    def stop(samples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measurer.measure(PROBLEM, "takes-1", stop)
    assert _works(measurer) and _children(log) == 1


@pytest.mark.parametrize("step", ["prepare", "time"])
def test_a_hang_is_killed_with_all_it_started(command, log, step):
    limits = Limits(prepare_s=0.8, sample_s=0.8)
    with DeviceMeasurer(command=command, limits=limits) as measurer:
        record = measurer.measure(PROBLEM, f"{step}_hangs", _never)
        assert record.outcome == "timeout"
        assert f"{step} took longer than 0.8 s" in record.reason
        assert 0.8 < record.seconds < 10
        (started,) = [entry["started"] for entry in _entries(log) if "started" in entry]
        assert _ends(started)
        assert _works(measurer) and _children(log) == 2


def _ends(pid, within_s=2):
    """Whether a process ends; one that is only waited for by nobody counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_output_that_is_no_answer_does_not_prolong_a_deadline(command, log):
    with DeviceMeasurer(command=command, limits=Limits(prepare_s=0.5)) as measurer:
        assert measurer.measure(PROBLEM, "floods", _never).outcome == "timeout"


def test_a_crash_is_reported_with_its_last_words(measurer, log):
    record = measurer.measure(PROBLEM, "crashes", _never)
    assert record.outcome == "launch_failed"
    assert "SIGSEGV" in record.reason and "the last words" in record.reason
    assert math.isinf(record.time_ms)
    assert _works(measurer) and _children(log) == 2


def test_where_no_file_can_be_made_only_the_last_words_are_lost(measurer, monkeypatch):
    def fail():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert _works(measurer)
    assert measurer.measure(PROBLEM, "crashes", _never).reason == "the process died of SIGSEGV"


def test_an_exit_is_reported_with_its_status(measurer):
    record = measurer.measure(PROBLEM, "exits", _never)
    assert record.outcome == "launch_failed"
    assert "exit status 1" in record.reason and "no more of this" in record.reason


def test_a_wrong_result_costs_the_config_only(measurer, log):
    record = measurer.measure(PROBLEM, "wrong", _never)
    assert (record.outcome, record.samples_ms) == ("wrong_result", ())
    assert record.reason == "out is off by 1, allowed are 0.1"
    assert _works(measurer) and _children(log) == 1


def test_a_broken_device_ends_the_child(measurer, log):
    record = measurer.measure(PROBLEM, "breaks-3", _never)
    assert (record.outcome, record.samples_ms) == ("launch_failed", (3.0,))
    assert record.reason == "ILLEGAL_ADDRESS"
    assert _works(measurer) and _children(log) == 2


def test_garbage_and_late_answers_are_skipped(measurer, log):
    record = measurer.measure(PROBLEM, "garbles-4", _never)
    assert (record.outcome, set(record.samples_ms)) == ("measured", {4.0})
    assert _children(log) == 1


def test_a_child_that_died_in_between_is_replaced(measurer, log):
    assert _works(measurer)
    os.kill(_entries(log)[0]["pid"], 9)
    time.sleep(0.1)
    assert _works(measurer) and _children(log) == 2


def test_a_reduced_batch_is_said(measurer):
    large = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh128 g1")
    record = measurer.measure(large, "takes-1", _never)
    assert "batch x heads was 64" in record.reason and record.batch_heads == 64


def test_configs_are_measured_again_in_turn(measurer, log):
    configs = ["takes-1", "takes-2", "takes-3"]
    assert measurer.remeasure(PROBLEM, configs, 8) == {f"takes-{n}": [n] * 8 for n in (1, 2, 3)}
    timed = [entry["config"] for entry in _entries(log) if entry["do"] == "time"]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(each) == configs for each in rounds)
    assert len(set(rounds)) > 2


def test_one_that_fails_does_not_end_the_others_rounds(measurer, log):
    configs = ["takes-1", "breaks-2", "wrong", "crashes", "takes-3"]
    found = measurer.remeasure(PROBLEM, configs, 4)
    assert found == {
        "takes-1": [1] * 4, "breaks-2": [], "wrong": [], "crashes": [], "takes-3": [3] * 4,
    }  # fmt: skip
    assert _children(log) == 3


def test_what_a_crash_took_along_is_prepared_again(measurer, log):
    found = measurer.remeasure(PROBLEM, ["takes-1", "crashes", "takes-3"], 2)
    assert found == {"takes-1": [1] * 2, "crashes": [], "takes-3": [3] * 2}
    assert _children(log) == 2


def test_nothing_is_left_where_all_fail(measurer):
    assert measurer.remeasure(PROBLEM, ["wrong", "crashes"], 3) == {"wrong": [], "crashes": []}


def test_two_measurers_share_a_device(command, tmp_path, log, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    limits = Limits(max_repeats=8)
    measurers = [DeviceMeasurer(command=command, limits=limits) for _ in range(2)]
    start = threading.Barrier(2)

    def measure(measurer):
        measurer.device()
        start.wait()
        for _ in range(3):
            measurer.measure(PROBLEM, "pauses", _never)

    threads = [threading.Thread(target=measure, args=(each,)) for each in measurers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in measurers:
        each.close()
    entries = _entries(log)
    trials = [entries[i : i + 10] for i in range(0, len(entries), 10)]
    assert len(trials) == 6
    assert all(len({entry["pid"] for entry in trial}) == 1 for trial in trials)
    assert [trial[0]["do"] for trial in trials] == ["drop"] * 6


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "gpu.lock").symlink_to(tmp_path / "absent")
    with device_lock("gpu"):
        assert "a symbolic link is not written through" in caplog.text
    assert not (tmp_path / "absent").exists()


def test_without_a_lock_work_goes_on(command, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "file"))
    with DeviceMeasurer(command=command) as measurer:
        assert _works(measurer)
    assert str(tmp_path / "file") in caplog.text


def test_a_child_neither_tunes_nor_is_tuned(measurer, monkeypatch):
    monkeypatch.setenv("NUMFLASH_AUTOTUNE", "1")
    device = measurer.device()
    assert (device["NUMFLASH_AUTOTUNE"], device["NUMFLASH_TUNED"]) == (None, "0")


def test_close_ends_the_child(measurer, log):
    assert _works(measurer)
    measurer.close()
    assert _ends(_entries(log)[0]["pid"])


def test_a_child_with_another_device_is_refused(command, log, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    fake = DeviceKey("Fake", "sm_80", 1)
    with DeviceMeasurer(command=command, expected=fake) as measurer:
        assert _works(measurer)
    for other in (DeviceKey("Fake", "sm_80", 2), DeviceKey("Mock", "sm_80", 1)):
        with (
            DeviceMeasurer(command=command, expected=other) as measurer,
            pytest.raises(DeviceUnavailableError) as caught,
        ):
            measurer.measure(PROBLEM, "takes-2", _never)
        assert f"has {fake}, not {other}" in str(caught.value)
        assert "CUDA_VISIBLE_DEVICES" in str(caught.value)


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise SystemExit('cannot import cupy')", "cannot import cupy"),
        ('print(\'{"no_device": "no GPU here"}\')', "no GPU here"),
        ("import time; time.sleep(60)", "start took longer than 0.5 s"),
    ],
)
def test_without_a_device_it_says_so(code, reason):
    command = [sys.executable, "-S", "-c", code]
    measurer = DeviceMeasurer(command=command, limits=Limits(start_s=0.5))
    with pytest.raises(DeviceUnavailableError, match=reason):
        measurer.measure(PROBLEM, "takes-1", _never)


def test_a_command_that_does_not_exist():
    with pytest.raises(DeviceUnavailableError, match="no-such-program"):
        DeviceMeasurer(command=["/no-such-program"]).device()


def test_files_of_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    for name in ("numpy", "numflash", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of a user ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeviceUnavailableError, match="NUMBA_ENABLE_CUDASIM"):
        DeviceMeasurer().device()
