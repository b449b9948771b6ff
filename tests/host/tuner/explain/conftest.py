"""Pages of tests compile nothing, and start no process that simulates."""

import numpy as np
import pytest

import numflash
from numflash.api.explain import Question
from tuner.explain.asked import ask
from tuner.explain.facts import numerics
from tuner.explain.simulated import NotSimulatedError


@pytest.fixture(autouse=True)
def not_simulated(request, monkeypatch):
    """Slices are not run, but for tests that take `simulated`."""

    def refuse(*_, **__):
        raise NotSimulatedError("tests start no process")

    if "simulated" not in request.fixturenames:
        monkeypatch.setattr(numerics, "simulate", refuse)


@pytest.fixture
def simulated():
    """For tests that run slices in the simulator."""


@pytest.fixture
def asked():
    """Asks about arrays on a GPU that is not here: by shapes of q, k and v, or with arrays."""

    def asked(gpu, q, k=None, v=None, *, dtype="float16", data=False, **options):
        k, v = q if k is None else k, (q if k is None else k) if v is None else v
        arrays = {
            name: np.zeros(x, dtype) if isinstance(x, tuple) else x
            for name, x in zip("qkv", (q, k, v), strict=True)
        }
        answer = numflash.explain(*arrays.values(), gpu=gpu, **options)
        return ask(Question(arrays, options, gpu, data, None, answer), "none")

    return asked
