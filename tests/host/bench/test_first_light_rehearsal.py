"""First light, rehearsed: all of it in the simulator under a fake clock, and nothing that lies."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as bench
from bench import report
from bench.first_light import background, page, plan, rehearsal, tasks, turn_times
from bench.first_light.rehearsal import SimulatedDevice
from bench.records import checks, record
from numflash.kernels.kernel import Kernel
from numflash.machine_code.compiler import Cubin
from numflash.runtime.mode import SIMULATED
from tests.support import instruction_harness
from tests.support.covering import thorough

in_the_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The exit status, the record and the page of a whole rehearsal."""
    out = tmp_path_factory.mktemp("first-light")
    status = bench.main(["first-light", "--rehearse", f"--out={out}"])
    (path,) = out.glob("*.json")
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


@thorough
@in_the_simulator
def test_the_whole_of_it_is_rehearsed(rehearsed):
    status, found, _ = rehearsed
    outcomes = {step["title"]: step["outcome"] for step in found["steps"]}
    # By the fake clock all of it fits.
    assert set(outcomes.values()) == {"done"}
    assert 9 * 60 - 60 < found["seconds"] <= 9 * 60
    assert found["seconds"] == pytest.approx(sum(s["expected_s"] for s in found["steps"]), abs=1)
    right = {o for step in found["steps"] for o in page.outcomes(step).values()}
    # Tests of front ends are collected only.
    assert right == {"passed", "skipped"} and status == 0
    # What was forced ran, and was right.
    configs = {
        name: entry
        for step in found["steps"]
        if step["section"] in (plan.QUESTIONS, plan.TUNER)
        for name, entry in step.get("methods", {}).items()
    }
    assert len(configs) > 8
    assert {entry["check"]["outcome"] for entry in configs.values()} == {"checked"}
    parts = [set(step["parts"]) for step in found["steps"] if step["kind"] == "parts"]
    of_gradients = {"delta", "backward-dq", "backward-dkdv"}
    assert {frozenset(each - {"together"}) for each in parts} == {
        frozenset({"forward", "combine"}),
        frozenset(of_gradients),
    }
    (turns,) = (step["parts"] for step in found["steps"] if step["kind"] == "turns")
    assert set(turns) == {each.name for each in turn_times.TIMES}


@thorough
@in_the_simulator
def test_a_rehearsal_cannot_be_taken_for_a_measurement(rehearsed):
    _, found, text = rehearsed
    assert text.splitlines()[0].startswith("REHEARSAL")
    assert "TFLOP/s" not in text
    speeds = text.partition("## How fast")[2].partition("## Not run")[0]
    cells = [cell.strip() for line in speeds.splitlines() for cell in line.split("|")[2:-1]]
    assert cells and not [cell for cell in cells if re.fullmatch(r"[\d.]+%?", cell)]
    numbers = json.dumps(found)
    for name in ("median_ms", "samples_ms", "tflops", "gbps", "copy_gbps", "sm_clock_mhz"):
        assert f'"{name}"' not in numbers


def test_a_rehearsal_is_no_record_wherever_it_lies(tmp_path):
    found = {"kind": "first-light-rehearsal", "rehearsal": True, **rehearsal.MACHINE, "points": []}
    path = tmp_path / "simulator-2026-12-01-first-light-rehearsal.json"
    path.write_text(json.dumps(found))
    assert record.read_all(tmp_path) == []
    assert "simulator" not in report.render(record.read_all(tmp_path), tmp_path, tmp_path)
    path.write_text(json.dumps(found | {"rehearsal": False}))
    assert len(record.read_all(tmp_path)) == 1


def test_no_rehearsal_is_among_the_records():
    for path in record.RESULTS.glob("*.json"):
        assert not json.loads(path.read_text()).get("rehearsal"), path
    assert not [path for path in record.RESULTS.glob("*.md") if "REHEARSAL" in path.read_text()]


@pytest.mark.parametrize("folder", [record.RESULTS, record.RESULTS / "mine"])
def test_a_rehearsal_is_not_written_to_where_records_are(folder, capsys):
    before = sorted(record.RESULTS.rglob("*"))
    options = ["--rehearse", "--minutes=0.001", f"--out={folder}"]
    assert bench.main(["first-light", *options]) == 2
    assert "a rehearsal measures nothing" in capsys.readouterr().out
    assert sorted(record.RESULTS.rglob("*")) == before


def test_times_are_taken_out_of_results_of_every_kind():
    entry = {"median_ms": 1.0, "tflops": 3.0, "status": "measured", "check": {"errors": {}}}
    cleaned = rehearsal.without_times({"methods": {"a": entry}, "ratios": {"b": 2.0}})
    kept = {"status": "measured", "check": {"errors": {}}, "rehearsed": True}
    assert cleaned == {"methods": {"a": kept}}


# What is missing


def _settings(tmp_path, **more):
    paths = {"expected": str(tmp_path / "expected.npz"), "compiled": None}
    return {"device": 0, "rehearsal": True, "budget_ms": 1, "deadline": 1e9, **paths, **more}


def _run(task, tmp_path):
    return tasks.KINDS[task["kind"]](SimulatedDevice(), task, _settings(tmp_path), print)


@in_the_simulator
def test_turns_are_timed_where_sums_are_right(tmp_path, monkeypatch):
    class Clock(SimulatedDevice):
        def time_method(self, method):
            method.call()
            return 12.0

    def run():
        return tasks.KINDS["turns"](Clock(), {}, _settings(tmp_path), print)["parts"]

    # Three blocks in turn; one block, which adds twice, alone and beside the simulated GPU's.
    assert [each["median_ms"] for each in run().values()] == [4.0, 6.0, 6.0]
    adds = turn_times.kernel_of(64).function
    monkeypatch.setattr(turn_times, "kernel_of", lambda words: _adding_once_more(adds))
    with pytest.raises(RuntimeError, match=r"a turn.*: 64 of 64 sums are wrong"):
        run()


