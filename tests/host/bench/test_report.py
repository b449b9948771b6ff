"""Tables, figures and the README's part, from records made up here in tmp_path."""

import json
import sys

import pytest

from bench import __main__ as bench
from bench import report
from bench.peers.methods import FP8, FP8_QUANTIZING
from bench.points import points, work
from bench.points.points import Point
from bench.records import record
from bench.tables import figures, tables
from numflash.machine_code import sources

README = f"before\n{report.BEGIN}\nold text\n{report.END}\nafter\n"


def _method(point, milliseconds, outcome="checked"):
    return {
        "status": "measured",
        "check": {"outcome": outcome, "errors": {"out": 0.5}, "budgets": {"out": 0.1}},
        "median_ms": milliseconds,
        "tflops": work.tflops(point, milliseconds),
        "gbps": work.gbps(point, milliseconds),
    }


def _entry(point, ours=1.0, theirs=2.0, **changes):
    methods = {
        "numflash": _method(point, ours),
        "torch-flash": _method(point, theirs),
        "triton": {"status": "failed", "reason": "RuntimeError: no driver"},
        "cupy": {"status": "out of memory", "reason": "OutOfMemoryError: 34 GB"},
        "torch-math": _method(point, 0.001, "failed"),
    }
    entry = {
        **point.as_dict(),
        "methods": methods,
        "ratios": {"torch-flash": theirs / ours},
        "sm_clock_mhz": 1700.0,
    }
    return {**entry, **changes}


def _record(chosen, direction="forward", **changes):
    return {
        "schema_version": 2,
        "kind": direction,
        "direction": direction,
        "device": "GPU X",
        "date": "2026-01-02",
        "commit": "0123456789abcdef",
        "driver": "580.1",
        "source_hash": sources.source_hash(),
        "max_sm_clock_mhz": 1980.0,
        "ceilings": {"matmul_tflops": 788.0, "copy_gbps": 4300.0, "num_sms": 132},
        "points": chosen,
        **changes,
    }


def _grid(direction="forward", seqlens=(1024, 4096), head_dims=(64, 128)):
    return points.grid(direction, seqlens, head_dims, ("bfloat16",))


def _write(folder, *records):
    folder.mkdir(exist_ok=True)
    for found in records:
        record.write(found, folder)


def _report(tmp_path, *records, readme=README):
    _write(tmp_path / "results", *records)
    (tmp_path / "README.md").write_text(readme)
    options = ("results", "figures")
    arguments = [f"--{name}={tmp_path / name}" for name in options]
    status = bench.main(["report", f"--readme={tmp_path / 'README.md'}", *arguments])
    return status, (tmp_path / "README.md").read_text()


# The README's part


def test_without_records_nothing_is_claimed(tmp_path):
    status, text = _report(tmp_path)
    assert status == 0
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old text" not in text
    assert "not yet verified on hardware" in text and "not yet measured" in text
    assert "TFLOP/s" not in text
    # Once more gives the same.
    assert _report(tmp_path, readme=text)[1] == text


