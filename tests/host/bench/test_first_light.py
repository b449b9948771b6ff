"""First light: findings stay, whichever process dies; a missing or late part costs itself only."""

import json
import os
import re
import signal
import sys
from dataclasses import replace

import pytest

from bench import __main__ as bench
from bench import report
from bench.first_light import background, command, page, plan
from bench.measuring import supervisor
from bench.points.points import Point
from bench.records import checks, record
from bench.studies import static
from numflash.configs import parse_config
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import force
from tests.support.covering import FULL
from tuner.measuring import clocks

LIMITS = ARCHITECTURES["sm_90a"]

# A worker that has an answer to every step at once, and deeds to do before some of them.
_WORKER = """
import json, os, sys, time
deeds = json.loads(sys.argv[1])
def send(**message):
    print(json.dumps(message), flush=True)
def entry(ms):
    return {"status": "measured", "check": {"outcome": "checked"}, "median_ms": ms,
            "tflops": 1000 / ms, "gbps": 900 / ms}
def answer(task):
    kind = task["kind"]
    if kind == "instructions":
        lost = task["exclude"]
        return {"cases": {name: {"outcome": "crashed" if name in lost else "passed",
                                 "reason": lost.get(name, "")} for name in task["names"]}}
    if kind == "check":
        return {"check": "passed", "reason": "", "errors": {"out": [1e-4, 2e-4]}, "kernel": "k"}
    if kind == "ceilings":
        return {"matmul_tflops": 800.0, "copy_gbps": 4000.0, "num_sms": 132, "matmul": "m"}
    if kind == "parts":
        return {"parts": {"forward": {"median_ms": 0.05}, "combine": {"median_ms": 0.01}}}
    names = task.get("peers", ["numflash", "numflash:a", "numflash:b"])
    methods = {name: entry(2.0 + i / 4) for i, name in enumerate(names)}
    methods.pop("fa3-fwd", None)
    ratios = {name: m["median_ms"] / 2.0 for name, m in methods.items() if name != "numflash"}
    found = {"methods": methods, "ratios": ratios, "kernel": "k", "timed": []}
    if kind == "predicted":
        found["predicted_ms"] = {"numflash:a": 2.0, "numflash:b": 2.0}
    return found
send(hello={})
for line in sys.stdin:
    request = json.loads(line)
    task = request["task"]
    send(note=None)
    deed = deeds.get(str(task["index"]))
    if deed == "die":
        os._exit(7)
    if deed == "hang":
        time.sleep(60)
    if deed == "die in a case" and not task["exclude"]:
        send(note=task["names"][0])
        os._exit(11)
    send(id=request["id"], done=answer(task))
"""


def _command(deeds, program=_WORKER):
    deeds = {str(index): deed for index, deed in deeds.items()}
    return [sys.executable, "-S", "-c", program, json.dumps(deeds)]


@pytest.fixture(scope="module")
def cases():
    return list(background.cases().values())


@pytest.fixture
def steps(cases):
    return plan.steps(cases, LIMITS, rehearsal=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.1)


_MACHINE = {
    "device": "NVIDIA H200",
    "driver": "1.2",
    "date": "2026-12-01",
    "commit": "0123456789abcdef",
    "source_hash": "h",
    "max_sm_clock_mhz": 1980.0,
}


