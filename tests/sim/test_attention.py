"""Forward and all three gradients of the portable kernels, against float64, in the simulator."""

import numpy as np
import pytest

import numflash
from numflash import api
from numflash.arrays import _NumPy
from numflash.configs import FAMILIES
from tests.attention_cases import SIM_CASES, SMALL_CONFIGS


@pytest.fixture
def small_configs(monkeypatch):
    """Make every kernel use its small config, so that small problems have several tiles."""
    configs = {family: FAMILIES[family].parse(text) for family, text in SMALL_CONFIGS.items()}
    monkeypatch.setattr(api, "default_config", lambda family, *_: configs[family])
    monkeypatch.setattr(api, "_ready", {})


@pytest.fixture
def poisoned_results(monkeypatch):
    """Fill what the library allocates with NaN, so that what a kernel leaves out shows."""
    empty = _NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.fill(np.nan)
        return array

    monkeypatch.setattr(_NumPy, "empty", poisoned)


@pytest.mark.parametrize("case", SIM_CASES, ids=str)
def test_errors_are_within_budget(case, small_configs, poisoned_results):
    arrays = case.arrays()
    report = numflash.check(**arrays, **case.call_options())
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("head_dim", [64, 256])
def test_default_configs_are_within_budget(head_dim, poisoned_results):
    rng = np.random.default_rng(head_dim)
    q, k, v, dout = (rng.standard_normal((1, 18, 1, head_dim)).astype(np.float16) for _ in "qkvd")
    report = numflash.check(q, k, v, dout=dout, causal=True)
    assert report.passed, f"\n{report}"


def test_a_wrong_result_is_not_within_budget():
    q = np.random.default_rng(0).standard_normal((1, 9, 1, 32)).astype(np.float32)
    exact, _ = numflash.reference.attention(q, q, q)
    right = numflash.check(q, q, q).errors[0]
    assert right.passed
    from numflash.check import measure

    naive, _ = numflash.reference.naive(q, q, q, precision="float32")
    wrong = exact.copy()
    wrong[0, 3, 0, 5] += 20 * right.budget
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
    wrong[0, 3, 0, 5] = np.nan
    assert not measure("out", wrong, exact, naive, 2.0**-24).passed
