"""The course: what each lesson claims is a case; its page; a wrong kernel fails it."""

from functools import cache

import pytest

from numflash.kernels.portable import forward
from numflash.kernels.shared import combine
from numflash.tiles import sequences
from numflash.tiles.mma import softmax as on_tensor_cores
from numflash.tiles.portable import gradients, softmax
from numflash.tiles.quantize import conversions
from tests.support.covering import thorough
from tests.support.pages import page_faults
from tuner.explain import course
from tuner.explain.course import page

EXP = softmax.exp_f32
# Lesson -> its checks.
CHECKS = {1: 4, 2: 5, 3: 8, 4: 7, 5: 6, 6: 7, 7: 6, 8: 5, 9: 4, 10: 7}


@cache
def lesson(number):
    [found] = course.compute([number], quiet=True)
    return found


@pytest.mark.parametrize("number, check", [(n, i) for n in CHECKS for i in range(CHECKS[n])])
def test_a_claim_holds(number, check):
    found = lesson(number).checks[check]
    assert found.holds, f"{found.claim}: {found.seen}"


@pytest.mark.parametrize("number", CHECKS)
def test_a_lesson_is_complete(number):
    found = lesson(number)
    assert (found.number, len(found.checks)) == (number, CHECKS[number])
    assert found.question.endswith("?") and found.steps and found.slips
    assert found.figures and all(figure.table for figure in found.figures)
    assert page_faults(page.of([found])) == []


@thorough
def test_the_page_of_all_lessons():
    text = page.of([lesson(number) for number in CHECKS])
    assert page_faults(text, most_bytes=300_000) == []
    assert "✗" not in text and text.count("✓") == sum(CHECKS.values())


PRINTED = {1: "[[ 250.  260.", 2: "0.2331 0.6337", 9: "e-08"}


@pytest.mark.parametrize("number", PRINTED)
def test_code_of_a_lesson_runs(number, capsys):
    [code] = [step.code for step in lesson(number).steps if step.code]
    exec(code, {})
    assert PRINTED[number] in capsys.readouterr().out
    assert max(map(len, code.splitlines())) <= 80


@pytest.mark.parametrize(
    "number, module, name, wrong",
    [
        (1, softmax, "exp_f32", lambda x: EXP(x * softmax.f32(1.001))),
        (2, softmax, "exp_f32", lambda x: EXP(x * softmax.f32(1.001))),
        pytest.param(3, on_tensor_cores, "LAG", softmax.f32(0), marks=pytest.mark.thorough),
        (4, forward, "tiles_seen", lambda *_: sequences.Keys(0, 1)),
        (5, combine, "exp_f32", lambda x: x * 0 + 1),
        (8, softmax, "exp_f32", lambda x: EXP(x * softmax.f32(1.001))),
        (9, gradients, "exp_f32", lambda x: EXP(x) * softmax.f32(1.001)),
        pytest.param(10, conversions, "min_f32", lambda x, _: x * 0, marks=pytest.mark.thorough),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, number, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    [found] = course.compute([number], quiet=True)
    assert not all(check.holds for check in found.checks)
    assert "✗ fails" in page.of([found])
