"""Sequences with lengths of their own: results and gradients of each against float64, alone."""

import numpy as np
import pytest

import numflash
from tests.support.covering import some
from tests.support.varlen_cases import VarlenCase, cases, hopper_cases


@pytest.mark.parametrize("case", some([*cases(), *hopper_cases()], every=18), ids=str)
def test_each_sequence_is_within_its_budget(case: VarlenCase, on):
    on(case.arch)
    (q, k, v, dout), options = case.arguments(np.random.default_rng(len(str(case))))
    report = numflash.check(q, k, v, dout=dout, **options)
    assert report.passed, f"\n{report}"
