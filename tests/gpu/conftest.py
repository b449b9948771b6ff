"""Fixtures of the gpu layer."""

import pytest


@pytest.fixture
def poisoned_pool(monkeypatch):
    """Fill what CuPy allocates for results with NaN, so that what a kernel leaves out shows."""
    from numflash.runtime.arrays import _CuPy

    empty = _CuPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view("u1").fill(0xFF)
        return array

    monkeypatch.setattr(_CuPy, "empty", poisoned)
