"""What the tests of executed kernels share."""

import numpy as np
import pytest

from numflash.mode import SIMULATED

if not SIMULATED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def executed(monkeypatch):
    """Every launch of numflash runs compiled code; `executed(arch)` says which GPU's.

    Skips where there is no compiler.
    """
    from numflash import launch, ptx_worker
    from numflash.errors import UnsupportedError

    def compiled(*args):
        try:
            return ptx_worker.ptx_of(*args)
        except UnsupportedError as error:
            pytest.skip(f"no compiler: {str(error)[:80]}")

    def choose(arch: str, mutate=None):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        monkeypatch.setenv("NUMFLASH_SIM_CODE", "ptx")
        monkeypatch.setattr(
            launch, "ptx_of", lambda *args: mutate(compiled(*args)) if mutate else compiled(*args)
        )
        launch.limits_of_device.cache_clear()

    yield choose
    launch.limits_of_device.cache_clear()


def normal(shape, dtype, seed=0) -> np.ndarray:
    """An array of normally distributed numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
