"""The caches of a process that has just begun, and a cubin."""

import pytest

from numflash.machine_code import compiler
from tests.support.compilations import CONFIG, LIMITS, TRAITS


@pytest.fixture
def cache_directory(tmp_path, monkeypatch):
    """An empty disk cache, and an empty one in memory."""
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    return tmp_path / "cubins"


@pytest.fixture(scope="session")
def good():
    """The cubin that this folder compiles, and recompiles, all the time."""
    return compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
