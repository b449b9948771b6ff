"""First light: findings stay, whichever process dies; a missing or late part costs itself only."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest

from bench import __main__ as bench
from bench import report
from bench.first_light import background, command, page, plan, tasks
from bench.measuring import supervisor
from bench.peers import methods as peers
from bench.peers import one_kernel
from bench.points.points import Point
from bench.records import checks, record
from bench.studies import static
from numflash.configs import parse_config
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import force
from tests.support.covering import ALL, FULL, some
from tuner.measuring import clocks

LIMITS = ARCHITECTURES["sm_90a"]
_POPEN = subprocess.Popen

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
    if kind in ("check", "tests"):
        return {"check": "passed", "reason": "", "errors": {"out": [1e-4, 2e-4]}, "kernel": "k"}
    if kind == "ceilings":
        return {"matmul_tflops": 800.0, "copy_gbps": 4000.0, "num_sms": 132, "matmul": "m"}
    if kind == "turns":
        return {"parts": {"a turn": {"median_ms": 0.00137}}}
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
    sections = list(dict.fromkeys(step["section"] for step in steps))
    assert sections == [
        *(plan.INSTRUCTIONS, plan.FORWARD, plan.GRADIENTS),
        *(plan.SPEED, plan.QUESTIONS, plan.FRAMEWORKS, plan.TUNER),
    ]
    # What uses tensor maps is compiled ahead by the time that it comes.
    last = [s for s in steps if s["section"] == plan.INSTRUCTIONS][-1]
    assert last["title"].startswith("tensor maps")
    names = [name for step in steps for name in step.get("names", [])]
    assert sorted(names) == sorted(map(str, cases)), "every case, and once"


def test_the_forwards_and_the_headline_points(steps):
    shapes = [step["shape"][3:] for step in steps if step["section"] == plan.FORWARD]
    assert shapes == [[64, 64], [128, 128], [256, 256], [128, 96], *[[128, 128]] * 2]
    sequences, pages = (s for s in steps if s.get("is_packed") or s.get("page_size"))
    assert "one after another" in sequences["title"] and "pages of 16 keys" in pages["title"]
    timed = [s for s in steps if (s["section"], s["kind"]) == (plan.SPEED, "point")]
    found = {
        tuple(s["point"][name] for name in ("direction", "head_dim", "seqlen_q", "causal"))
        for s in timed
    }
    wanted = {("forward", 128, n, causal) for n in (4096, 16384) for causal in (False, True)}
    wanted |= {(way, 64, 16384, False) for way in ("forward", "backward")}
    wanted |= {("backward", d, 16384, False) for d in (128, 256)}
    assert wanted <= found
    assert all("torch-cudnn" in s["peers"] and "flash-attention-3" in s["peers"] for s in timed)


def test_gradients_are_checked_in_two_kernels_and_in_one(steps):
    checks = [s for s in steps if s["section"] == plan.GRADIENTS]
    assert all(s["gradients"] for s in checks)
    found = {(s["shape"][3], s.get("fused", False)) for s in checks}
    assert found == {(64, False), (128, False), (256, False), (64, True), (128, True)}
    # Rows enough for Hopper's kernels.
    traits = static.traits_of("float16", 128)
    for family in ("backward-dq", "backward-dkdv"):
        config = static.choose_config(family, traits, LIMITS, rows=checks[0]["shape"][1])
        assert config.generation == "sm90"


def test_all_of_it_fits_nine_minutes(steps):
    assert sum(step["expected_s"] for step in steps) < 9 * 60 - 8


def _configs(name):
    """The configs that a method's name forces, by family."""
    variant = name.partition(":")[2]
    if "=" not in variant:
        return {"forward": parse_config("forward", variant)}
    pairs = (each.split("=") for each in variant.partition(",dq=")[0].split(","))
    return {family: parse_config(family, text) for family, text in pairs}


