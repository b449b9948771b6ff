"""Bias, masks and functions on every kernel, forward and gradients, against float64."""

import numpy as np
import pytest

import numflash
from tests.support.function_cases import PLACES, some_cases


@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_a_program_is_within_budget(on, case):
    on(PLACES[case.place].arch)
    rng = np.random.default_rng(sum(str(case).encode()))
    arrays = case.arrays(rng)
    report = numflash.check(**arrays, **case.options(rng))
    found = [error.name for error in report.errors]
    gradients = ["dq", "dk", "dv", *(["dsinks"] if case.feature == "sinks" else [])]
    assert found == ["out", "lse", *(gradients if "dout" in arrays else [])]
    assert report.passed, f"\n{report}"
