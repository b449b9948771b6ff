"""`python -m bench verify` without a GPU: no failure, crash or hang costs another's record."""

import json
import time

from bench import __main__ as bench
from bench.records import checks, record
from tests.support.covering import thorough

_TESTS = """
import os, time

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_crashes():
    os._exit(11)

def test_hangs():
    time.sleep(60)

def test_passes_after_a_crash():
    pass

def test_passes_after_a_hang():
    pass
"""


@thorough
def test_every_test_gets_its_outcome(tmp_path, monkeypatch):
    # One of two children goes on after a crash, the other after a hang.
    monkeypatch.setattr(checks, "HANG_SECONDS", 3)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "test_rough.py").write_text(_TESTS)
    ids = checks.collect([checks.Group("rough", ("test_rough.py",), 1)])["rough"]
    assert len(ids) == 6
    seen = []
    outcomes = checks.run(ids, 2, time.monotonic() + 60, lambda name, _: seen.append(name))
    assert {name.split("::test_")[1]: check["outcome"] for name, check in outcomes.items()} == {
        "passes": "passed",
        "fails": "failed",
        "crashes": "crashed",
        "hangs": "timeout",
        "passes_after_a_crash": "passed",
        "passes_after_a_hang": "passed",
    }
    assert sorted(seen) == sorted(ids)
    assert "assert 1 == 2" in outcomes["test_rough.py::test_fails"]["reason"]


@thorough
def test_tests_that_cannot_be_collected_end_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "_gpu", lambda *_: "GPU X")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "GROUPS", (checks.Group("rough", ("test_rough.py",), 1),))
    (tmp_path / "test_rough.py").write_text("import nothing_of_that_name")
    assert bench.main(["verify", f"--out={tmp_path / 'out'}"]) == 1
    assert "the tests of test_rough.py cannot be collected" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_deadline_leaves_tests_without_an_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "test_rough.py").write_text(_TESTS)
    ids = ["test_rough.py::test_hangs", "test_rough.py::test_passes_after_a_hang"]
    assert checks.run(ids, 1, time.monotonic() + 2, lambda *_: None) == {}


def test_only_passes_with_the_same_sources_on_the_same_device_count(tmp_path):
    passed = {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}
    result = {"device": "GPU X", "date": "2026-01-02", "source_hash": "s", "checks": passed}
    first, second = record.write(result, tmp_path), record.write(result, tmp_path)
    assert first.name == "gpu-x-2026-01-02.json"
    assert second.name == "gpu-x-2026-01-02-2.json"
    (tmp_path / "broken.json").write_text("{")
    assert json.loads(first.read_text()) == result
    assert record.verified_checks("GPU X", "s", tmp_path) == {"a"}
    assert record.verified_checks("GPU X", "other", tmp_path) == set()
    assert record.verified_checks("GPU Y", "s", tmp_path) == set()


def test_checks_are_counted_by_config():
    file = "tests/gpu/test_attention.py"
    names = {
        f"{file}::test_forward_on_hopper[sm90-m64n32w4s1x2-overlap:causal-float16-1x2]": "passed",
        f"{file}::test_forward_on_hopper[sm90-m64n32w4s1x2-overlap:odd-float16-1x2]": "failed",
        f"{file}::test_forward_on_hopper[sm90-m64n32w4s1:odd-float16-1x2]": "passed",
        f"{file}::test_forward[causal-float16]": "passed",
    }
    counts = checks.by_config({name: {"outcome": outcome} for name, outcome in names.items()})
    assert counts == {
        "sm90-m64n32w4s1x2-overlap": {"passed": 1, "failed": 1},
        "sm90-m64n32w4s1": {"passed": 1},
    }


@thorough
def test_every_check_of_the_forward_is_in_one_group():
    found = checks.collect(group for group in checks.GROUPS if "orward" in group.name)
    hopper, rest = map(set, found.values())
    assert not hopper & rest
    assert len(checks.by_config({name: {"outcome": "passed"} for name in hopper})) > 20
    assert any("of_many_tiles" in name for name in hopper)
    assert all("test_forward[" in name for name in rest) and rest


def test_without_a_gpu_verify_says_so(monkeypatch, capsys):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)
    assert bench.main(["verify"]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out
