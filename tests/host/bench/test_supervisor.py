"""A run outlives its workers; a worker tells what it does before it does it."""

import os
import sys
import time

import pytest

from bench.first_light.rehearsal import FakeClock
from bench.measuring import measure, supervisor, worker
from bench.points.points import gpt2_medium

# A worker whose tasks say what it does: a list of steps, each a note or a deed.
_WORKER = """
import json, os, sys, time

def send(**message):
    print(json.dumps(message), flush=True)

send(hello={})
for line in sys.stdin:
    request = json.loads(line)
    number, task = request["id"], request["task"]
    send(note=None)
    for step in task["steps"]:
        if step in task["exclude"]:
            continue
        if step == "die at once":
            os._exit(7)
        if step == "die afterwards":
            send(id=number, done={"excluded": task["exclude"]})
            os._exit(9)
        send(note=step)
        if step == "crash":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(11)
        if step == "hang":
            time.sleep(60)
        if step == "break":
            send(id=number, failed="failed", reason="illegal address", broken=True)
            os._exit(3)
    if "fail" in task["steps"]:
        send(id=number, failed="failed", reason="ValueError: no")
    else:
        send(id=number, done={"excluded": task["exclude"]})
"""
# What a worker does before the rest where a device is taken by others.
_TAKEN = """
import json, os
if os.path.exists({path!r}):
    print("again", file=open({path!r}, "a"))
    {action}
    print(json.dumps({{"no_device": "taken"}}), flush=True)
    raise SystemExit(1)
"""


def _supervise(*steps, program=_WORKER, seconds=20.0, **options):
    """What `supervisor.run` reports for tasks of these steps: results by index, and why not."""
    results = {}
    settings = {"device": 0, "deadline": time.monotonic() + seconds, "budget_ms": 1}
    reason = supervisor.run(
        [{"kind": "test", "steps": list(s)} for s in steps],
        settings,
        on_result=lambda task, result: results.__setitem__(task["index"], result),
        command=[sys.executable, "-S", "-c", program],
        **options,
    )
    return results, reason


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "_RETRY_SECONDS", 0.01)


def test_a_crash_costs_a_method_its_point_and_no_more():
    results, reason = _supervise(["a"], ["a", "crash", "b"], ["a", "crash"])
    assert reason is None
    assert results[0] == {"excluded": {}}
    assert list(results[1]["excluded"]) == ["crash"]
    assert results[1]["excluded"]["crash"].startswith(supervisor.DEATHS)
    assert "exit status 11" in results[1]["excluded"]["crash"]
    assert "the last words" in results[1]["excluded"]["crash"]
    assert list(results[2]["excluded"]) == ["crash"]


def test_a_hang_is_ended(monkeypatch):
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 0.6)
    results, _ = _supervise(["a", "hang"], ["b"])
    assert results[0]["excluded"] == {"hang": "no sign of life for 0.6 s"}
    assert results[1] == {"excluded": {}}


def test_a_broken_device_is_told_in_the_methods_own_words():
    results, _ = _supervise(["break"], ["a"])
    assert results[0]["excluded"] == {"break": "broke the device: illegal address"}
    assert results[1] == {"excluded": {}}


def test_a_task_that_fails_is_given_up():
    results, _ = _supervise(["fail"], ["a"])
    assert results[0] == {"failed": "ValueError: no"}
    assert not results[0]["failed"].startswith(supervisor.DEATHS)
    assert results[1] == {"excluded": {}}


def test_a_task_that_dies_outside_any_method_is_given_up():
    results, _ = _supervise(["a"], ["die at once"], ["b"])
    assert "exit status 7" in results[1]["failed"]
    assert results[0] == results[2] == {"excluded": {}}


def test_a_worker_that_dies_between_tasks_is_replaced():
    results, _ = _supervise(["a"], ["die afterwards"], ["b"])
    assert results == {index: {"excluded": {}} for index in range(3)}


def test_a_worker_that_cannot_start_is_a_reason():
    results, reason = _supervise(["a"], ["b"], program="raise SystemExit('no such module')")
    assert results == {} and "no such module" in reason


def test_no_device_is_a_reason(tmp_path):
    (tmp_path / "taken").touch()
    program = _TAKEN.format(path=str(tmp_path / "taken"), action="pass") + _WORKER
    assert _supervise(["a"], program=program) == ({}, "taken")
    assert (tmp_path / "taken").read_text() == "again\n", "it is not asked again"