def _adding_once_more(adds):
    """The kernel with a lap more than asked for."""

    def wrong(sums, turns, blocks, laps, in_turn):
        adds(sums, turns, blocks, laps + 1, in_turn)

    wrong.__signature__ = inspect.signature(adds)
    return Kernel("turn-times", wrong, 32, 1024)


@in_the_simulator
def test_without_a_simulator_instructions_are_not_called_right(tmp_path, monkeypatch):
    (tmp_path / "expected.failed").touch()
    task = {"kind": "instructions", "names": ["cp_async_4"], "exclude": {}}
    found = _run(task, tmp_path)
    assert found["cases"]["cp_async_4"]["outcome"] == "skipped"
    assert "greenlet" in found["cases"]["cp_async_4"]["reason"]


def test_expected_outputs_are_those_of_the_cases_of_today(tmp_path, monkeypatch):
    files = [f"{name}.py" for name in ("numflash/ptx/a", "tests/support/b_cases")]
    files += ["numflash/simulator/c.py", "tests/support/instruction_harness.py"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        assert any(background.ROOT.glob(str(Path(file).parent / "*.py")))
    monkeypatch.setattr(background, "ROOT", tmp_path)
    seen = {background.expected_path()}
    for file in files:
        (tmp_path / file).write_text("changed")
        seen.add(background.expected_path())
    assert len(seen) == 1 + len(files)


def test_a_simulator_that_fails_says_so_at_once(tmp_path, monkeypatch):
    path = tmp_path / "expected.npz"
    monkeypatch.setattr(background, "cases", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.simulate(str(path))
    assert background.failed_path(path).read_text() == "ZeroDivisionError('division by zero')"
    assert not background.wait_for(path)


def test_without_optuna_the_tuners_part_says_so(monkeypatch, tmp_path):
    # Its parts may have been imported by another test.
    for name in [n for n in sys.modules if n.startswith(("optuna.", "tuner."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    task = {"kind": "predicted", "class": "", "count": 5, "point": {}, "exclude": {}}
    found = _run(task, tmp_path)
    assert "optuna" in found["unavailable"]


# What a GPU would be given

# Without greenlet only the simulator is missing, and without optuna only the tuner.
_BARE = """
import runpy, sys
for name in ("greenlet", "torch", "triton", "optuna", "cupy", "matplotlib", "pytest"):
    sys.modules[name] = None
import bench.__main__, bench.first_light.tasks
from bench.first_light import background, plan
from numflash.runtime.devices import ARCHITECTURES
print(len(plan.steps(background.cases().values(), ARCHITECTURES["sm_90a"], False)))
runpy.run_module("bench.first_light.background", run_name="__main__")
"""


@thorough
def test_on_a_bare_image_all_begins_and_instructions_are_compiled_ahead(tmp_path, monkeypatch):
    names = list(background.cases())
    done = subprocess.run(
        [
            *(sys.executable, "-c", _BARE),
            *("compile", str(tmp_path), "sm_90a", "0", str(len(names))),
        ],
        cwd=checks.ROOT,
        env=checks.child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
    monkeypatch.setattr(background, "_compile", lambda case, arch: "compiled now")
    found = background.compiled(str(tmp_path), names[0], "sm_90a")
    parameters = inspect.signature(background.cases()[names[0]].kernel).parameters
    assert [name for name, _ in found.parameters] == list(parameters)
    assert found.code.startswith(b"\x7fELF")
    assert background.compiled(str(tmp_path), names[1], "sm_90a") == "compiled now"
    assert background.compiled(None, names[0], "sm_90a") == "compiled now"


@in_the_simulator
@pytest.mark.parametrize(
    "name",
    ["cp_async_4", "cp_async_bulk_tensor_5d", "cp_async_bulk_tensor_3d_store", "ldmatrix_x4"],
)
def test_a_case_is_laid_before_a_gpu_as_the_kernel_reads_it(name, monkeypatch, tmp_path):
    from numflash.calls import launch
    from numflash.kernels.kernel import Kernel
    from numflash.simulator import GlobalPointer, SimulatedTensorMap
    from numflash.simulator import launch as simulate

    case = next(c for c in background.cases().values() if c.instruction == name)
    kernel = Kernel(case.instruction, case.kernel, case.block, case.smem_bytes)
    dtypes = [a.dtype for a in case.inputs] + [np.dtype(t) for _, t in case.outputs]

    class Launch:
        """Runs in the simulator what the driver would be told to run."""

        def __init__(self, cubin, ordinal, num_blocks, maps):
            self.maps = maps

        def bind(self, operands):
            arrays = [
                operands[n].array.view(t) for n, t in zip(kernel.parameters, dtypes, strict=True)
            ]
            arguments = [
                SimulatedTensorMap(array, self.maps[n])
                if n in self.maps
                else GlobalPointer(array, array.dtype)
                for n, array in zip(kernel.parameters, arrays, strict=True)
            ]
            return lambda stream: simulate(case.kernel, 1, case.block, arguments, case.smem_bytes)

    monkeypatch.setattr(launch, "DriverLaunch", Launch)
    parameters = tuple((n, "P") for n in kernel.parameters)
    cubin = Cubin(**dict.fromkeys(Cubin.__dataclass_fields__, 0) | {"parameters": parameters})
    got = instruction_harness.run_on_gpu(
        case, cubin, lambda a: instruction_harness._aligned(a.shape, a.dtype, a), np.copy, 0
    )
    expected = instruction_harness.run_simulated(case)
    assert case.difference(expected, got) is None
