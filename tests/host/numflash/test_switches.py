"""Variables of the environment: how switches are spelled, and whose errors name them."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from numflash.calls import launch
from numflash.problem.classes import ProblemClass
from numflash.runtime import driver, switches
from numflash.runtime.mode import SIMULATED
from numflash.selection import autotune, capture, tuned
from tests.support.covering import ALL, FULL, some, thorough

ROOT = Path(__file__).parents[3]
OFF = ["0", "00", " 0 ", "-0", "False", "false", "off", "OFF", "no"]
ON = ["1", "01", "2", "-1", " 1\n", "True", "on", "yes"]

# numflash decides first: it may not know Numba yet.
ASK = """
import json, sys
from numflash.runtime.mode import SIMULATED
import numflash
from numba import cuda
print(json.dumps([SIMULATED, numflash.simulating(), "numba.cuda.simulator_init" in sys.modules]))
"""


def answers(tmp_path, before: str = "", **environment) -> list[bool]:
    """Whether a new process simulates, to numflash, to its public function and to Numba."""
    inherited = {n: v for n, v in os.environ.items() if n != "NUMBA_ENABLE_CUDASIM"}
    done = subprocess.run(
        [sys.executable, "-c", before + ASK],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# To Numba only integers are on.
SIMULATES = {"00": False, " 1 ": True, "true": False, "": False}
SIMULATES |= {"False": False, "off": False, "0": False, "01": True} if FULL else {}


@pytest.mark.parametrize(("text", "simulates"), some(SIMULATES.items(), ("true", False)))
def test_the_simulator_is_on_where_it_is_on_to_numba(tmp_path, text, simulates):
    assert answers(tmp_path, NUMBA_ENABLE_CUDASIM=text) == [simulates] * 3


SET = "import numba; numba.config.ENABLE_CUDASIM = 1\n"


@thorough
@pytest.mark.parametrize(
    "before, simulates",
    [
        (SET, True),
        # Numba has decided when `cuda` was imported.
        ("from numba import cuda\n" + SET, False),
        (SET + "from numba import cuda; numba.config.ENABLE_CUDASIM = 0\n", True),
    ],
    ids=["set", "set-too-late", "unset-too-late"],
)
def test_numbas_config_counts_as_it_does_to_numba(tmp_path, before, simulates):
    assert answers(tmp_path, before) == [simulates] * 3


@thorough
def test_numbas_file_counts_as_it_does_to_numba(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / ".numba_config.yaml").write_text("enable_cudasim: 1\n")
    assert answers(tmp_path) == [True] * 3
    assert not ALL or answers(tmp_path, NUMBA_ENABLE_CUDASIM="0") == [False] * 3


def test_what_the_environment_says_later_changes_nothing(monkeypatch):
    import numflash

    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0" if SIMULATED else "1")
    assert numflash.simulating() is SIMULATED


@pytest.mark.parametrize("text", OFF + ON)
def test_switches_take_the_same_spellings(monkeypatch, text):
    for default in (False, True):
        monkeypatch.setenv("NUMFLASH_TUNED", text)
        assert switches.is_on("NUMFLASH_TUNED", default) is (text in ON)
    assert tuned.enabled() is (text in ON)


@pytest.mark.parametrize("text", [None, "", " "])
def test_a_switch_that_is_not_set_is_what_it_is_by_default(monkeypatch, text):
    monkeypatch.delenv("NUMFLASH_TUNED", raising=False)
    if text is not None:
        monkeypatch.setenv("NUMFLASH_TUNED", text)
    assert tuned.enabled() is True
    assert switches.is_on("NUMFLASH_TUNED") is False


@pytest.mark.parametrize(
    "text, seconds",
    [
        *((text, 0) for text in ("00", "False", "off", "", "0.0")),
        *((text, 20) for text in ("1", "01", "True", "on")),
        ("7.5", 7.5),
        ("60", 60),
    ],
)
def test_autotune_is_a_switch_or_seconds(monkeypatch, caplog, text, seconds):
    monkeypatch.setattr(autotune, "SIMULATED", False)
    monkeypatch.setenv("NUMFLASH_AUTOTUNE", text)
    assert autotune.seconds() == seconds
    assert caplog.text == ""


CHOICES = "exact", "ampere", "hopper"


@pytest.mark.parametrize(
    "text, chosen",
    [
        (None, "exact"),
        ("", "exact"),
        (" ", "exact"),
        ("hopper", "hopper"),
        (" Ampere\n", "ampere"),
    ],
)
def test_a_choice_is_what_it_names_or_the_default(monkeypatch, text, chosen):
    monkeypatch.delenv("NUMFLASH_SIM_SUMS", raising=False)
    if text is not None:
        monkeypatch.setenv("NUMFLASH_SIM_SUMS", text)
    assert switches.choice("NUMFLASH_SIM_SUMS", CHOICES) == chosen


# Errors


@thorough
def test_a_wrong_choice_is_named_before_anything_runs():
    words = "NUMFLASH_SIM_SUMS must be exact, ampere, ada or hopper, got 'h100'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import numflash.ptx"],
        env={**environment, "NUMFLASH_SIM_SUMS": "h100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["hopper,ampere", "1", "exac"])
def test_a_wrong_choice_is_named(monkeypatch, text):
    monkeypatch.setenv("NUMFLASH_SIM_SUMS", text)
    words = f"NUMFLASH_SIM_SUMS must be exact, ampere or hopper, got '{text}'"
    with pytest.raises(ValueError, match=re.escape(words)):
        switches.choice("NUMFLASH_SIM_SUMS", CHOICES)


def test_a_wrong_switch_is_named(monkeypatch):
    monkeypatch.setenv("NUMFLASH_TUNED", "maybe")
    with pytest.raises(ValueError, match=r"NUMFLASH_TUNED must be 0 or 1.*got 'maybe'"):
        tuned.enabled()


def test_a_wrong_budget_is_named(monkeypatch, caplog):
    monkeypatch.setattr(autotune, "SIMULATED", False)
    monkeypatch.setattr(autotune, "_warnings", set())
    monkeypatch.setenv("NUMFLASH_AUTOTUNE", "soon")
    with caplog.at_level(logging.WARNING, "numflash"):
        assert autotune.seconds() == 0
    assert "NUMFLASH_AUTOTUNE" in caplog.text and "'soon'" in caplog.text


def test_a_file_that_cannot_be_written_is_named_with_its_variable(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(tmp_path))
    problem = ProblemClass.parse("forward float16-d64-dv64-vec causal q512 k512 bh8 g1")
    with caplog.at_level(logging.WARNING, "numflash"):
        capture.note(problem)
    assert "NUMFLASH_CAPTURE" in caplog.text and str(tmp_path) in caplog.text


def test_a_wrong_architecture_of_the_simulator_is_named(monkeypatch):
    monkeypatch.setattr(launch, "SIMULATED", True)
    ask = driver.limits_of_device.__wrapped__
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_12")
    with pytest.raises(ValueError, match=r"NUMFLASH_SIM_ARCH.*sm_75.*got 'sm_12'"):
        ask(0)
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "")
    assert ask(0).arch == "sm_80"


def test_a_wrong_seed_of_the_simulator_is_named(monkeypatch):
    from numflash.simulator import seed

    monkeypatch.setenv("NUMFLASH_SIM_SEED", "dice")
    with pytest.raises(ValueError, match="NUMFLASH_SIM_SEED must be an integer, got 'dice'"):
        seed._Seed()


def test_a_choice_is_one_of_its_words(monkeypatch):
    words = "python", "ptx", "lto"
    for text, chosen in [("", "python"), (" PTX ", "ptx"), ("python", "python")]:
        monkeypatch.setenv("NUMFLASH_SIM_CODE", text)
        assert switches.choice("NUMFLASH_SIM_CODE", words) == chosen
    monkeypatch.delenv("NUMFLASH_SIM_CODE")
    assert switches.choice("NUMFLASH_SIM_CODE", words) == "python"
    monkeypatch.setenv("NUMFLASH_SIM_CODE", "1")
    with pytest.raises(ValueError, match="NUMFLASH_SIM_CODE must be python, ptx or lto, got '1'"):
        switches.choice("NUMFLASH_SIM_CODE", words)


@pytest.mark.parametrize("text, number", [(None, None), ("", None), (" 3\n", 3), ("1", 1)])
def test_a_number_is_what_it_says_or_nothing(monkeypatch, text, number):
    monkeypatch.delenv("NUMFLASH_SIM_BLOCKS", raising=False)
    if text is not None:
        monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", text)
    assert switches.whole_number("NUMFLASH_SIM_BLOCKS", 1) == number


@pytest.mark.parametrize("text", ["0", "-2", "many", "1.5"])
def test_a_wrong_number_is_named(monkeypatch, text):
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", text)
    words = f"NUMFLASH_SIM_BLOCKS must be an integer from 1 on, got '{text}'"
    with pytest.raises(ValueError, match=re.escape(words)):
        switches.whole_number("NUMFLASH_SIM_BLOCKS", 1)
