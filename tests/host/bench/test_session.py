"""A run outlives its workers, keeps its record on disk, and says what it cannot do."""

import io
import json
import os
import sys
import time
from dataclasses import replace

import pytest

from bench import __main__ as bench
from bench import speed
from bench.measuring import measure, profiler, supervisor, worker
from bench.measuring.session import Session, point_tasks
from bench.peers import methods as peers
from bench.points.points import gpt2_medium, grid
from bench.records import checks, record
from bench.studies import ablation, static
from numflash.configs import parse_config
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError

# A worker whose tasks say what it does: a list of steps, each a line of the journal or a deed.
_WORKER = """
import json, os, sys, time
settings = json.load(open(sys.argv[1]))
journal = open(sys.argv[2], "a")
def write(**line):
    print(json.dumps(line), file=journal, flush=True)
for task in settings["tasks"]:
    write(task=task["index"], begin=None)
    for step in task["steps"]:
        if step in task["exclude"]:
            continue
        if step == "die at once":
            os._exit(7)
        if step == "die afterwards":
            write(task=task["index"], done={"excluded": task["exclude"]})
            os._exit(9)
        if step == "no device":
            write(no_device="none here")
            os._exit(1)
        write(task=task["index"], begin=step)
        if step == "crash":
            print("the last words", flush=True)
            os._exit(11)
        if step == "hang":
            time.sleep(60)
        if step == "break":
            write(broken="illegal address")
            os._exit(3)
    if "fail" in task["steps"]:
        write(task=task["index"], failed="ValueError: no")
    else:
        write(task=task["index"], done={"excluded": task["exclude"]})
write(end=True)
"""


def _command(tasks, journal):
    return [sys.executable, "-c", _WORKER, tasks, journal]


def _supervise(*steps, seconds=20.0):
    """What `supervisor.run` reports for tasks of these steps: results by index, and why not."""
    results = {}
    settings = {"device": 0, "deadline": time.monotonic() + seconds, "budget_ms": 1}
    reason = supervisor.run(
        [{"kind": "test", "steps": list(s)} for s in steps],
        settings,
        on_result=lambda task, result: results.__setitem__(task["index"], result),
        command=_command,
    )
    return results, reason


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.1)


def test_a_crash_costs_a_method_its_point_and_no_more():
    results, reason = _supervise(["a"], ["a", "crash", "b"], ["a", "crash"])
    assert reason is None
    assert results[0] == {"excluded": {}}
    assert list(results[1]["excluded"]) == ["crash"]
    assert "exit status 11" in results[1]["excluded"]["crash"]
    assert "the last words" in results[1]["excluded"]["crash"]
    assert list(results[2]["excluded"]) == ["crash"]


def test_a_hang_is_ended(monkeypatch):
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 0.6)
    results, _ = _supervise(["a", "hang"], ["b"])
    assert "no sign of life" in results[0]["excluded"]["hang"]
    assert results[1] == {"excluded": {}}


def test_a_broken_device_is_told_in_the_methods_own_words():
    results, _ = _supervise(["break"])
    assert results[0]["excluded"] == {"break": "broke the device: illegal address"}


def test_a_task_that_fails_is_given_up():
    results, _ = _supervise(["fail"], ["a"])
    assert results[0]["failed"] == "ValueError: no"
    assert results[1] == {"excluded": {}}


def test_a_task_that_dies_outside_any_method_is_given_up():
    results, _ = _supervise(["a"], ["die at once"], ["b"])
    assert "exit status 7" in results[1]["failed"]
    assert results[0] == results[2] == {"excluded": {}}


def test_a_worker_that_dies_between_tasks_is_replaced():
    results, _ = _supervise(["a"], ["die afterwards"], ["b"])
    assert results == {index: {"excluded": {}} for index in range(3)}


def test_a_worker_that_cannot_start_is_not_started_again():
    results = {}
    settings = {"device": 0, "deadline": time.monotonic() + 20, "budget_ms": 1}
    started = []

    def command(tasks, journal):
        started.append(1)
        return [sys.executable, "-c", "raise SystemExit('no such module')"]

    tasks = [{"kind": "test", "steps": []}] * 2
    supervisor.run(
        tasks, settings, command=command, on_result=lambda t, r: results.update({t["index"]: r})
    )
    assert len(started) == 1
    assert all("no such module" in result["failed"] for result in results.values())
    assert len(results) == 2