def test_a_device_that_has_worked_is_waited_for(tmp_path):
    # The process that was killed on it may hold it for a moment.
    busy = str(tmp_path / "busy")
    program = _TAKEN.format(path=busy, action=f"os.remove({busy!r})")
    program += _WORKER.replace("os._exit(11)", f"open({busy!r}, 'w'); os._exit(11)")
    results, reason = _supervise(["a", "crash"], ["b"], program=program)
    assert reason is None and not os.path.exists(busy)
    assert list(results[0]["excluded"]) == ["crash"] and results[1] == {"excluded": {}}


def test_a_device_that_is_lost_is_not_waited_for_for_ever(tmp_path):
    lost = tmp_path / "lost"
    program = _TAKEN.format(path=str(lost), action="pass")
    program += f"open({str(lost)!r}, 'w').close()\n" + _WORKER
    found = _supervise(["a"], ["crash"], ["b"], program=program)
    assert found == ({0: {"excluded": {}}}, "taken")
    assert lost.read_text().count("again") == 1 + supervisor._RETRIES


def test_the_deadline_ends_a_worker():
    start = time.monotonic()
    results, reason = _supervise(["a"], ["hang"], ["b"], seconds=0.8)
    assert (results, reason) == ({0: {"excluded": {}}}, None)
    assert time.monotonic() - start < 5
    assert _supervise(["a"], seconds=-1) == ({}, None)


def test_what_no_longer_fits_is_skipped_and_smaller_tasks_go_on():
    clock, results = FakeClock(), []
    supervisor.run(
        [{"kind": "x", "steps": [], "expected_s": s} for s in (6, 5, 3, 1)],
        {"device": 0, "deadline": 10.0},
        on_result=lambda task, result: results.append(result),
        command=[sys.executable, "-S", "-c", _WORKER],
        clock=clock,
        spend=clock.spend,
    )
    assert results == [
        {"excluded": {}, "seconds": 6},
        {"skipped": "it takes about 5 s, 4 s were left"},
        {"excluded": {}, "seconds": 3},
        {"excluded": {}, "seconds": 1},
    ]


# The worker


class _Pipe:
    """A channel with these tasks; what is sent is kept."""

    def __init__(self, *tasks):
        self.tasks, self.sent = tasks, []

    def requests(self):
        settings = {"device": 0, "deadline": time.monotonic() + 60, "budget_ms": 1}
        for number, task in enumerate(self.tasks):
            task = {"exclude": {}, **task}
            yield {"id": number, "do": "task", "task": task, "settings": settings}

    def send(self, **message):
        self.sent.append(message)


class _FakeDevice:
    def describe(self):
        return {"name": "fake"}

    def ceilings(self):
        return {"matmul_tflops": 700.0}

    def normal(self, *args):
        raise RuntimeError("no memory for the inputs")

    def synchronize(self):
        """It works."""

    def release(self):
        """There is nothing to give back."""


_POINT = {"kind": "point", "point": gpt2_medium("forward").as_dict(), "peers": ["numflash"]}


def _sent(*tasks):
    pipe = _Pipe(*tasks)
    assert worker.serve(_FakeDevice, worker.KINDS, pipe) == 0
    return pipe.sent


def test_the_worker_tells_before_it_acts():
    assert _sent({"kind": "ceilings"}, _POINT) == [
        {"hello": {"name": "fake"}},
        {"note": None},
        {"id": 0, "done": {"matmul_tflops": 700.0}},
        {"note": None},
        {"id": 1, "failed": "failed", "reason": "RuntimeError: no memory for the inputs"},
    ]


@pytest.mark.parametrize(
    "error, reason",
    [(RuntimeError("no"), "RuntimeError: no"), (measure.BrokenDeviceError("its own"), "its own")],
)
def test_a_task_that_breaks_the_device_ends_the_worker(monkeypatch, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr(_FakeDevice, "synchronize", fail)
    monkeypatch.setattr(_FakeDevice, "ceilings", fail)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    pipe = _Pipe({"kind": "ceilings"}, {"kind": "ceilings"})
    with pytest.raises(SystemExit, match="3"):
        worker.serve(_FakeDevice, worker.KINDS, pipe)
    expected = {"id": 0, "failed": "failed", "reason": reason, "broken": True}
    assert pipe.sent[2:] == [expected]


def test_a_worker_without_a_device_says_so():
    def no_device():
        raise RuntimeError("torch: no CUDA")

    pipe = _Pipe()
    assert worker.serve(no_device, worker.KINDS, pipe) == 1
    assert pipe.sent == [{"no_device": "torch: no CUDA"}]
