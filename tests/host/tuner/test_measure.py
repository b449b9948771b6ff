"""Measuring in a child process: what each way to fail costs, and what a worker runs."""

import errno
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.problem.classes import ProblemClass
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import describe
from numflash.runtime.arrays import library_of
from numflash.runtime.views import numpy_dtype
from numflash.selection.entries import DeviceKey
from tuner.measuring import gpu, representative, worker
from tuner.measuring.clocks import ClockLog
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


def test_the_worker_refuses_the_simulator():
    with pytest.raises(DeviceUnavailableError, match="NUMBA_ENABLE_CUDASIM"):
        DeviceMeasurer().device()


def test_clocks_of_the_time_that_was_measured():
    log = ClockLog.__new__(ClockLog)
    log._samples, log._process = [], None
    for when, line in ((1.0, "300"), (2.0, "1900"), (2.1, "[N/A]"), (2.2, "1980"), (3, "400")):
        log.add(when, line + "\n")
    assert log.between(1.9, 2.5) == 1940
    assert log.between(2.3, 2.31) == 1980
    assert log.between(5, 6) is None
    log.close()


# The timer, with array libraries that only note what they are asked.


class _FakeCupy:
    """As much of CuPy as `CupyGpu` needs; the clock ticks at every fill."""

    def __init__(self):
        self.events, self.now = [], 0.0
        fake = self

        class Buffer:
            def fill(self, value):
                fake.events.append("fill")
                fake.now += 0.125

        class Event:
            def record(self):
                fake.events.append("record")
                self.at = fake.now

            def synchronize(self):
                fake.events.append("wait")

        class Device:
            def __init__(self, ordinal):
                fake.events.append(f"device {ordinal}")

            def use(self):
                pass

        self.empty = lambda shape, dtype: Buffer()
        self.cuda = types.SimpleNamespace(
            Device=Device, Event=Event, get_elapsed_time=lambda begin, end: end.at - begin.at
        )


class _FakeTorch:
    """As much of PyTorch as `TorchGpu` needs, on the same clock."""

    uint8 = None

    def __init__(self):
        fake = _FakeCupy()
        self.events, buffer = fake.events, fake.empty(0, "u1")
        self.empty = lambda size, dtype, device: types.SimpleNamespace(
            zero_=lambda: buffer.fill(0)
        )
        self.device = lambda kind, ordinal: (kind, ordinal)

        class Event(fake.cuda.Event):
            def __init__(self, enable_timing):
                assert enable_timing

            def elapsed_time(self, end):
                return end.at - self.at

        self.cuda = types.SimpleNamespace(Event=Event, set_device=fake.cuda.Device)


@pytest.mark.parametrize("library, fake", [("cupy", _FakeCupy), ("torch", _FakeTorch)])
def test_the_timer_times_the_launch_alone_after_half_a_millisecond_of_fills(
    monkeypatch, library, fake
):
    fake = fake()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, library, fake)
    device = gpu.open_gpu(3)
    assert (device.ordinal, fake.events[0]) == (3, "device 3")
    fake.events.clear()
    buffer = device._buffer
    launch = buffer.fill if library == "cupy" else lambda value: buffer.zero_()
    assert device.time(lambda: [launch(0), launch(0)]) == 0.25
    assert fake.events == [*["fill"] * 4, "record", "fill", "fill", "record", "wait"]


def test_without_a_library_both_reasons_are_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"CuPy: .*cupy.*; PyTorch: .*torch"):
        gpu.open_gpu(0)


# What a worker runs: numflash in the simulator, on a device that is NumPy.


