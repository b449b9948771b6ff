"""A run of the tuner on sequences and pages: tuned, remembered beside others, found by calls."""

import pytest

from tests.support.covering import thorough

pytest.importorskip("optuna")
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture
from numflash.selection import autotune as switch
from numflash.selection import store, tuned
from tests.host.tuner import test_session
from tests.host.tuner.test_session import DEVICE, DQ, MACHINE, Stopwatch, tune
from tuner import autotune
from tuner.space.target import Target

instant = test_session.instant
TEXTS = (
    "forward bfloat16-d128-dv128-vec-ragged causal q512 k512 bh256 g4",
    "forward bfloat16-d128-dv128-vec-ragged-paged full q1 k8192 bh256 g4 p16",
    "backward-dq bfloat16-d128-dv128-vec-ragged causal q512 k512 bh256 g4",
    "combine bfloat16-d128-dv128-vec-ragged full q1 k8192 bh256 g4",
)


@thorough
def test_what_was_measured_is_remembered_beside_others_and_found():
    tune(Stopwatch(), problems=(DQ,))
    (before,) = store.read(DEVICE)
    results = tune(Stopwatch(), problems=tuple(map(ProblemClass.parse, TEXTS)))
    assert [str(result.problem) for result in results] == list(TEXTS)
    entries = {str(entry.problem): entry for entry in store.read(DEVICE)}
    assert entries.keys() == {str(DQ), *TEXTS} and entries[str(DQ)] == before
    limits = architecture(MACHINE.arch)
    for text in TEXTS:
        found = tuned.find(ProblemClass.parse(text), DEVICE, limits, 512)
        assert found.is_final and found.measured_ms == entries[text].time_ms
        assert str(found.config) == entries[text].config


def test_a_class_in_pages_is_tuned_on_its_first_use(monkeypatch):
    monkeypatch.setattr(autotune, "find_target", lambda *_, **__: Target(DEVICE, MACHINE, 0))
    monkeypatch.setattr(autotune, "DeviceMeasurer", lambda *_, **__: Stopwatch())
    # A busy machine takes more than a second to estimate a space, and then nothing is tried.
    monkeypatch.setattr(switch, "seconds", lambda: 4)
    problem = ProblemClass.parse(TEXTS[1])
    autotune.autotune(problem, 0, 4)
    assert [entry.problem for entry in store.read(DEVICE)] == [problem]