def test_no_device_is_a_reason():
    results, reason = _supervise(["no device"])
    assert (results, reason) == ({}, "none here")


def test_a_device_that_has_worked_is_waited_for(monkeypatch, tmp_path):
    # The process that was killed on it may hold it for a moment.
    monkeypatch.setattr(supervisor, "_RETRY_SECONDS", 0.01)
    busy = tmp_path / "busy"
    program = f"""
import os
if os.path.exists({str(busy)!r}):
    os.remove({str(busy)!r})
    print('{{"no_device": "busy"}}', file=open(__import__("sys").argv[2], "a"))
    raise SystemExit(1)
"""
    on_crash = _WORKER.replace("os._exit(11)", f"open({str(busy)!r}, 'w'); os._exit(11)")
    monkeypatch.setitem(globals(), "_WORKER", program + on_crash)
    results, reason = _supervise(["a", "crash"], ["b"])
    assert reason is None and not busy.exists()
    assert list(results[0]["excluded"]) == ["crash"] and results[1] == {"excluded": {}}


def test_a_device_that_is_lost_is_not_waited_for_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "_RETRY_SECONDS", 0.01)
    lost = tmp_path / "lost"
    program = f"""
import os, sys
if os.path.exists({str(lost)!r}):
    print('{{"no_device": "lost"}}', file=open(sys.argv[2], "a"))
    print("again", file=open({str(lost)!r}, "a"))
    raise SystemExit(1)
open({str(lost)!r}, "w")
"""
    monkeypatch.setitem(globals(), "_WORKER", program + _WORKER)
    assert _supervise(["a"], ["crash"], ["b"]) == ({0: {"excluded": {}}}, "lost")
    assert lost.read_text().count("again") == 1 + supervisor._RETRIES


def test_the_deadline_ends_a_worker():
    start = time.monotonic()
    results, reason = _supervise(["a"], ["hang"], seconds=0.8)
    assert (results, reason) == ({0: {"excluded": {}}}, None)
    assert time.monotonic() - start < 5


# The worker


class _FakeDevice:
    def ceilings(self):
        return {"matmul_tflops": 700.0}

    def normal(self, *args):
        raise RuntimeError("no memory for the inputs")

    def synchronize(self):
        """It works."""

    def free(self):
        """There is nothing to free."""


def _journal(tasks, seconds=60.0):
    file = io.StringIO()
    settings = {"deadline": time.monotonic() + seconds, "budget_ms": 1}
    tasks = [{"exclude": {}, "index": i, **task} for i, task in enumerate(tasks)]
    worker.run_tasks(_FakeDevice(), tasks, settings, worker.Journal(file))
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_the_worker_writes_before_it_acts():
    point = {"kind": "point", "point": gpt2_medium("forward").as_dict(), "peers": ["numflash"]}
    lines = _journal([{"kind": "ceilings"}, point])
    assert lines[:2] == [
        {"task": 0, "begin": None},
        {"task": 0, "done": {"matmul_tflops": 700.0}},
    ]
    assert lines[2:] == [
        {"task": 1, "begin": None},
        {"task": 1, "failed": "RuntimeError: no memory for the inputs"},
        {"end": True},
    ]


def test_a_task_that_breaks_the_device_ends_the_worker(monkeypatch):
    def fault(self):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(_FakeDevice, "synchronize", fault)
    point = {"kind": "point", "point": gpt2_medium("forward").as_dict(), "peers": ["numflash"]}
    with pytest.raises(measure.BrokenDeviceError, match="no memory for the inputs"):
        _journal([point, {"kind": "ceilings"}])


def test_the_worker_stops_at_the_deadline():
    assert _journal([{"kind": "ceilings"}], seconds=-1) == [{"end": True}]


def test_a_worker_without_a_device_says_so(tmp_path, monkeypatch):
    def no_device(ordinal):
        raise RuntimeError("torch: no CUDA")

    monkeypatch.setattr(worker, "open_device", no_device)
    (tmp_path / "tasks").write_text(json.dumps({"device": 0, "tasks": []}))
    assert worker.main(str(tmp_path / "tasks"), str(tmp_path / "journal")) == 1
    assert json.loads((tmp_path / "journal").read_text()) == {"no_device": "torch: no CUDA"}


