"""numflash-tune on a GPU: configs are measured, remembered and used."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("numflash_tuner")

from numflash.problem.classes import ProblemClass
from numflash.selection import store
from numflash.selection.choice import device_key
from tuner.measuring.measurer import DeviceMeasurer
from tuner.space.configs import Space
from tuner.space.target import local_machine

FORWARD = ProblemClass.parse("forward float16-d64-dv64-vec causal q512 k512 bh16 g1")
PROGRAM = """
import cupy, numflash
q = cupy.zeros((2, 512, 8, 64), "float16")
numflash.attention(q, q, q, causal=True, precision=PRECISION)
print(numflash.explain_dispatch(q, q, q, causal=True, precision=PRECISION).forward.rule)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A cache of the test's own, with tuned configs turned on, here and in children."""
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NUMFLASH_TUNED", raising=False)
    return dict(os.environ)


@pytest.mark.parametrize(
    "problem",
    [
        FORWARD,
        ProblemClass.parse("forward float16-d128-dv128-vec full q1 k16384 bh16 g4"),
        ProblemClass.parse("combine float16-d128-dv128-vec full q1 k16384 bh16 g4"),
        ProblemClass.parse("backward-dkdv bfloat16-d64-dv64-vec causal q512 k512 bh16 g1"),
        ProblemClass.parse("backward-dq bfloat16-d64-dv64-vec causal q512 k512 bh16 g1"),
        ProblemClass.parse("backward float16-d64-dv64-vec full q512 k512 bh16 g1"),
        ProblemClass.parse("forward bfloat16-d128-dv128-vec-fp8 causal q512 k512 bh16 g1"),
        ProblemClass.parse("forward float16-d64-dv64-vec-fp8 full q1 k16384 bh16 g4"),
        ProblemClass.parse("forward float16-d64-dv64-vec-fp8-keyscales full q512 k512 bh16 g1"),
        ProblemClass.parse("forward float32-d64-dv64-vec window128 q512 k512 bh16 g1"),
    ],
    ids=lambda problem: f"{problem.family}-{problem.traits}",
)
def test_the_default_of_every_family_is_checked_and_measured(problem, environment):
    config = str(Space(problem, local_machine(0)).default)
    with DeviceMeasurer(0, expected=device_key(0)) as measurer:
        record = measurer.measure(problem, config, lambda samples: False)
        again = measurer.remeasure(problem, [config], 3)
    assert record.outcome == "measured", record.reason
    assert len(record.samples_ms) >= 5 and min(record.samples_ms) > 0
    assert len(again[config]) == 3


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_short_run_is_remembered_and_used(environment, tmp_path, precision):
    report = tmp_path / "report.html"
    options = "--pass forward --dtype float16 --head-dim 64 --mask causal --seqlen 512"
    options += f" --batch 2 --heads 8 --trials 6 --report {report}"
    options += f" --precision {precision}" if precision else ""
    command = [sys.executable, "-m", "numflash_tuner", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry,) = store.read(device_key(0))
    traits = replace(FORWARD.traits, fp8=precision == "fp8")
    assert entry.origin == "measured" and entry.problem == replace(FORWARD, traits=traits)
    assert "predicted against measured" in report.read_text().lower()
    assert "tuned on this device for this class (measured" in _run(environment, precision)


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_class_is_tuned_on_first_use(environment, precision):
    environment["NUMFLASH_AUTOTUNE"] = "8"
    assert "tuned on this device for this class (measured" in _run(environment, precision)


def _run(environment, precision) -> str:
    """What PROGRAM prints with a precision."""
    program = PROGRAM.replace("PRECISION", repr(precision))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
