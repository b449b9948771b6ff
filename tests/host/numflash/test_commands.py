"""Every command ends quietly where nobody reads on, and says in a line what is missing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from numflash.runtime.commands import UNREAD, command
from tests.support.covering import some

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()
)
PYTHON = sys.executable

# A command line, and whether it runs in the simulator.
COMMANDS = {
    "info": ((PYTHON, "-m", "numflash.api.info"), False),
    "info-json": ((PYTHON, "-m", "numflash.api.info", "--json"), False),
    "info-help": ((PYTHON, "-m", "numflash.api.info", "--help"), False),
    "inspect-help": ((PYTHON, "-m", "numflash.api.inspect", "--help"), False),
    "inspect-ptx": (
        (
            PYTHON,
            "-m",
            "numflash.api.inspect",
            "delta",
            "--arch",
            "sm_80",
            "--head-dim",
            "64",
            "--ptx",
        ),
        False,
    ),
    "explain-gpus": ((PYTHON, "-m", "numflash_tuner.explain.cli", "--list-gpus"), False),
    "tune-help": ((PYTHON, "-m", "numflash_tuner", "--help"), False),
    "tune-devices": ((PYTHON, "-m", "numflash_tuner", "--list-devices"), False),
    "tune-shipped": ((PYTHON, "-m", "numflash_tuner", "validate", "--shipped"), False),
    "tune-validate": ((PYTHON, "-m", "numflash_tuner", "validate"), False),
    "tune-clear": ((PYTHON, "-m", "numflash_tuner", "clear"), False),
    "tune-capture": (
        (PYTHON, "-m", "numflash_tuner", "--capture", "{tmp}/classes", "--", PYTHON, "-c", ""),
        False,
    ),
    "bench-help": ((PYTHON, "-m", "bench", "--help"), False),
    "bench-memory": ((PYTHON, "-m", "bench", "forward", "--memory"), False),
    "bench-verify": ((PYTHON, "-m", "bench", "verify"), False),
    "example-kernel": ((PYTHON, "examples/write_a_kernel.py"), True),
}


def environment(tmp_path, simulated: bool) -> dict[str, str]:
    """Of a command, with the checkout importable and a cache of its own."""
    package = tmp_path / "packages"
    package.mkdir(exist_ok=True)
    if not (package / "numflash_tuner").exists():
        (package / "numflash_tuner").symlink_to(ROOT / "tuner")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(package)]),
        "NUMFLASH_CACHE_DIR": str(tmp_path / "cache"),
        "NUMBA_ENABLE_CUDASIM": "1" if simulated else "0",
        "PYTHONUNBUFFERED": "",
    }


def run_unread(line, env, both: bool = False) -> tuple[int, str]:
    """The status of a command whose output nobody reads, and what it says on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            line,
            env=env,
            cwd=ROOT,
            stdout=writer,
            stderr=writer if both else subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("name", some(COMMANDS, every=9))
def test_a_command_that_nobody_reads_ends_quietly(tmp_path, name):
    line, simulated = COMMANDS[name]
    line = [part.format(tmp=tmp_path) if "{tmp}" in part else part for part in line]
    if name == "tune-capture":
        (tmp_path / "classes").write_text("forward float16-d64-dv64-vec full q512 k512 bh8 g1\n")
    status, said = run_unread(line, environment(tmp_path, simulated))
    assert (status, said) == (UNREAD, "")


@pytest.mark.parametrize("name", some(["info", "tune-devices", "bench-memory"], "info"))
def test_stderr_may_be_the_same_pipe(tmp_path, name):
    line, simulated = COMMANDS[name]
    assert run_unread(line, environment(tmp_path, simulated), both=True)[0] == UNREAD


def test_the_status_is_that_of_a_program_that_sigpipe_ended():
    assert UNREAD == 128 + signal.SIGPIPE


def test_a_command_that_is_read_has_its_own_status(tmp_path):
    line, simulated = COMMANDS["tune-devices"]
    done = subprocess.run(
        line, env=environment(tmp_path, simulated), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "NVIDIA H200" in done.stdout


def test_another_pipe_that_breaks_is_not_the_readers_fault():
    @command
    def main():
        raise BrokenPipeError("a child's")

    with pytest.raises(BrokenPipeError, match="a child's"):
        main()


def test_without_any_output_a_command_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command(lambda status: status)(3) == 3


# What is missing


@pytest.mark.parametrize("why", some(["no module", "no driver", "no device"], "no driver"))
@pytest.mark.parametrize(
    "name", some(["real_activations.py", "sentence_search.py"], "real_activations.py")
)
def test_an_example_without_a_gpu_says_so_in_a_line(tmp_path, name, why):
    module = {
        "no module": "raise ModuleNotFoundError(\"No module named 'cupy'\")",
        "no driver": "def count():\n    raise RuntimeError('cudaErrorNoDevice: no CUDA-capable')",
        "no device": "def count():\n    return 0",
    }[why]
    end = "\nfrom types import SimpleNamespace as N\ncuda = N(runtime=N(getDeviceCount=count))\n"
    env = environment(tmp_path, simulated=False)
    (tmp_path / "packages" / "cupy.py").write_text(module + (end if "count" in module else "\n"))
    done = subprocess.run(
        [PYTHON, f"examples/{name}"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "NUMBA_ENABLE_CUDASIM=1" in line and "numflash[cu13]" in line


def test_the_example_of_triton_without_it_says_so_in_a_line(tmp_path):
    env = environment(tmp_path, simulated=True)
    missing = "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n"
    (tmp_path / "packages" / "triton.py").write_text(missing)
    done = subprocess.run(
        [PYTHON, "examples/run_triton_ptx.py"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "pip install triton" in line


def test_information_without_cupy_and_a_gpu_is_given(tmp_path):
    env = environment(tmp_path, simulated=False)
    (tmp_path / "packages" / "cupy.py").write_text("raise ModuleNotFoundError('cupy')\n")
    done = subprocess.run(
        [PYTHON, "-m", "numflash.api.info"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "Missing" in done.stdout


def test_every_command_is_one():
    """Installed commands, modules that `python -m` runs, and each example."""
    mains = [
        "numflash/api/info.py",
        "numflash/api/inspect.py",
        "tuner/cli.py",
        "tuner/shipping.py",
    ]
    mains += ["bench/__main__.py", *(f"examples/{name}" for name in EXAMPLES)]
    for path in mains:
        assert "@command\ndef main(" in (ROOT / path).read_text(), path
