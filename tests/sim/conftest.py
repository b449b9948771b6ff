"""Fixtures of the tests of the simulator."""

import pytest


@pytest.fixture(params=range(5), ids=lambda seed: f"seed{seed}")
def each_seed(request, monkeypatch):
    """Runs the test once for each of several thread orders."""
    from numflash.simulator import SEED

    monkeypatch.setattr(SEED, "value", request.param)
    return request.param
