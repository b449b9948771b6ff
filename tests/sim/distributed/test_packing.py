"""Gather with runs put together gives the bits that it gives without."""

import numpy as np
import pytest

from numflash.distributed import packing
from tests.sim.distributed.test_methods import ASKED, comms_of, inputs, layout_of, results_of
from tests.support.covering import ALL, some, thorough


@pytest.fixture
def packed(monkeypatch):
    """A function after which all runs are put together."""

    def begin():
        monkeypatch.setattr(packing, "MOST_MESSAGES", 0)
        packing.are_packed.cache_clear()

    yield begin
    packing.are_packed.cache_clear()


@thorough
@pytest.mark.parametrize("wire", some([None, "e4m3"], None))
def test_the_bits_are_the_same(packed, wire):
    asked, ranks = ASKED["documents"], 3 if ALL else 2
    whole, layout = inputs(asked, "one key-value head"), layout_of(asked, ranks)
    given = "gather", layout, asked, whole
    expected = results_of(comms_of("gather", ranks), *given, wire=wire)
    packed()
    assert packing.are_packed(layout, packing.Band(None, 0), None)
    found = results_of(comms_of("gather", ranks), *given, wire=wire)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
