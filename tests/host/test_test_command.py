"""`make test` runs every layer, and of the host path what needs the simulator to be off, too."""

import gc
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def processes():
    """What each of the two processes of `make test` runs: with the simulator, and without."""
    command = re.search(r"^test:.*?(?=^\w)", (ROOT / "Makefile").read_text(), re.M | re.S)[0]
    runs = re.split(r"-m pytest", command)[1:]
    assert ["NUMBA_ENABLE_CUDASIM=1" in x for x in command.split("-m pytest")[:2]] == [True, False]
    return [
        {path for word in re.findall(r"tests/\S+", run) for path in ROOT.glob(word)}
        for run in runs
    ]


def test_every_layer_is_run_by_one_of_the_processes():
    simulated, without = processes()
    folders = {path for path in (ROOT / "tests").iterdir() if any(path.glob("**/test_*.py"))}
    assert {path.name for path in folders - simulated} == {"compile", "gpu"}
    assert folders - simulated <= without
    assert ROOT / "tests/frontends" in simulated


def test_host_tests_that_need_the_simulator_off_are_run_without_it():
    _, run = processes()
    assert len(run) > 3
    files = (ROOT / "tests/host").rglob("test_*.py")
    off = [
        x
        for x in files
        if re.search(r"skipif\(SIMULATED|^@?(on_the|needs)_gpu", x.read_text(), re.M)
    ]
    assert len(off) > 3
    assert [x for x in off if not run & {x, *x.parents}] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["first", "second", "neither"])
def test_both_processes_run_and_either_fails_the_command(tmp_path, fails):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nn=first; [ "$NUMBA_ENABLE_CUDASIM" ] || n=second\n'
        f'echo "ran $n"; [ $n != {fails} ]\n'
    )
    python.chmod(0o700)
    (tmp_path / "ruff").symlink_to("/bin/true")
    done = subprocess.run(
        ["make", "-s", "-o", ".venv/test.done", "test", f"BIN={tmp_path}"],
        env={k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split("\n")[:2] == ["ran first", "ran second"], done
    assert (done.returncode == 0) == (fails == "neither")


def test_garbage_is_collected_but_not_looked_for_among_what_pytest_collected():
    assert gc.isenabled() and gc.get_freeze_count() > 10_000


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_processes_keep_their_bytecode_where_the_environment_forbids_it():
    show = "--eval=show:; @echo [$$PYTHONDONTWRITEBYTECODE]"
    done = subprocess.run(
        ["make", "-s", show, "show"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]", done.stderr