class FakeDevice:
    """A `gpu.Device` of NumPy arrays and invented times. `trouble` is raised when timing."""

    ordinal, memory = 0, 2**30

    def __init__(self, trouble=None, stays_broken=False):
        self.trouble, self.stays_broken, self.launches = trouble, stays_broken, 0
        self.is_broken = False

    def describe(self):
        return {"name": "NumPy", "arch": "sm_80", "num_sms": 1, "bus": "none"}

    def empty(self, shape, dtype):
        return np.full(shape, np.nan, numpy_dtype(dtype))

    def fill_normal(self, array, seed):
        array[...] = np.random.default_rng(seed).standard_normal(array.shape).astype(array.dtype)

    def upload(self, array):
        return array

    def total_bytes(self):
        return self.memory

    def time(self, launch):
        print("a kernel prints")
        launch()
        self.launches += 1
        if self.trouble is not None:
            self.is_broken = self.stays_broken
            raise self.trouble
        return 0.25

    def synchronize(self):
        if self.is_broken:
            raise RuntimeError("the CUDA driver reports CUDA_ERROR_ILLEGAL_ADDRESS")

    def release(self):
        pass


def _roomy(device, num_sms):
    """The device with arrays that take no memory, all zero."""
    device.describe = lambda: {"num_sms": num_sms}
    device.empty = lambda shape, dtype: np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)
    device.fill_normal = lambda array, seed: None
    return device


def _arrays(call, family="forward"):
    return worker.make_arrays(FakeDevice(), family, call, seed=0)


def _describe(call, arrays):
    views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
    problem, tensors = describe(views, AttentionOptions(**call.options))
    return problem, problem.traits(all(tensor.is_vectorizable for tensor in tensors.values()))


CLASSES = [
    "forward float16-d64-dv64-vec full q64 k64 bh2 g1",
    "forward float16-d64-dv64-vec causal q64 k64 bh64 g1",
    "forward bfloat16-d128-dv64-vec causal q1 k256 bh8 g4".replace("causal q1", "full q1"),
    "forward float32-d32-dv32-vec-tf32 full q32 k64 bh1 g1",
    "forward float32-d32-dv32 window16 q128 k128 bh4 g2",
    "forward float16-d32-dv64-softcap-alibi-vec window32 q128 k64 bh4 g4",
    "forward float16-d32-dv32-alibi causal q64 k64 bh4 g1",
    "forward float16-d32-dv32 window128 q64 k64 bh2 g1",
    "backward-dq float16-d32-dv32-vec window1 q64 k64 bh2 g1",
]


@pytest.mark.parametrize("text", CLASSES)
def test_the_timed_call_is_of_its_class(text):
    wanted = ProblemClass.parse(text)
    call = representative.timed(wanted)
    problem, traits = _describe(call, _arrays(call))
    assert str(ProblemClass.of(wanted.family, problem, traits)) == text


@pytest.mark.parametrize("text", CLASSES)
def test_the_checked_call_is_of_the_same_kernel_and_odd(text):
    wanted = ProblemClass.parse(text)
    call = representative.checked(wanted)
    problem, traits = _describe(call, _arrays(call))
    assert traits == wanted.traits
    assert ProblemClass.of(wanted.family, problem, traits).mask.rstrip("0123456789") == (
        wanted.mask.rstrip("0123456789")
    )
    assert call.head_dim < traits.head_dim and call.head_dim_v < traits.head_dim_v
    assert call.seqlen_q % 2 == call.seqlen_k % 2 == 1
    assert traits.vectorized or call.head_dim % 2 == call.head_dim_v % 2 == 1


def test_the_checked_call_is_large_where_the_class_is():
    call = representative.checked(PROBLEM)
    assert (call.seqlen_q, call.seqlen_k) == (113, 257)


