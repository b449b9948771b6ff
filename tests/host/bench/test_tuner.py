"""`python -m bench tuner`: the search against an exhaustive run, replayed."""

import pytest

pytest.importorskip("optuna")

from bench import __main__ as bench
from numflash.problem.classes import ProblemClass
from tests.support.covering import thorough
from tests.support.synthetic_recording import recording_of
from tuner.measuring.replay import save
from tuner.space import machines
from tuner.space.configs import Space

PROBLEM = ProblemClass.parse("backward-dq float16-d128-dv128-vec full q1024 k1024 bh32 g1")


@pytest.fixture
def recording(tmp_path):
    """A recording of a space, in a file."""
    found = recording_of(Space(PROBLEM, machines.find("NVIDIA H200")), 3)
    path = tmp_path / "tuner.json"
    save(path, found.device, PROBLEM, found.records, {})
    return path


@thorough
def test_a_recording_is_replayed_with_several_seeds(recording, capsys):
    assert bench.main(["tuner", "--replay", str(recording), "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "| tuner" in out and "tpe" in out and "random" in out and "25%" in out


def test_without_a_gpu_there_is_no_exhaustive_run(tmp_path, capsys):
    assert bench.main(["tuner", "--out", str(tmp_path)]) == 1
    assert "no exhaustive run" in capsys.readouterr().out