@pytest.mark.parametrize(
    "readme",
    ["nothing", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{README}"],
)
def test_a_readme_without_its_markers_is_left_alone(tmp_path, readme, capsys):
    status, text = _report(tmp_path, readme=readme)
    assert (status, text) == (1, readme)
    assert "needs one" in capsys.readouterr().out


def test_the_readme_shows_8_bit_floats(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (point,) = _grid(seqlens=(4096,), head_dims=(128,))[:1]
    entry = _entry(point, ours=3.0)
    entry["methods"] |= {FP8: _method(point, 2.0), FP8_QUANTIZING: _method(point, 2.5)}
    entry["ratios"] |= {FP8: 2 / 3, FP8_QUANTIZING: 2.5 / 3}
    case = {"median_ms": 0.1, "gbps": 3600.0, "of_copy": 0.83, "is_right": True}
    quantised = _record([], "forward", quantize={"d128 block": case})
    failed = _record([], "forward", quantize={"failed": "RuntimeError: no"})
    text = _report(tmp_path, _record([entry]), quantised, failed)[1]
    (line,) = (line for line in text.splitlines() if "2.500" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "3.000", "2.000", "2.500", "1.50", "1.20",
    ]  # fmt: skip
    assert "cannot be faster than 16 bits" in text
    assert "#### GPU X, quantisation" in text and "83%" in text and "no |" not in text


def test_without_8_bit_floats_the_readme_does_not_speak_of_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = _report(tmp_path, _record([_entry(point) for point in _grid()]))[1]
    assert "FP8" not in text and "quantisation" not in text


def test_the_readme_shows_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    chosen = [_entry(point) for point in _grid()]
    # It had the memory at one point alone.
    chosen[0]["methods"]["cupy"] = _method(_grid()[0], 3.0)
    decode = [_entry(point, ours=0.2) for point in points.decode()]
    status, text = _report(tmp_path, _record(chosen + decode))
    assert status == 0
    assert "| GPU X | not yet verified on hardware | forward: 8 points |" in text
    # b4 s4096 h16 d128 in 1 ms: 549.8 TFLOP/s, 70 % of the product, and its floor.
    assert "| 550" in text and "70%" in text and "70% (matmul)" in text
    assert "| torch-flash | 2.00" in text
    assert "no memory" in text and "wrong" in text
    assert "No time at any point: triton (failed)." in text
    assert "788 TFLOP/s" in text and "4300 GB/s" in text
    assert "commit 0123456789," in text
    assert "| forward bfloat16 b1 s1x65536 h16 d128 " in text


def test_checks_count_with_the_kernels_of_today_only(tmp_path):
    checks = {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}
    old = {"device": "GPU X", "date": "2026-01-01", "source_hash": "old", "checks": checks}
    assert "not yet verified on hardware with the kernels of today" in _report(tmp_path, old)[1]
    # Records of schema 1 have no kind.
    new = {**old, "date": "2026-01-02", "source_hash": sources.source_hash()}
    assert "| GPU X | 1 of 2 " in _report(tmp_path, new)[1]


def test_points_of_older_kernels_are_called_so(tmp_path):
    found = _record([_entry(point) for point in _grid()], source_hash="old")
    assert "8 of 8 points were measured with older kernels" in _report(tmp_path, found)[1]


def test_the_newest_measurement_of_a_point_counts(tmp_path):
    point = _grid()[0]
    old = _record([_entry(point, ours=1.0), _entry(_grid()[1])])
    new = _record([_entry(point, ours=0.5)])
    cut_short = _record([{**point.as_dict(), "failed": "out of time"}])
    _write(tmp_path, *[old] * 10, new, cut_short)
    found = report.newest_points(record.read_all(tmp_path), "forward")
    by_point = {Point.from_dict(e): e["methods"]["numflash"]["median_ms"] for e in found}
    # Number 11 of its day is newer than number 2.
    assert by_point == {point: 0.5, _grid()[1]: 1.0}


def test_gpt2_medium_is_forward_and_backward_together(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forward, backward = (
        _record([_entry(points.gpt2_medium(d), ours=1.0, theirs=5.0)], d)
        for d in points.DIRECTIONS
    )
    text = _report(tmp_path, forward)[1]
    assert "GPT-2" not in text
    text = _report(tmp_path, backward)[1]
    assert "GPT-2 medium" in text
    assert "| torch-flash | 10.00 | 5.00 " in text
    assert "torch-math | 0.00" not in text, "its results were wrong"


# Tables


def test_speeds_are_of_right_results_only():
    table = tables.speeds([_entry(_grid()[0])])
    header, _, row = (
        [c.strip() for c in line.strip("|").split("|")] for line in table.split("\n")
    )
    cells = dict(zip(header, row, strict=True))
    assert cells["numflash TFLOP/s"] == "137"
    assert cells["torch-math TFLOP/s"] == "wrong"
    assert "triton TFLOP/s" not in cells


def test_ratios_are_geometric_means_over_the_points_that_have_both():
    chosen = [_entry(p, theirs=t) for p, t in zip(_grid(), (1.0, 4.0), strict=False)]
    table = tables.ratios([*chosen, _entry(_grid()[2], ratios={})])
    assert "| torch-flash | 2.00 " in table
    assert "1.00 to 4.00" in table and "| 2      |" in table
    assert "No point" in tables.ratios([_entry(_grid()[0], ratios={})])
    assert "4.00" in tables.point_ratios(chosen)


def test_fractions_of_the_same_run():
    point = Point("forward", "grid", "bfloat16", 4, 4096, 4096, 16, 16, 128, False)
    table = tables.fractions([_entry(point, ours=1.396)], work.Ceilings(788.0, 4300.0, 132, 1980))
    assert "50%" in table and "(matmul)" in table and "| 1700" in table
    wrong = _entry(point)
    wrong["methods"]["numflash"]["check"]["outcome"] = "failed"
    assert "no time at any point" in tables.fractions([wrong], work.Ceilings(1, 1, 1, None))


def test_problems_name_each_reason_once():
    text = tables.problems([_entry(p) for p in _grid()])
    assert text.count("RuntimeError: no driver") == 1
    assert "torch-math, first at forward bfloat16 b16 s1024 h32 d64: wrong result" in text
    assert "numflash" not in text


# Figures


def test_plots_are_drawn_and_linked(tmp_path):
    pytest.importorskip("matplotlib", reason=figures.NO_MATPLOTLIB)
    _, text = _report(tmp_path, _record([_entry(point) for point in _grid()]))
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["gpu-x-forward-bfloat16-floor.svg", "gpu-x-forward-bfloat16-tflops.svg"]
    for name in drawn:
        assert f"](figures/{name})" in text
        content = (tmp_path / "figures" / name).read_bytes()
        assert b"<svg" in content and b"torch-flash" in content
        assert b"torch-math" not in content, "its results were wrong"
    _report(tmp_path)
    assert (tmp_path / "figures" / drawn[0]).read_bytes(), "drawn again"


def test_without_matplotlib_there_is_a_line_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, text = _report(tmp_path, _record([_entry(point) for point in _grid()]))
    assert status == 0 and "![" not in text
    assert figures.NO_MATPLOTLIB in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()


# Records


def test_records_have_names_and_an_order(tmp_path):
    base = {"device": "GPU X", "checks": {}}
    names = [
        record.write({**base, "date": date, "kind": kind}, tmp_path).name
        for date, kind in (
            ("2026-01-02", "forward"),
            ("2026-01-02", "forward-ablate"),
            ("2026-01-02", "forward"),
            ("2026-01-01", "verify"),
        )
    ]
    assert names == [
        "gpu-x-2026-01-02-forward.json",
        "gpu-x-2026-01-02-forward-ablate.json",
        "gpu-x-2026-01-02-forward-2.json",
        "gpu-x-2026-01-01.json",
    ]
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    read = [found["name"] for found in record.read_all(tmp_path)]
    assert read[0] == names[3] and read[-1] == names[2]
    assert len(read) == 4
    assert json.loads((tmp_path / names[0]).read_text())["kind"] == "forward"
    assert not list(tmp_path.glob("*.part"))
