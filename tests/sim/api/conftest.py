"""Small tiles, poisoned results, and the dtypes and numbers of these calls."""

import numpy as np
import pytest

from numflash.calls import ready
from numflash.configs.formats import NAN_CODE
from numflash.runtime.numpy_arrays import NumPy
from numflash.selection import choice as selection
from numflash.selection import rules as dispatch
from tests.support.api_calls import choose_small
from tests.support.covering import some


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_results(monkeypatch):
    """Small tiles; and NaN wherever a kernel leaves a result out."""
    for module in (dispatch, selection):
        monkeypatch.setattr(module, "choose", choose_small)
    monkeypatch.setattr(ready, "_ready", {})
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.fill({"uint8": NAN_CODE, "int32": -7}.get(dtype, np.nan))
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)


KERNELS = {np.float32: "portable", np.float16: "tensor-cores"}


@pytest.fixture(params=some(KERNELS, np.float16), ids=KERNELS.get)
def dtype(request):
    """The dtype that each implementation's kernels get here."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)
