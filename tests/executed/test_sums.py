"""Compiled kernels whose products add as tensor cores do: within their error budgets."""

import pytest

import numflash
from numflash.runtime import sums
from numflash.runtime.errors import UnsupportedError
from tests.executed.test_kernels import CASES, inputs_of
from tests.support.covering import some

# A case for each kind of product, and the models that have it.
FAMILIES = {
    "sm80": ("ampere", "ada", "hopper"),
    "sm90": ("hopper",),
    "fp8-sm89": ("ada",),
    "fp8-sm90": ("hopper",),
}


@pytest.fixture
def checked(executed, monkeypatch):
    """The report of a forward, by the family's name and the model's."""

    def check(family: str, model: str):
        arch, dtype, tokens, head_dim, _, options = CASES[family]
        executed(arch)
        monkeypatch.setattr(sums.SUMS, "model", model)
        q, k, v, _ = inputs_of(dtype, tokens, head_dim)
        return numflash.check(q, k, v, **options)

    return check


@pytest.mark.parametrize("family", some(FAMILIES, "sm80", "fp8-sm90"))
def test_errors_stay_within_their_budgets(checked, family):
    exact = checked(family, "exact")
    for model in FAMILIES[family]:
        report = checked(family, model)
        assert report.passed, report
        # The model shows.
        assert report.errors != exact.errors


def test_a_product_that_the_gpus_do_not_have_is_refused(checked):
    with pytest.raises(UnsupportedError, match=r"line \d+: wgmma.*SUMS=ampere.* no wgmma of"):
        checked("sm90", "ampere")
