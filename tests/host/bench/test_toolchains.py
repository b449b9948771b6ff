"""`python -m bench toolchains`: what is installed, what is said of kernels, and what fails it."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest

from bench import __main__ as bench
from bench.studies import toolchains
from numflash.configs import Sm90ForwardConfig, Traits
from numflash.machine_code.main_loop import KINDS, SKIPPED, MainLoop

CONFIG = Sm90ForwardConfig.parse("sm90-m128n128w8s2-overlap-persistent")
TRAITS = Traits("bfloat16", 128, 128)
LOOP = MainLoop(
    (8, 8),
    (1, 0),
    64,
    dict.fromkeys(KINDS, 0) | {"exponentials": 64},
    dict.fromkeys(SKIPPED, 0),
    {},
    {},
    (),
)
REPORT = SimpleNamespace(
    registers=168,
    spill_store_bytes=0,
    spill_load_bytes=0,
    warnings=(),
    instructions={"HGMMA": 32},
    faults=(),
    main_loop=LOOP,
)


@pytest.mark.parametrize(
    ("version", "pinned"),
    [
        ("12.8", {"nvidia-cuda-nvcc-cu12==12.8.*", "nvidia-nvjitlink-cu12==12.8.*"}),
        ("13.0", {"nvidia-nvvm==13.0.*", "nvidia-nvjitlink==13.0.*", "cuda-bindings==13.*"}),
        ("13", {"nvidia-nvvm==13.*", "nvidia-nvjitlink==13.*"}),
    ],
)
def test_only_cuda_differs(version, pinned):
    wanted = toolchains.requirements(version)
    assert pinned <= set(wanted)
    assert f"numba-cuda=={metadata.version('numba-cuda')}" in wanted
    assert not any("cu12" in x for x in wanted) or version.startswith("12")


@pytest.mark.parametrize("version", ["11.8", "13.0.88", "newest", ""])
def test_what_is_no_version(version):
    with pytest.raises(ValueError, match="CUDA must look like"):
        toolchains.requirements(version)


def test_a_kernel_as_designed():
    row = toolchains.row(CONFIG, TRAITS, REPORT, replace(LOOP, overlapped_exponentials=0))
    assert "reason" not in row
    assert (row["overlap"], row["without guard"], row["warnings"]) == ("64/64", "0/64", "none")
    assert set(row) == set(toolchains.COLUMNS) - {"toolchain"}


@pytest.mark.parametrize(
    ("loop", "faults", "reason"),
    [
        (replace(LOOP, overlapped_exponentials=63), (), "does not overlap"),
        (replace(LOOP, groups=(1,) * 16), (), "products wait as"),
        (replace(LOOP, groups=(8, 9)), (), "products wait as"),
        (LOOP, ("spill stores: 4",), "spill stores: 4"),
        (None, (), "no main loop"),
    ],
)
def test_a_kernel_that_is_not(loop, faults, reason):
    report = SimpleNamespace(**{**vars(REPORT), "main_loop": loop, "faults": faults})
    assert reason in toolchains.row(CONFIG, TRAITS, report, None)["reason"]


def test_a_kernel_without_overlap():
    config = Sm90ForwardConfig.parse("sm90-m128n128w8s2-persistent")
    report = SimpleNamespace(**{**vars(REPORT), "main_loop": replace(LOOP, waits=(0, 0))})
    row = toolchains.row(config, TRAITS, report, None)
    assert (row["overlap"], row["without guard"]) == ("-", "-") and "reason" not in row


def test_warnings_are_named():
    warnings = ("(C7512) Potential Performance Loss: wgmma.mma_async", "C7504 setmaxnreg ignored")
    report = SimpleNamespace(**{**vars(REPORT), "warnings": warnings})
    assert toolchains.row(CONFIG, TRAITS, report, None)["warnings"] == "C7512, C7504"


@pytest.fixture
def processes(monkeypatch):
    """The commands that are run, in place of running them; kernels are as designed."""
    asked = []

    def answer(command, **options):
        asked.append(([str(part) for part in command], options))
        row = toolchains.row(CONFIG, TRAITS, REPORT, None)
        output = json.dumps(row) if "bench.studies.toolchains" in command else ""
        return SimpleNamespace(returncode=0, stdout=output, stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    return asked


def test_a_toolchain_is_installed_and_compiles(processes, capsys):
    assert bench.main(["toolchains", "13.0", "--head-dim", "128", "64"]) == 0
    output = capsys.readouterr().out
    assert "| 13.0 " in output and "64/64" in output and "designed to be" in output
    (make, _), (install, _), (work, options) = processes
    assert make[:3] == [sys.executable, "-m", "venv"]
    assert install[0] == work[0] != sys.executable
    assert install[1:4] == ["-m", "pip", "install"] and "nvidia-nvvm==13.0.*" in install
    assert work[-3:] == ["bfloat16", "128", "64"]
    # A process of its own that neither simulates nor finds what others have compiled.
    environment = options["env"]
    assert "NUMBA_ENABLE_CUDASIM" not in environment
    assert environment["NUMFLASH_CACHE_DIR"].startswith(work[0].split("/venv/")[0])


def test_a_toolchain_that_cannot_be_installed(monkeypatch, capsys):
    def answer(command, **options):
        code = int("pip" in command)
        return SimpleNamespace(returncode=code, stdout="", stderr="first\nno such version\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert bench.main(["toolchains", "13.9", "12"]) == 1
    output = capsys.readouterr().out
    assert "CUDA 13.9: python pip failed" in output
    assert "no such version" in output and "CUDA 12:" in output


def test_a_version_that_is_none(processes, capsys):
    assert bench.main(["toolchains", "11"]) == 1
    assert "CUDA 11: CUDA must look like" in capsys.readouterr().out
    assert processes == []