def test_every_question_is_of_configs_that_can_be_forced(steps):
    asked = [step for step in steps if step["section"] == plan.QUESTIONS and "labels" in step]
    titles = {step["title"].split()[0] for step in asked}
    assert titles == {"overlap", "pingpong", "v_stages", "gradients", "cluster"}
    changed = set()
    for step in asked:
        traits = static.traits_of("bfloat16", step["point"]["head_dim"])
        configs = [_configs(name) for name in step["labels"]]
        for family, config in (pair for each in configs for pair in each.items()):
            force(family, config, traits, LIMITS)
            today = str(static.choose_config(family, traits, LIMITS))
            assert family == "forward" or str(config) in (today, f"{today}-persistent")
            changed.add((family, str(config) != today))
        if "the way of dQ" in step["title"]:
            # The kernel as it is, and each change to it.
            (fused,) = {each["backward"] for each in configs}
            assert [x.partition(",dq=")[2] for x in step["labels"]] == ["", *one_kernel.CHANGES]
            for name in step["labels"]:
                assert peers.find(name).unavailable() is None
            point = Point.from_dict(step["point"])
            assert one_kernel.start_of(point, fused, 132, 1).group > 1
            assert fused.dq_buffers(traits) == 2
            continue
        if step["point"]["direction"] == "backward":
            assert {tuple(x) for x in configs} == {("backward",), ("backward-dq", "backward-dkdv")}
            continue
        base, *others = (each["forward"] for each in configs)
        assert base == static.choose_config("forward", traits, LIMITS)
        # One thing differs.
        for each in others:
            (field,) = (
                x.name for x in fields(base) if getattr(base, x.name) != getattr(each, x.name)
            )
            assert field in step["title"]
            changed.add((field, getattr(each, field)))
    assert {("tile_n", 176), ("v_stages", 3), ("cluster", 2), ("backward", True)} <= changed
    # Blocks that wait for each other may hang: nothing comes behind them.
    pairs = [step for step in steps if any("-c2" in name for name in step.get("peers", ()))]
    assert pairs == [steps[-1]]


@pytest.mark.parametrize(
    ("lines", "status", "outcome"),
    [
        ("3 passed, 1 skipped in 4.0s", 0, "passed"),
        ("5 skipped in 0.1s", 0, "skipped"),
        ("1 skipped in 0.1s", 5, "skipped"),
        ("FAILED tests/gpu/test_torch.py::test_x\n1 failed, 3 passed in 2s", 1, "failed"),
    ],
)
def test_tests_of_a_front_end_have_one_outcome(monkeypatch, lines, status, outcome):
    program = f"import sys; print({lines!r}); sys.exit({status})"

    def popen(command, **options):
        assert command[-1] == "tests/gpu/test_torch.py"
        return _POPEN([sys.executable, "-S", "-c", program], **options)

    monkeypatch.setattr(tasks.subprocess, "Popen", popen)
    task = {"kind": "tests", "module": "json", "path": "tests/gpu/test_torch.py"}
    notes, settings = [], {"rehearsal": False, "deadline": 1e12}
    found = tasks.KINDS["tests"](None, task, settings, notes.append)
    assert found["check"] == outcome and notes
    assert lines.split("\n")[-1] in found["reason"]
    lacking = tasks.KINDS["tests"](None, task | {"module": "no_such"}, settings, notes.append)
    assert lacking == {"check": "skipped", "reason": "no_such is not installed"}
    late = tasks.KINDS["tests"](None, task, settings | {"deadline": 0.0}, notes.append)
    assert late["check"] in (outcome, "skipped")


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
    assert "forward 50.0 us, combine 10.0 us" in text and "a turn 1.37 us" in text
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
    assert sum(point.kind == "grid" for point in points) == 10, "forced configs are no headline"


@pytest.mark.parametrize("first", some([0, 1], 0))
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
    results["tests"] = results["check"]
    results["ceilings"] = {"matmul_tflops": 800.0, "copy_gbps": 1.0, "num_sms": 1}
    results["point"] = results["predicted"] = {"methods": {}, "predicted_ms": {}}
    results["parts"] = results["turns"] = {"parts": {}}
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
            is_killed = FULL or index in (0, len(tasks) - 1)
            is_killed = is_killed or (ALL and index == kinds.index(task["kind"]))
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