@pytest.mark.parametrize("batch_heads, group, heads", [(64, 1, 32), (64, 64, 64), (4, 2, 4)])
def test_heads_of_the_timed_call(batch_heads, group, heads):
    text = f"forward float16-d64-dv64-vec full q64 k64 bh{batch_heads} g{group}"
    call = representative.timed(ProblemClass.parse(text))
    assert (call.num_heads_q, call.num_heads_kv) == (heads, heads // group)
    assert call.batch * call.num_heads_q == batch_heads


def test_a_group_must_divide_the_heads():
    odd = ProblemClass.parse("forward float16-d64-dv64-vec full q64 k64 bh4 g8")
    with pytest.raises(ValueError, match="group size, 8, got 4"):
        representative.timed(odd)


def test_a_call_is_made_smaller_until_it_fits():
    whole = representative.timed(PROBLEM)
    needed = whole.num_bytes("forward")
    assert needed == 64 * 4096 * (4 * 64 * 2 + 4)
    assert representative.fitting(PROBLEM, needed, math.inf) == whole
    halved = representative.fitting(PROBLEM, needed - 1, math.inf)
    assert halved.batch * halved.num_heads_q == 32
    grouped = ProblemClass.parse("forward float16-d64-dv64-vec full q4096 k4096 bh64 g16")
    assert representative.fitting(grouped, needed / 4, math.inf).num_heads_q == 16
    with pytest.raises(MemoryError, match="16 heads"):
        representative.fitting(grouped, 1000, math.inf)


def test_a_call_is_made_smaller_until_it_is_quick():
    work = 64 * 4096 * 4096 * 128
    assert representative.timed(PROBLEM).multiply_adds(PROBLEM.window) == work
    assert representative.fitting(PROBLEM, math.inf, work) == representative.timed(PROBLEM)
    halved = representative.fitting(PROBLEM, math.inf, work - 1)
    assert halved.batch * halved.num_heads_q == 32
    assert representative.fitting(PROBLEM, math.inf, 1).num_heads_q == 1
    window = replace(PROBLEM, mask="window256")
    assert representative.fitting(window, math.inf, work / 16) == representative.timed(window)


def test_gradients_take_memory_too():
    backward = ProblemClass.parse("backward-dq float16-d64-dv64-vec full q64 k64 bh1 g1")
    call = representative.timed(backward)
    arrays = 8 * 64 * 64 * 2
    assert call.num_bytes("backward-dq") == arrays + 3 * 4 * 64


def test_no_class_takes_longer_than_the_watchdog_waits():
    # A T4, whose 40 SMs multiply 64 float32 numbers a clock, at 40 percent of that.
    device = _roomy(FakeDevice(), num_sms=40)
    device.memory = 16 * 2**30
    largest = "full q131072 k131072 bh4096 g1"
    for traits, rate in (("float32-d128-dv128-vec", 64), ("float16-d128-dv128-vec", 512)):
        problem = ProblemClass.parse(f"forward {traits} {largest}")
        call = worker.Worker(device)._make_inputs(problem)
        seconds = call.multiply_adds(None) / (0.4 * rate * 40 * 1.5e9)
        # One kernel of a backward takes 2.5 times as long; the slowest may take twice that.
        assert seconds * 2.5 * 2 < Limits().sample_s
        # It still fills the machine, with 128 rows a block.
        assert call.batch * call.num_heads_q * 131072 / 128 > 8 * 40


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NUMFLASH_TUNED", "0")  # as in a child
    return worker.Worker(FakeDevice(), check_seqlens=(3, 5))


def _small(family, traits="float32-d32-dv32-vec"):
    return f"{family} {traits} causal q4 k8 bh2 g2"


@pytest.mark.parametrize(
    "problem, config, launched",
    [
        (_small("forward"), CONFIG, ["forward"]),
        (_small("forward", "float16-d32-dv32-softcap-alibi"), CONFIG, ["forward"]),
        (_small("backward-dkdv"), CONFIG, ["backward-dkdv"]),
        (_small("backward-dq"), CONFIG, ["backward-dq"]),
        (
            _small("backward", "float16-d32-dv32-vec"),
            "sm80-m16n16w1s1x2",
            ["backward", "reduce-dq"],
        ),
    ],
    ids=lambda value: value.partition(" full")[0] if isinstance(value, str) else None,
)
def test_a_worker_checks_and_times_a_kernel(served, monkeypatch, problem, config, launched):
    ran = _ran(monkeypatch)
    assert served.prepare(problem, config) == {"batch_heads": 2, "warm_ms": 0.25}
    assert served.device.launches == 2
    # Everything ran in the check and, before the first warm-up, to make what the kernel reads.
    backward = [family for family, _ in ran if family != "forward"]
    if backward:
        half = (len(backward) - 2 * len(launched)) // 2
        assert backward == 2 * backward[:half] + 2 * launched and "delta" in backward[:half]
    ran.clear()
    assert served.time(config) == {"ms": 0.25}
    assert [family for family, _ in ran] == launched
    assert ran[0][1] == config


def test_a_wrong_result_is_refused(served, monkeypatch):
    api = importlib.import_module("numflash.api.attention")
    right = api.attention

    def attention(*args, **options):
        out, lse = right(*args, **options)
        return out + 1, lse

    monkeypatch.setattr(api, "attention", attention)
    with pytest.raises(worker.RefusedError) as caught:
        served.prepare(str(SMALL), CONFIG)
    outcome, reason = caught.value.args
    assert outcome == "wrong_result"
    assert reason.startswith("out is off by 1") and "allowed" in reason and "lse" not in reason
    assert served.device.launches == 0


def test_every_check_has_numbers_of_its_own(served, monkeypatch):
    seen = []
    checked = worker.check

    def check(q, k, v, **options):
        seen.append(q.copy())
        return checked(q, k, v, **options)

    monkeypatch.setattr(worker, "check", check)
    served.prepare(str(SMALL), CONFIG)
    served.prepare(str(SMALL), CONFIG)
    assert np.isfinite(seen[0]).all() and not (seen[0] == seen[1]).any()


def test_a_compiler_error_is_its_own_outcome(served, monkeypatch):
    def get_cubin(*args):
        raise RuntimeError("ptxas: syntax error")

    monkeypatch.setattr(worker, "SIMULATED", False)
    monkeypatch.setattr(worker, "get_cubin", get_cubin)
    with pytest.raises(worker.RefusedError) as caught:
        served.prepare(str(SMALL), CONFIG)
    assert caught.value.args == ("compile_failed", "RuntimeError: ptxas: syntax error")


@pytest.mark.parametrize(
    "error, outcome",
    [
        (MemoryError("too much"), "launch_failed"),
        (ValueError("no config"), "invalid"),
        (RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"), "launch_failed"),
        (worker.RefusedError("wrong_result", "off"), "wrong_result"),
    ],
)
def test_outcomes_of_errors(error, outcome):
    assert worker._failure(error)[0] == outcome


class OutOfMemoryError(RuntimeError):
    """As CuPy and PyTorch call theirs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        OutOfMemoryError("no room"),
        RuntimeError("the CUDA driver reports CUDA_ERROR_OUT_OF_MEMORY"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_others_hold_does_not_condemn_the_machine_code(error):
    outcome, reason = worker._failure(error)
    assert outcome == "launch_failed"
    assert reason.startswith("out of memory: ") and str(error) in reason


def test_the_size_follows_from_the_whole_memory():
    needed = representative.timed(PROBLEM).num_bytes("forward")
    device = _roomy(FakeDevice(), num_sms=108)
    for memory, heads in ((math.ceil(needed / 0.35), 64), (needed / 0.35 - 8, 32)):
        device.memory = memory
        call = worker.Worker(device)._make_inputs(PROBLEM)
        assert call.batch * call.num_heads_q == heads


def test_where_memory_is_short_configs_are_bound_one_at_a_time(served, monkeypatch):
    bound = []

    def bind(family, config, *args):
        bound.append(config)
        if served._launches:
            raise MemoryError("the results of another config are in the way")
        return lambda: None

    monkeypatch.setattr(worker, "bind", bind)
    configs = [CONFIG, "m32n32w1"]
    for config in configs:
        served.prepare(str(SMALL), config)
    assert bound == [CONFIG, *["m32n32w1"] * 2]
    bound.clear()
    for config in (*configs, configs[1]):
        assert served.time(config) == {"ms": 0.25}
    assert bound == [CONFIG] * 2 + ["m32n32w1"] * 2
    served.drop()
    monkeypatch.setattr(worker, "bind", lambda *args: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(MemoryError):
        served.prepare(str(SMALL), CONFIG)


def test_what_a_backward_reads_is_made_once(served, monkeypatch):
    made = []
    attention = numflash.attention
    monkeypatch.setattr(
        worker.numflash, "attention", lambda *a, **o: (made.append(1), attention(*a, **o))[1]
    )
    problem = ProblemClass.parse(_small("backward-dq"))
    assert served._make_inputs(problem) == served._make_inputs(problem)
    assert len(made) == 1
    assert served._inputs[2].keys() == {"q", "k", "v", "dout", "out", "lse"}


def test_a_config_that_is_none_is_invalid(served):
    with pytest.raises(ValueError):
        served.prepare(str(SMALL), "m16")
    with pytest.raises(worker.RefusedError, match="delta"):
        served.prepare(str(SMALL).replace("forward", "delta"), "w8")


def _ran(monkeypatch):
    """The kernels that run from now on, by family."""
    ran = []
    launcher = importlib.import_module("numflash.calls.launch").Launcher
    original = launcher.bind

    def bind(self, operands):
        launch = original(self, operands)
        return lambda stream: (ran.append(str(self).split()[:2]), launch(stream))

    monkeypatch.setattr(launcher, "bind", bind)
    return ran


def test_a_combine_is_timed_alone_after_a_forward_in_parts(served, monkeypatch):
    problem = "combine float16-d32-dv32-vec full q8 k8 bh1 g1"
    ran = _ran(monkeypatch)
    assert served.prepare(problem, "w2")["warm_ms"] == 0.25
    # In the check, to make the parts, and to warm up twice.
    assert [family for family, _ in ran] == ["forward", "combine"] * 2 + ["combine"] * 2
    assert all("x2" in config for family, config in ran if family == "forward")
    ran.clear()
    served.time("w2")
    assert ran == [["combine", "w2"]]
    with pytest.raises(worker.RefusedError, match="does not split its keys"):
        served.prepare(str(SMALL).replace("forward", "combine"), "w2")


def test_a_split_forward_is_timed_with_its_combine(served, monkeypatch):
    problem, config = "forward float16-d32-dv32-vec full q8 k8 bh1 g1", "sm80-m16n16w1s1x2"
    ran = _ran(monkeypatch)
    served.prepare(problem, config)
    ran.clear()
    served.time(config)
    assert [family for family, _ in ran] == ["forward", "combine"]
    assert ran[0][1] == config


SERVER = """
import sys
import tempfile
sys.path.insert(0, {root!r})
from tests.host.tuner.test_measure import FakeDevice
from tuner.measuring import worker
worker._ORPHAN_SECONDS = 0.2
device = {device}
worker.serve(device, check_seqlens=(3, 5))
"""


def _server(device):
    code = SERVER.format(root=str(ROOT), device=device)
    return [sys.executable, "-c", code]


def test_a_worker_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    limits = Limits(max_repeats=5)
    with DeviceMeasurer(command=_server("FakeDevice()"), limits=limits) as measurer:
        record = measurer.measure(SMALL, CONFIG, _never)
        assert (record.outcome, record.samples_ms) == ("measured", (0.25,) * 5)
        assert measurer.measure(SMALL, "m16", _never).outcome == "invalid"
        assert measurer.remeasure(SMALL, [CONFIG, "m16"], 2) == {CONFIG: [0.25] * 2, "m16": []}


@contextmanager
def _serving(device, errors=None):
    """A server that was asked to prepare a config; it does not outlive the test."""
    child = subprocess.Popen(
        _server(device), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    watchdog = threading.Timer(20, child.kill)
    watchdog.start()
    request = {"id": 1, "do": "prepare", "problem": str(SMALL), "config": CONFIG}
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    try:
        with child:
            yield child
    finally:
        child.kill()
        watchdog.cancel()


def test_a_fault_that_stays_ends_the_worker(tmp_path):
    device = "FakeDevice(RuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS'), stays_broken=True)"
    with open(tmp_path / "errors", "w+") as errors:
        with _serving(device, errors) as child:
            hello, *replies = map(json.loads, child.stdout)
            assert child.wait() == worker.BROKEN
        errors.seek(0)
        assert "a kernel prints" in errors.read()
    assert hello["hello"]["name"] == "NumPy"
    reason = "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert replies == [{"id": 1, "failed": "launch_failed", "reason": reason, "broken": True}]


def test_a_worker_without_a_parent_ends_in_the_middle_of_a_kernel():
    device = "FakeDevice(); device.time = lambda launch: __import__('time').sleep(60)"
    with _serving(device) as child:
        child.stdout.readline()
        child.stdin.close()
        assert child.wait() == 1
