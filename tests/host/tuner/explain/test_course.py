"""The course as a program: which lessons, in which process, and what is said on the way."""

import pytest

from tuner.explain import course
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


def test_a_process_that_does_not_simulate_starts_one_that_does(monkeypatch, capfd):
    monkeypatch.setattr(course, "simulating", lambda: False)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0")
    [found] = course.run(["8"])
    assert found.number == 8 and all(check.holds for check in found.checks)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("lesson 8: N = 4, d = 2 by hand ... ")


def test_another_simulated_gpu_is_not_taken(monkeypatch):
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_75")
    monkeypatch.setattr(course, "compute", lambda *_: pytest.fail("computed here"))
    monkeypatch.setattr(course, "_elsewhere", lambda numbers, quiet: numbers)
    assert course.run([2], quiet=True) == [2]


def test_a_process_that_fails_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(course, "simulating", lambda: False)
    monkeypatch.setattr(course, "_SIMULATOR", {"NUMBA_ENABLE_CUDASIM": "0"})
    with pytest.raises(RuntimeError, match="in the simulator ended with 1"):
        course.run([8], quiet=True)
    assert "overrules" in capfd.readouterr().err


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