# The session

_RESULT = {
    "methods": {
        "numflash": {
            "status": "measured",
            "check": {"outcome": "checked"},
            "median_ms": 2.0,
            "tflops": 137.4,
            "gbps": 270.0,
        }
    },
    "ratios": {},
    "timed": [1.0, 2.0],
    "kernel": "k",
}


@pytest.fixture
def gpu(monkeypatch):
    """A machine that looks as if it had a GPU."""
    values = {"name": "NVIDIA H200", "compute_cap": "9.0", "clocks.max.sm": "1980 MHz"}
    monkeypatch.setattr(record, "_gpu", lambda field, device=0: values.get(field))


def _session(tmp_path):
    return Session(record.describe_machine(), "forward", "forward", tmp_path, 0)


def test_the_record_is_on_disk_after_every_result(tmp_path, gpu, monkeypatch, capsys):
    session = _session(tmp_path)
    on_disk = []

    def run(tasks, settings, *, on_result, command):
        for task in tasks[:2]:
            on_result(task, {"matmul_tflops": 700.0} if task["kind"] == "ceilings" else _RESULT)
            on_disk.append(json.loads(session.path.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(supervisor, "run", run)
    chosen = grid("forward")[:2]
    session.run([{"kind": "ceilings"}, *point_tasks(chosen, ["numflash"])], time.monotonic() + 9)
    assert on_disk[0]["ceilings"] == {"matmul_tflops": 700.0}
    assert len(on_disk[1]["points"]) == 1
    final = json.loads(session.path.read_text())
    assert final["stopped"] == "interrupted"
    assert final["left_out"] == 1
    assert final["schema_version"] == 2
    assert final["max_sm_clock_mhz"] == 1980.0
    assert final["points"][0]["seqlen_q"] == chosen[0].seqlen_q
    output = capsys.readouterr().out
    assert "[2/3" in output and "numflash 137" in output and "interrupted" in output


@pytest.mark.parametrize(
    "mode", [[], ["--ablate"], ["--block-sizes"], ["--memory"], ["--quantize"]]
)
def test_every_command_measures_prints_and_records(tmp_path, gpu, monkeypatch, capsys, mode):
    asked = []

    def run(tasks, settings, *, on_result, command):
        asked.append(settings["deadline"] - time.monotonic())
        for task in tasks:
            if task["kind"] == "ceilings":
                found = {"matmul_tflops": 700.0, "copy_gbps": 4000.0, "num_sms": 132}
                on_result(task, {**found, "matmul": "bfloat16"})
            elif task["kind"] == "host":
                on_result(task, {"numflash": {"median_us": 20.0}})
            elif task["kind"] == "quantize":
                entry = {"median_ms": 0.1, "gbps": 3600.0, "of_copy": 0.85, "is_right": True}
                on_result(task, {"d128 block": entry, "d256 block": {"reason": "no room"}})
            else:
                names = task["peers"]
                entry = {**_RESULT["methods"]["numflash"], "peak_bytes": 2**20}
                on_result(task, {**_RESULT, "methods": dict.fromkeys(names, entry)})

    monkeypatch.setattr(supervisor, "run", run)
    for direction in ("forward", "backward"):
        options = [direction, "--quick", f"--out={tmp_path}", "--time-limit=77", *mode]
        assert bench.main(options) == 0
        output = capsys.readouterr().out
        assert "matrix product 700 TFLOP/s" in output
        assert "record: " in output
        if mode == ["--quantize"] or (mode == [] and direction == "forward"):
            assert "| d128 block   | 100.0   | 3600 | 85%" in output and "no room" in output
    assert asked == [pytest.approx(77, abs=5)] * 2
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_verify_ends_with_a_quick_forward(tmp_path, gpu, monkeypatch, capsys):
    monkeypatch.setattr(checks, "GROUPS", ())
    seen = []

    def run(tasks, settings, *, on_result, command):
        seen.extend(task for task in tasks if task["kind"] == "point")

    monkeypatch.setattr(supervisor, "run", run)
    assert bench.main(["verify", f"--out={tmp_path}"]) == 0
    assert seen and {len(task["peers"]) for task in seen} == {6}
    assert {"numflash-fp8", "numflash-fp8+quantize"} < set(seen[0]["peers"])
    kinds = [json.loads(path.read_text())["kind"] for path in sorted(tmp_path.glob("*.json"))]
    assert sorted(kinds) == ["forward", "verify"]
    monkeypatch.setattr(supervisor, "run", lambda *a, **o: 1 / 0)
    assert bench.main(["verify", f"--out={tmp_path}"]) == 0, "the checks decide"
    assert "timing stopped: ZeroDivisionError" in capsys.readouterr().out
    seen.clear()
    assert bench.main(["verify", f"--out={tmp_path}", "--no-timing"]) == 0
    assert seen == []


def test_a_device_that_cannot_be_opened_is_an_error(tmp_path, gpu, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "run", lambda *a, **o: "torch: no CUDA")
    assert bench.main(["forward", f"--out={tmp_path}"]) == 1
    assert "no device could be opened: torch: no CUDA" in capsys.readouterr().out


# Without a GPU


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)


class _Report:
    registers, spill_store_bytes, spill_load_bytes, smem_bytes, blocks_per_sm = 128, 0, 4, 4096, 3
    instructions = {"HMMA": 64, "MUFU.EX2": 8}


@pytest.fixture
def compiled(monkeypatch):
    """What `inspect_kernel` was asked for, instead of compiling."""
    from numflash.machine_code import report

    asked = []

    def inspect_kernel(config, traits, limits):
        asked.append((config, traits, limits.arch))
        if limits.arch == "sm_75":
            raise report.UnsupportedError("not on Turing")
        return _Report()

    monkeypatch.setattr(report, "inspect_kernel", inspect_kernel)
    return asked


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_without_a_gpu_the_static_figures_are_printed(direction, no_gpu, compiled, capsys):
    assert bench.main([direction]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("There is no NVIDIA GPU here")
    # 3 head dims, 6 architectures: 2 families in 2 dtypes, or one, also on 8-bit floats.
    rows = {"forward": 3 * 18, "backward": 4 * 18}[direction]
    if direction == "forward":
        assert lines.pop() == static.FP8_NOTE
    assert len(lines) == 2 + rows
    assert len(compiled) == rows
    assert {arch for *_, arch in compiled} == set(static.ARCHS)
    assert sum("not on Turing" in line for line in lines) == rows // 6
    assert all("  64 " in line for line in lines[2:] if "sm_80 " in line)
    on_8_bits = [(config, arch) for config, traits, arch in compiled if traits.fp8]
    assert len(on_8_bits) == sum(" fp8 " in line for line in lines)
    assert len(on_8_bits) == (18 if direction == "forward" else 0)
    for config, arch in on_8_bits:
        assert config.multiplies_codes is (arch in ("sm_89", "sm_90a", "sm_120"))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("--traffic", "Counted from the tile schedule"),
        ("--memory", "numflash MiB"),
        ("--ablate", "online softmax in one pass"),
        ("--block-sizes", "sm_80"),
        ("--quantize", "sm89-t128w"),
    ],
)
def test_every_mode_without_a_gpu(mode, expected, no_gpu, compiled, capsys):
    assert bench.main(["forward", mode, "--quick"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("There is no NVIDIA GPU here")
    assert expected in output
    assert "TFLOP/s" not in output


def test_a_kernel_that_an_architecture_has_not_is_a_row_with_its_reason(monkeypatch):
    def choose(*arguments, **options):
        raise UnsupportedError("no forward kernel runs it")

    monkeypatch.setattr(static, "choose", choose)
    found = list(static.rows("forward", (64,), ("float16",), ("sm_89",)))
    assert [row["dtype"] for row in found] == ["float16", "fp8"]
    lines = []
    deadline = time.monotonic() + 9
    static.print_rows(iter(found), static.COLUMNS, deadline, lambda x, **_: lines.append(x))
    assert all(line.endswith("no forward kernel runs it") for line in lines[1:])


def test_static_figures_keep_the_time_limit(no_gpu, compiled, capsys):
    assert bench.main(["forward", "--time-limit", "0"]) == 0
    assert "out of time" in capsys.readouterr().out
    assert len(compiled) == 1


def test_an_unknown_peer_is_refused(no_gpu, capsys):
    assert bench.main(["forward", "--peers", "nobody"]) == 2
    assert "got 'nobody'" in capsys.readouterr().out


# What is compared


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_idea_can_be_asked_for(direction, arch):
    limits = ARCHITECTURES[arch]
    ideas = ablation.ideas(direction, limits)
    wanted = {"fusion", "staging", "swizzle"}
    wanted |= {"recomputation"} if direction == "backward" else {"tiling", "split"}
    assert wanted <= {idea.name for idea in ideas}
    for idea in ideas:
        assert peers.find(idea.with_it)
        assert idea.without is None or peers.find(idea.without).name != idea.with_it


def test_the_ideas_of_hopper_are_turned_off_one_by_one():
    limits = ARCHITECTURES["sm_90a"]
    names = {"wgmma and bulk copies", "overlap", "pingpong", "persistent", "arrivals", "staging"}
    rows = [idea for idea in ablation.ideas("forward", limits) if idea.name in names]
    assert {idea.name for idea in rows} == names
    # Not a baseline of its own: everything is compared with one kernel, and differs in one thing.
    for head_dim in (64, 128):
        traits = static.traits_of("float16", head_dim)
        config = static.choose_config("forward", traits, limits)
        assert ablation.has_switches({"forward": config})
        for idea in rows:
            if idea.point.head_dim != head_dim or idea.without is None:
                continue
            texts = [
                name.partition(":")[2] or str(config) for name in (idea.with_it, idea.without)
            ]
            assert str(config) in texts
            if idea.name == "wgmma and bulk copies":
                assert texts[1].startswith("sm80-")
                continue
            on, off = (parse_config("forward", text) for text in texts)
            field = "num_stages" if idea.name == "staging" else idea.name
            assert getattr(on, field) > getattr(off, field)
            assert replace(on, **{field: getattr(off, field)}) == off
    assert not ablation.has_switches({"backward": config})


def test_the_table_of_ideas_by_hand():
    idea = next(i for i in ablation.ideas("forward", ARCHITECTURES["sm_80"]) if i.name == "tiling")
    entry = _RESULT["methods"]["numflash"]
    found = {
        idea.with_it: {**entry, "median_ms": 2.0, "peak_bytes": 3 * 2**20},
        idea.without: {**entry, "median_ms": 5.0},
    }
    row = ablation.table([idea], {idea.point: found}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:8] == ["2.000", "5.000", "2.50", "3.0", "-"]
    found[idea.without] = {"status": "out of memory"}
    assert "out of memory" in ablation.table([idea], {idea.point: found})
    found[idea.without] = {**entry, "check": {"outcome": "failed"}}
    assert "wrong" in ablation.table([idea], {idea.point: found})
    assert "not measured" in ablation.table([idea], {})


def test_block_sizes_fit_and_begin_with_the_default():
    limits = ARCHITECTURES["sm_86"]
    traits = static.traits_of("float16", 256)
    for family in ("forward", "backward-dq", "backward-dkdv"):
        configs = ablation.block_sizes(family, 256, "float16", limits)
        assert configs[0] == static.choose_config(family, traits, limits)
        assert len(configs) == len(set(map(str, configs)))
        assert len(configs) > 2 or family != "forward"
        assert all(c.smem_bytes(traits) <= limits.max_smem_per_block for c in configs)


def test_the_swizzle_frees_ldmatrix_of_conflicts():
    pytest.importorskip("numflash.tiles.mma.layouts")
    for head_dim in (64, 128, 256):
        assert ablation.bank_conflicts(head_dim, True) == 1
        assert ablation.bank_conflicts(head_dim, False) == 8


# The profiler


def test_profiler_output_is_summed():
    output = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward","dram__bytes_read.sum","byte","1,000"
"0","forward","dram__bytes_write.sum","byte","20"
"1","combine","dram__bytes_read.sum","byte","5"
"""
    assert profiler.parse(output) == {"read_bytes": 1005.0, "written_bytes": 20.0}
    assert profiler.parse("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_without_a_profiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no profiler"):
        profiler.count(gpt2_medium("forward"), 1)


def test_a_profiler_that_is_refused_says_why(monkeypatch, tmp_path):
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        profiler.count(gpt2_medium("forward"), 10)


def test_the_modules_that_measure_need_no_gpu_library():
    # They are imported on machines that have none.
    assert {"torch", "cupy", "triton"}.isdisjoint(vars(measure)) and speed.run
