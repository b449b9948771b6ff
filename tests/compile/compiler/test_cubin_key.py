"""The key of a cubin depends on all that decides its machine code, and on nothing else."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from numflash.configs import DeltaConfig
from numflash.machine_code import compiler
from numflash.runtime.devices import ARCHITECTURES
from tests.support.compilations import (
    CHILD,
    CONFIG,
    LIMITS,
    TRAITS,
    finish,
    instructions,
    key_of,
    missing,
    start,
)
from tests.support.covering import some, thorough


def test_what_the_key_depends_on():
    keys = [
        key_of(CONFIG, TRAITS, LIMITS),
        key_of(DeltaConfig(4), TRAITS, LIMITS),
        key_of(CONFIG, replace(TRAITS, dtype="bfloat16"), LIMITS),
        key_of(CONFIG, replace(TRAITS, head_dim=96), LIMITS),
        key_of(CONFIG, replace(TRAITS, head_dim_v=96), LIMITS),
        key_of(CONFIG, replace(TRAITS, features=("softcap",)), LIMITS),
        key_of(CONFIG, replace(TRAITS, features=("alibi",)), LIMITS),
        key_of(CONFIG, replace(TRAITS, vectorized=False), LIMITS),
        key_of(CONFIG, TRAITS, ARCHITECTURES["sm_86"]),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(CONFIG, TRAITS, LIMITS) == keys[0]


def test_the_key_depends_on_the_compilers(monkeypatch):
    before = key_of(CONFIG, TRAITS, LIMITS)
    real = compiler._version
    monkeypatch.setattr(compiler, "_version", lambda n: "99" if n == "numba-cuda" else real(n))
    compiler._toolchain.cache_clear()
    assert key_of(CONFIG, TRAITS, LIMITS) != before
    compiler._toolchain.cache_clear()


def test_the_key_depends_on_what_no_argument_decides(monkeypatch):
    def key():
        compiler._toolchain.cache_clear()
        return key_of(CONFIG, TRAITS, LIMITS)

    real, before = compiler._version, key()
    # Numba compiles bytecode, and cuda-bindings choose between linkers that are both installed.
    monkeypatch.setattr(sys, "version_info", (4, 0))
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "_version", lambda n: "9" if n == "cuda-bindings" else real(n))
    assert key() != before
    # A toolkit that pip has not installed is asked.
    monkeypatch.setattr(compiler, "_version", lambda n: None)
    keys = []
    for version in ((13, 0), (13, 5)):
        monkeypatch.setattr("cuda.bindings.nvjitlink.version", lambda v=version: v)
        keys.append(key())
    missing(monkeypatch, "cuda.bindings.nvjitlink")
    monkeypatch.delattr("cuda.bindings.nvjitlink")
    keys.append(key())
    assert len(set(keys)) == 3
    monkeypatch.undo()
    assert key() == before


def numbas_switches():
    """All switches that Numba reads from the environment, on."""
    import numba.cuda

    folders = Path(numba.__file__).parent / "core", Path(numba.cuda.__file__).parent
    files = [file for folder in folders for file in folder.rglob("*.py")]
    switch = re.compile(r'_readenv\(\s*"(NUMBA_\w+)",\s*(?:int|bool)\b')
    names = {name for file in files for name in switch.findall(file.read_text())}
    assert "NUMBA_CUDA_DEBUGINFO" in names and "NUMBA_CUDA_ENABLE_NRT" in names
    # Where the simulator is meant, and what breaks Numba's own printing.
    return dict.fromkeys(
        names - {"NUMBA_ENABLE_CUDASIM", "NUMBA_HIGHLIGHT_DUMPS", "NUMBA_TRACE"}, "1"
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The output of a process whose environment says nothing of Numba."""
    return finish(start(CHILD, tmp_path_factory.mktemp("plain")))


ENVIRONMENTS = {
    "debug information": {"NUMBA_CUDA_DEBUGINFO": "1"},
    "unoptimised": {"NUMBA_OPT": "0"},
    "another GPU": {"NUMBA_FORCE_CUDA_CC": "9.0a"},
    "all switches": numbas_switches(),
}


@thorough
@pytest.mark.parametrize("name", some(ENVIRONMENTS, "all switches"))
def test_numbas_environment_does_not_change_the_machine_code(name, plain, tmp_path):
    assert finish(start(CHILD, tmp_path, **ENVIRONMENTS[name]))["code"] == plain["code"]


def test_numbas_settings_do_not_change_the_machine_code(good, monkeypatch):
    import numba

    for name, value in (("CUDA_DEBUGINFO_DEFAULT", 1), ("FORCE_CUDA_CC", (9, 0, "a"))):
        monkeypatch.setattr(numba.config, name, value)
    # Numba has its settings from the environment again, as soon as that has changed.
    monkeypatch.setenv("NUMBA_DEBUG_JIT", "1")
    cubin = compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    without_names = [
        [line.partition("`")[0] for line in instructions(each)] for each in (cubin, good)
    ]
    assert without_names[0] == without_names[1]
    assert numba.config.DEBUG_JIT == 1
    monkeypatch.delenv("NUMBA_DEBUG_JIT")
    numba.config.reload_config()
