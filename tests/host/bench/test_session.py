"""A run on a GPU keeps its record on disk, prints what it finds, and says what it cannot do."""

import json
import time

import pytest

from bench import __main__ as bench
from bench.measuring import supervisor
from bench.measuring.session import Session, point_tasks
from bench.points.points import grid
from bench.records import checks, record

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

    def run(tasks, settings, *, on_result):
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

    def run(tasks, settings, *, on_result):
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

    def run(tasks, settings, *, on_result):
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
