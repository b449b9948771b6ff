"""Programs that note the problem classes that they run, and what becomes of the notes."""

import subprocess
import sys

import pytest

from tests.support.covering import thorough

pytest.importorskip("optuna")
from numflash.selection import store
from numflash.selection.entries import DeviceKey
from tests.support.tuning_entries import CLASS, OFFLINE


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--capture", "noted"), "--capture FILE goes with a program"),
        (("--", sys.executable, "-c", "1"), "--capture FILE goes with a program"),
        (("--capture", "noted", "--"), "--capture FILE goes with a program"),
        (("--capture", "noted", "--", "no-such-program"), "cannot run no-such-program: "),
    ],
)
def test_a_capture_needs_a_file_and_a_program(refused, tmp_path, argv, words):
    assert words in refused(*argv)
    assert not (tmp_path / "noted").exists()


PROGRAM = """
import sys, numpy as np
from numflash import attention, attention_backward
q = np.zeros((1, 5, 2, 16), np.float16)
out, lse = attention(q, q, q, causal=True, return_lse=True)
attention_backward(out, q, q, q, out, lse, causal=True)
sys.exit(7)
"""


@thorough
def test_a_program_notes_its_classes_and_these_are_tuned(run, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    status, out, err = run("--capture", "noted", "--", sys.executable, "-c", PROGRAM)
    assert (status, err) == (7, "")
    noted = (tmp_path / "noted").read_text().splitlines()
    assert out == f"{len(noted)} classes of problems are in noted\n"
    forward = "forward float16-d32-dv32-vec causal q8 k8 bh2 g1"
    assert forward in noted
    command = (*OFFLINE, "--from-capture", "noted", "--trials", 1, "--quiet")
    status, out, _ = run(*command, "--pass", "forward")
    tuned = {str(found.problem) for found in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert status == 0 and forward in tuned
    assert {text.split()[0] for text in tuned} <= {"forward", "combine"}
    run(*command)
    tuned = {str(found.problem) for found in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert {text.split()[0] for text in tuned} >= {"backward-dq", "backward-dkdv"}
    assert tuned <= set(noted)


FP8_CLASS = CLASS.replace("float32", "float16").replace("-vec", "-vec-fp8")


def test_offline_classes_on_8_bit_floats_of_a_capture_are_predicted_too(run, tmp_path):
    (tmp_path / "noted").write_text(f"{FP8_CLASS}\n{CLASS}\n")
    status, out, err = run(*OFFLINE, "--from-capture", "noted", "--trials", 1, "--quiet")
    assert (status, err) == (0, "")
    assert CLASS in out and FP8_CLASS in out
    found = {str(each.problem): each for each in store.read(DeviceKey("sm_80", "sm_80", 0))}
    assert found[FP8_CLASS].config.startswith("fp8-sm80-")
    assert found[FP8_CLASS].origin == "predicted"


@pytest.mark.parametrize(
    ("program", "status"),
    [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_a_program_without_attention_keeps_its_status(run, program, status):
    found, out, err = run("--capture", "noted", "--", sys.executable, "-c", program)
    assert (found, out) == (status, "")
    assert err == f"{sys.executable} ran no attention: noted was not written\n"


def test_what_a_capture_is_not_written_to(run, tmp_path):
    (tmp_path / "noted").write_text("a letter\n")
    status, out, err = run("--capture", "noted", "--", sys.executable, "-c", "")
    assert (status, out) == (0, "")
    assert err.startswith("numflash-tune: noted is no capture: noted, line 1: ")
    status, out, err = run("--capture", ".", "--", sys.executable, "-c", "")
    assert (status, out) == (0, "") and "[Errno 21]" in err


def test_ctrl_c_ends_a_program_that_notes(run, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stop)
    assert run("--capture", "noted", "--", "true") == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "'noted'"),
        (b"", "noted holds no class of forward"),
        (b"backward-dq float16-d64-dv64-vec full q64 k64 bh1 g1\n", "no class of forward"),
        (f"{CLASS}\nforward float17 full\n".encode(), "noted, line 2: a problem class must look"),
        (bytes(range(128, 256)), "noted is no capture"),
    ],
)
def test_a_capture_that_is_of_no_use_is_named(refused, tmp_path, content, words):
    if content is not None:
        (tmp_path / "noted").write_bytes(content)
    assert words in refused(*OFFLINE, "--pass", "forward", "--from-capture", "noted")
