"""The six test layers, chosen by folder: host, sim, executed, frontends, compile, gpu.

The simulator is chosen when Numba is imported, so one process runs either `host`, `sim`,
`executed` and `frontends` (NUMBA_ENABLE_CUDASIM=1) or `compile` and `gpu`. `make test` runs both.
"""

import gc
import os
import zlib
from functools import cache
from pathlib import Path

import pytest

from numflash.runtime.mode import SIMULATED
from tests.support.covering import ALL, FULL, each_choice, thinned

# The choice of kernels must not depend on this user's tuning; tests of that turn it on.
os.environ["NUMFLASH_TUNED"] = "0"

_HERE = Path(__file__).parent
# Machine code and PTX that tests compile, kept between runs and shared by the workers of one. A
# file is named by all that decides what it holds (kernel sources, config, compilers): one that an
# edit makes stale is never found again. Tests of the cache itself have folders of their own.
_COMPILED = _HERE.parent / "build" / "test-cache" / "cubins"
_MOST_COMPILED_BYTES = 2**30
_LAYERS = ("host", "sim", "executed", "frontends", "compile", "gpu")


def pytest_configure(config):
    """Register a marker for each layer, so that `-m sim` selects it."""
    for layer in _LAYERS:
        config.addinivalue_line("markers", f"{layer}: tests of the {layer} layer")
    config.addinivalue_line("markers", "thorough: tests that run with NUMFLASH_TEST_ALL=1")
    config.addinivalue_line("markers", "whole: tests whose table is not thinned")
    _COMPILED.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not hasattr(config, "workerinput"):  # once, not in every worker
        drop_oldest(_COMPILED, _MOST_COMPILED_BYTES)


def pytest_collection(session):
    """Look for no garbage while tests are collected: they stay, and would be looked at again."""
    gc.disable()


def pytest_collection_finish(session):
    """Collect garbage from here on, but never look at what was made above."""
    gc.freeze()
    gc.enable()


def drop_oldest(folder: Path, most_bytes: int) -> None:
    """Delete a folder's files that were written first, down to half of so many bytes."""
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir())
    size = sum(n_bytes for _, n_bytes, _ in files)
    if size <= most_bytes:
        return
    for _, n_bytes, path in files:
        if size <= most_bytes // 2:
            break
        path.unlink(missing_ok=True)  # another run may drop it, too
        size -= n_bytes


def pytest_collection_modifyitems(config, items):
    """Mark each test with its layer; skip what this process cannot run, saying why.

    Thorough tests are left out, of crossed axes all but each choice, and of long tables most rows,
    except where all run and on a GPU, where the bench chooses.
    """
    if not ALL:
        kept = [item for item in items if not item.get_closest_marker("thorough")]
        some = set(thinned(each_choice(item for item in kept if _layer(item) != "gpu")))
        kept = [item for item in kept if item in some or _layer(item) == "gpu"]
        left_out = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = kept
    elif not FULL:
        # CI's time is limited: of the longest tables of the simulator a part.
        some = set(thinned((item for item in items if _layer(item) == "sim"), 20, None))
        left_out = {item for item in items if _layer(item) == "sim"} - some
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    missing = {
        "sim": None if SIMULATED else "needs NUMBA_ENABLE_CUDASIM=1",
        "executed": None if SIMULATED else "needs NUMBA_ENABLE_CUDASIM=1",
        "frontends": None if SIMULATED else "needs NUMBA_ENABLE_CUDASIM=1",
        "compile": "needs NUMBA_ENABLE_CUDASIM unset" if SIMULATED else None,
        "gpu": "needs NUMBA_ENABLE_CUDASIM unset" if SIMULATED else _no_gpu(),
    }
    for item in items:
        layer = _layer(item)
        if layer not in _LAYERS:
            continue
        item.add_marker(getattr(pytest.mark, layer))
        if reason := missing.get(layer):
            item.add_marker(pytest.mark.skip(reason=reason))


def _layer(item) -> str:
    """The folder of a test."""
    return _layer_of(item.path)


@cache
def _layer_of(path: Path) -> str:
    return path.relative_to(_HERE).parts[0]


def _no_gpu() -> str | None:
    """Why there is no GPU to test on; None if there is one."""
    from numflash.runtime.driver import limits_of_device
    from numflash.runtime.errors import UnsupportedError

    try:
        limits_of_device(0)
    except (UnsupportedError, RuntimeError) as error:
        return f"no GPU: {str(error).splitlines()[0][:80]}"
    return None


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """Keep tests out of the user's cache; only what is compiled outlives a run."""
    if "NUMFLASH_CACHE_DIR" not in os.environ:
        folder = tmp_path_factory.getbasetemp() / "cache"
        share_compiled(folder)
        monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(folder))


def share_compiled(cache: Path) -> None:
    """Let a cache of a test, made if absent, hold what all tests have compiled."""
    cache.mkdir(mode=0o700, exist_ok=True)
    if not (cache / "cubins").is_symlink():
        (cache / "cubins").symlink_to(_COMPILED, target_is_directory=True)


@pytest.fixture(autouse=True)
def simulator_seed(request):
    """Give each test its own thread order, the same in every run unless the seed is set."""
    if not SIMULATED:
        yield None
        return
    from numflash.simulator import SEED

    before = SEED.value
    if "NUMFLASH_SIM_SEED" not in os.environ:
        SEED.value = zlib.crc32(request.node.nodeid.encode())
    yield SEED.value
    SEED.value = before


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Print the simulator's seed with a failure: it repeats the thread order."""
    outcome = yield
    report = outcome.get_result()
    if SIMULATED and report.failed and "simulator_seed" in item.funcargs:
        seed = item.funcargs["simulator_seed"]
        report.sections.append(("simulator", f"repeat with NUMFLASH_SIM_SEED={seed}"))
