"""Fixtures of the tests of executed kernels."""

import numpy as np
import pytest

from numflash.runtime.mode import SIMULATED

if not SIMULATED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def executed(monkeypatch):
    """`executed(arch)`: from here on launches of numflash run code compiled for this GPU.

    `mutate` changes the PTX before it runs, and `code` is NUMFLASH_SIM_CODE. Skips where there is
    no compiler.
    """
    from numflash.calls import launch, ready
    from numflash.machine_code import ptx_worker
    from numflash.runtime import driver
    from numflash.runtime.errors import UnsupportedError

    def choose(arch: str, mutate=None, code: str = "ptx"):
        def compiled(*args):
            try:
                ptx = ptx_worker.ptx_of(*args)
            except UnsupportedError as error:
                pytest.skip(f"no compiler: {str(error)[:80]}")
            return mutate(ptx) if mutate else ptx

        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        monkeypatch.setenv("NUMFLASH_SIM_CODE", code)
        monkeypatch.setattr(launch, "ptx_of", compiled)
        forget()

    def forget():
        driver.limits_of_device.cache_clear()
        # Calls like earlier ones are launched as they were prepared then.
        ready._ready.clear()

    yield choose
    monkeypatch.undo()
    forget()


def normal(shape, dtype, seed=0) -> np.ndarray:
    """An array of normally distributed numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
