"""The course as a program: which lessons, in which process, and what is said on the way."""

import pytest

from tests.support.covering import thorough
from tuner.explain import course, simulated
from tuner.explain.course.lesson import Check, Lesson, Slip, Step


@pytest.mark.parametrize(
    "asked, numbers",
    [((), list(range(1, 11))), (["3", "1", 3], [1, 3]), ([10], [10])],
)
def test_numbers(asked, numbers):
    assert course.numbers_of(asked) == numbers


@pytest.mark.parametrize("asked", [["11"], [0], ["-1"], ["two"], ["1", "2.0"], [""]])
def test_an_unknown_lesson_is_refused_with_those_that_there_are(asked):
    with pytest.raises(ValueError, match="there is no lesson") as refusal:
        course.run(asked)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 11 and lines[4].split(maxsplit=1) == ["4", "6 blocks on 4 SMs"]


@thorough
def test_a_process_that_simulates_no_a100_starts_one_that_does(monkeypatch, capfd):
    monkeypatch.setattr(simulated, "simulating", lambda: False)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0")
    [found] = course.run(["8"])
    assert found.number == 8 and all(check.holds for check in found.checks)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("lesson 8: N = 4, d = 2 by hand ... ")


def test_a_lesson_that_fails_is_an_error(monkeypatch):
    def compute(numbers, quiet):
        raise ZeroDivisionError("1 / 0")

    monkeypatch.setattr(course, "compute", compute)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: 1 / 0"):
        course.run([8], quiet=True)


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        course.write(tmp_path / "nowhere" / "course.html", [])


def test_a_failed_check_is_shown(tmp_path):
    checks = Check.close("As it is", [1.0, 2.5], [1.0, 2.0], 0.1), Check.equal("So", [1], [1])
    step = Step("Do", "Take `x`.", "exact")
    found = Lesson(1, "A lesson", "Why?", (step,), (Slip("A", "B"),), checks, ())
    course.write(tmp_path / "page.html", [found])
    text = (tmp_path / "page.html").read_text()
    assert "1 of 2 hold" in text and "✗ fails" in text and "<code>x</code>" in text
    assert "largest difference 0.5, allowed 0.1" in text


def test_a_number_names_its_origin():
    with pytest.raises(ValueError, match="origin must be one of kernel, exact"):
        Step("Do", "It.", "guessed")
