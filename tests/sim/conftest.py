"""Fixtures of the tests of the simulator."""

import numpy as np
import pytest

from numflash.calls import ready
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from tests.support.small_kernels import prefer_small_kernels


@pytest.fixture(params=range(5), ids=lambda seed: f"seed{seed}")
def each_seed(request, monkeypatch):
    """Runs the test once for each of several thread orders."""
    from numflash.simulator import SEED

    monkeypatch.setattr(SEED, "value", request.param)
    return request.param


@pytest.fixture
def on(monkeypatch):
    """A function that chooses the simulated GPU. Results hold NaN before they are written."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    def be(arch):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        limits_of_device.cache_clear()

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})
    yield be
    limits_of_device.cache_clear()


@pytest.fixture(autouse=True)
def small_kernels(request, monkeypatch):
    """Where a test asks for no config small ones run, unless it takes `shipped_kernels`."""
    if "shipped_kernels" not in request.fixturenames:
        prefer_small_kernels(monkeypatch)


@pytest.fixture
def shipped_kernels():
    """For tests of what runs by itself: the kernels that are shipped."""