@pytest.fixture
def visit(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(record, "clocks", lambda device: {})
    return command.Visit(dict(_MACHINE), steps, tmp_path, 9.0, 0, LIMITS)


def _on_disk(path):
    return json.loads(path.read_text())


# The order and the sizes


def test_what_has_no_witness_comes_first(steps, cases):
    titles = [step["title"] for step in steps]
    assert titles[: len(plan.NO_WITNESS)] == list(plan.NO_WITNESS)
    assert titles[len(plan.NO_WITNESS)].startswith("tensor maps")
    sections = list(dict.fromkeys(step["section"] for step in steps))
    assert sections == [
        *(plan.INSTRUCTIONS, plan.FORWARD, plan.GRADIENTS),
        *(plan.SPEED, plan.QUESTIONS, plan.TUNER),
    ]
    names = [name for step in steps for name in step.get("names", [])]
    assert sorted(names) == sorted(map(str, cases)), "every case, and once"


def test_the_forwards_and_the_headline_points(steps):
    shapes = [step["shape"][3:] for step in steps if step["section"] == plan.FORWARD]
    assert shapes == [[64, 64], [128, 128], [256, 256], [128, 96], [128, 128]]
    timed = [s for s in steps if (s["section"], s["kind"]) == (plan.SPEED, "point")]
    found = {(s["point"]["head_dim"], s["point"]["seqlen_q"], s["point"]["causal"]) for s in timed}
    wanted = {(d, n, causal) for d in (64, 128) for n in (4096, 16384) for causal in (False, True)}
    assert wanted <= found
    assert all("torch-cudnn" in s["peers"] and "flash-attention-3" in s["peers"] for s in timed)


def test_every_question_is_of_configs_that_can_be_forced(steps):
    asked = [step for step in steps if step["section"] == plan.QUESTIONS and "labels" in step]
    fields = {"overlap", "pingpong", "arrivals", "l2_bytes", "tile_n", "fixed"}
    assert {step["title"].split()[0] for step in asked} == fields
    tiles = set()
    for step in asked:
        traits = static.traits_of("bfloat16", step["point"]["head_dim"])
        configs = [parse_config("forward", name.partition(":")[2]) for name in step["labels"]]
        for config in configs:
            force("forward", config, traits, LIMITS)
        tiles |= {config.tile_n for config in configs}
        today = static.choose_config("forward", traits, LIMITS)
        assert configs[0] == today
        # One thing differs.
        field = step["title"].split()[0]
        base, *others = configs[1:] if field == "fixed" else configs
        assert others and len({getattr(each, field) for each in (base, *others)}) > 1
        changed = {field: getattr(base, field)}
        assert all(replace(each, **changed) == base for each in others)
    assert {128, 160, 176} <= tiles


def test_other_gpus_have_no_question_of_hopper(cases):
    steps = plan.steps(cases, ARCHITECTURES["sm_80"], rehearsal=False)
    assert not [step for step in steps if "labels" in step or step.get("config")]
    assert any(step["kind"] == "parts" for step in steps)


# What is found stays


def test_the_whole_of_it(visit, steps, capsys):
    visit.run(_command({}))
    found = _on_disk(visit.path)
    assert {step["outcome"] for step in found["steps"]} == {"done"}
    assert visit.is_right()
    text = visit.page_path.read_text()
    assert "REHEARSAL" not in text
    assert f"{len(steps)} of {len(steps)} steps" in text
    cases = sum(len(step["names"]) for step in steps[: len(plan.NO_WITNESS)])
    assert re.search(rf"instructions without a witness +\| {cases} ", text)
    row = next(line for line in text.splitlines() if "b1 s16384 h16 d128 causal" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # ms, TFLOP/s, of the matrix product's 800, and over each peer.
    assert cells[1:] == ["2.000", "500", "62%", "1.12", "1.25", "1.38", "1.50", "-"]
    assert "**overlap on**, by 12.5%, as today" in text
    assert "forward 50.0 us, combine 10.0 us" in text
    assert re.search(r"\| 2.000 +\| a +\| 2.250 \| 0.89 +\| 1.19 ", text)
    assert "## Not run" not in text


def test_the_record_is_what_report_and_verify_read(visit, tmp_path, capsys):
    visit.run(_command({}))
    (found,) = record.read_all(tmp_path)
    text = report.render([found], tmp_path / "figures", tmp_path)
    assert "NVIDIA H200, forward" in text and "500" in text
    verified = record.verified_checks("NVIDIA H200", "h", tmp_path)
    (test,) = {name.partition("[")[0] for name in verified}
    path, _, function = test.partition("::")
    assert f"def {function}(case" in (checks.ROOT / path).read_text()
    assert any(name.endswith("[cp_async_4]") for name in verified)
    points = [Point.from_dict(entry) for entry in found["points"]]
    assert sum(point.kind == "grid" for point in points) == 8, "forced configs are no headline"


@pytest.mark.parametrize("first", [0, 1])
def test_a_child_that_dies_at_a_step_costs_that_step(visit, steps, monkeypatch, capsys, first):
    # Every step is killed, every second one in a run.
    killed = set(range(first, len(steps), 2))
    note, noted = visit._note, []

    def spy(task, result, seconds):
        note(task, result, seconds)
        noted.append(task["index"])
        on_disk = [s["outcome"] for s in _on_disk(visit.path)["steps"]]
        for index, outcome in enumerate(on_disk):
            wanted = "crashed" if index in killed else "done"
            assert outcome == (wanted if index in noted else "not reached")

    monkeypatch.setattr(visit, "_note", spy)
    # At step 0 it dies in a case, which is left out when the step is run again.
    deeds = {index: "die" for index in killed} | ({0: "die in a case"} if 0 in killed else {})
    killed -= {0}
    visit.run(_command(deeds))
    assert sorted(noted) == list(range(len(steps)))
    text = visit.page_path.read_text()
    assert "exit status 7" in text and not visit.is_right()
    if first == 0:
        assert re.search(rf"{plan.NO_WITNESS[0]}\S*: crashed", text) and "exit status 11" in text


def test_a_step_that_hangs_is_ended_by_the_watchdog(visit, steps, monkeypatch, capsys):
    monkeypatch.setattr(command, "HANG_SECONDS", 0.5)
    index = len(plan.NO_WITNESS)
    visit.run(_command({index: "hang"}))
    found = [step["outcome"] for step in _on_disk(visit.path)["steps"]]
    assert found.pop(index) == "crashed" and set(found) == {"done"}
    assert "no sign of life for 0.5 s" in visit.page_path.read_text()


def test_the_watchdog_is_that_of_the_issue():
    assert command.HANG_SECONDS == 25


def test_a_worker_that_begins_slowly_is_waited_for(monkeypatch, visit, steps, capsys):
    # Importing PyTorch for the first time may take longer than a step may be silent.
    monkeypatch.setattr(command, "HANG_SECONDS", 0.3)
    visit.run(_command({}, "import time; time.sleep(1)\n" + _WORKER))
    assert {step["outcome"] for step in visit.record["steps"]} == {"done"}


def test_a_parent_that_dies_at_a_step_leaves_what_was_done(visit, steps, monkeypatch, capsys):
    # At each kind of step, and the last, two copies of the process die while they write the step's
    # result: before the record is replaced, and between the record and the page.
    results = {"check": {"check": "passed", "reason": "", "errors": {}}}
    results["ceilings"] = {"matmul_tflops": 800.0, "copy_gbps": 1.0, "num_sms": 1}
    results["point"] = results["predicted"] = {"methods": {}, "predicted_ms": {}}
    results["parts"] = {"parts": {}}
    replace_file = os.replace

    def die_after(written, result, on_result):
        """In a child: write so many files, and die."""
        calls = []

        def die_while_replacing(*paths):
            calls.append(paths)
            if len(calls) > written:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(*paths)

        os.replace = die_while_replacing
        on_result(*result)
        os._exit(0)

    def supervise(tasks, settings, *, on_result, **options):
        kinds = [task["kind"] for task in tasks]
        for index, task in enumerate(tasks):
            cases = {name: {"outcome": "passed", "reason": ""} for name in task.get("names", ())}
            result = {**task, "index": index}, results.get(task["kind"], {"cases": cases})
            is_killed = FULL or index in (kinds.index(task["kind"]), len(tasks) - 1)
            for written in (0, 1) if is_killed else ():
                child = os.fork()
                if child == 0:
                    die_after(written, result, on_result)
                _, status = os.waitpid(child, 0)
                assert os.WTERMSIG(status) == signal.SIGKILL
                outcomes = [step["outcome"] for step in _on_disk(visit.path)["steps"]]
                done, all_steps = index + written, len(steps)
                assert outcomes == ["done"] * done + ["not reached"] * (all_steps - done)
                assert f"{index} of {all_steps} steps" in visit.page_path.read_text()
            on_result(*result)

    monkeypatch.setattr(supervisor, "run", supervise)
    visit.run()
    assert {step["outcome"] for step in _on_disk(visit.path)["steps"]} == {"done"}


def test_the_clock_during_a_point_is_in_the_record(visit, steps, monkeypatch, capsys):
    def between(log, start, end):
        return clocks.Reading(1755.0, 600.0) if (start, end) == (10.0, 12.0) else None

    def supervise(tasks, settings, *, on_result, **options):
        index = next(i for i, step in enumerate(tasks) if step["kind"] == "point")
        on_result({**tasks[index], "index": index}, {"methods": {}, "timed": [10.0, 12.0]})

    monkeypatch.setattr(clocks.ClockLog, "between", between)
    monkeypatch.setattr(supervisor, "run", supervise)
    visit.run()
    (point,) = _on_disk(visit.path)["points"]
    assert (point["sm_clock_mhz"], point["power_w"]) == (1755.0, 600.0)


def test_a_signal_to_stop_ends_it_with_its_record(visit, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "run", lambda *a, **o: os.kill(os.getpid(), signal.SIGTERM))
    visit.run()
    assert _on_disk(visit.path)["stopped"] == "interrupted"


def test_without_a_device_the_page_says_why(visit, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "run", lambda *a, **o: "torch: no CUDA; cupy: none")
    visit.run(_command({}))
    assert "no device could be opened: torch: no CUDA; cupy: none" in visit.page_path.read_text()
    assert not visit.is_right()


# The time


def test_nine_minutes_are_enough_for_all_but_the_last(steps):
    """The plan's own estimate: what people ask first must fit the default."""
    spent = 0.0
    for step in steps:
        spent += step["expected_s"]
        if step["section"] != plan.TUNER:
            assert spent < 9 * 60
    assert spent > 9 * 60 - 60, "time is left over: there is room for more questions"


# What the page says


def _measured(ms):
    entry = {"status": "measured", "check": {"outcome": "checked"}}
    return {**entry, "median_ms": ms, "tflops": 1.0, "gbps": 1.0}


@pytest.mark.parametrize(
    "times, expected",
    [
        ((2.0, 1.0), "**off**, by 100.0%, not as today: on 2.000 ms, off 1.000 ms"),
        ((1.0, 1.5), "**on**, by 50.0%, as today: on 1.000 ms, off 1.500 ms"),
        ((1.0, 1.005), "no difference (under 1%): on 1.000 ms, off 1.005 ms"),
        ((1.0, None), "not answered: on 1.000 ms, off crashed"),
    ],
)
def test_an_answer(times, expected):
    entries = [{"status": "crashed"} if t is None else _measured(t) for t in times]
    methods = dict(zip("ab", entries, strict=True))
    assert page.answer({"a": "on", "b": "off"}, methods) == expected


def test_a_wrong_result_has_no_speed_and_a_reason(visit, steps):
    index = next(i for i, step in enumerate(steps) if step["kind"] == "point")
    wrong = _measured(1.0) | {"check": {"outcome": "failed", "errors": {"out": 7.0}}}
    methods = {"numflash": wrong, "torch-cudnn": _measured(2.0)}
    methods["flash-attention-2"] = {"status": "unavailable", "reason": "not importable: no"}
    visit._note({**steps[index], "index": index}, {"methods": methods, "ratios": {}}, 5.0)
    text = visit.page_path.read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {steps[index]['title']}"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["wrong", "wrong", "-", "-", "-", "-", "-", "-"]
    assert "numflash: measured: wrong result: errors {'out': 7.0}" in text
    assert re.search(r"results that were timed beside peers +\|  +\| 1 ", text)
    assert not visit.is_right()
    assert "flash-attention-2: unavailable: not importable: no" in text


def test_a_case_that_differs_is_told(visit, steps):
    cases = {name: {"outcome": "failed", "reason": "1 of 2 differ"} for name in steps[0]["names"]}
    visit._note({**steps[0], "index": 0}, {"cases": cases}, 5.0)
    assert re.search(
        rf"{plan.NO_WITNESS[0]}.*: failed: 1 of \d+ differ", visit.page_path.read_text()
    )
    assert not visit.is_right()


# The command


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)
    assert bench.main(["first-light"]) == 1
    assert "--rehearse needs none" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_a_positive_number(minutes, capsys):
    with pytest.raises(SystemExit):
        bench.main(["first-light", f"--minutes={minutes}"])
    assert f"must be a positive number of minutes, got '{minutes}'" in capsys.readouterr().err


def test_a_machine_without_the_wheel_has_its_toolkit_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.find_toolkit((str(tmp_path),)) is None
    (tmp_path / "nvvm").mkdir()
    assert checks.find_toolkit((str(tmp_path / "none"), str(tmp_path))) == str(tmp_path)
    monkeypatch.setattr(checks, "find_toolkit", lambda: "/there")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert checks.child_environment()["CUDA_HOME"] == "/there"
    monkeypatch.setenv("CUDA_PATH", "/mine")
    assert "CUDA_HOME" not in checks.child_environment()
