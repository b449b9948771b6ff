"""The derivatives that are found, against finite differences of the functions themselves."""

import math

import numpy as np
import pytest

from numflash import math as nm
from numflash.functions.derivative import derivative
from numflash.functions.nodes import LEAF, const
from numflash.functions.trace import trace
from tests.support.program_values import in_float64, metadata, value
from tests.support.score_functions import HEADS, LENGTH, SCORES

STEP = 1e-6


def points(seed=0):
    """Scores at places of all kinds, in float64."""
    rng = np.random.default_rng(seed)
    n = 400
    places = {
        "b": rng.integers(0, 2, n),
        "h": rng.integers(0, HEADS, n),
        "i": rng.integers(0, LENGTH, n),
        "j": rng.integers(0, LENGTH, n),
    }
    return {"s": rng.normal(0, 2, n), **places}


def differences(function, leaves, aux):
    """Central differences, 0 where the function is infinite; and which points are at a kink."""
    s, *places = leaves.values()
    aux = in_float64(aux)
    with np.errstate(all="ignore"):
        up, down = (function(s + step, *places, *aux) for step in (STEP, -STEP))
        right, left = (function(s + 2 * step, *places, *aux) for step in (STEP, -STEP))
        found = np.where(np.isinf(up), 0, (up - down) / (2 * STEP))
        kink = np.abs(right - up - (down - left)) > 1e-4
    return found, kink


@pytest.mark.parametrize("name", SCORES)
def test_the_derivative_of_a_function_is_its_differences(name):
    function, aux = SCORES[name]
    program = trace(function, aux=tuple(map(metadata, aux))).program
    leaves = points()
    expected, kink = differences(function, leaves, aux)
    got = np.broadcast_to(value(program.slope, leaves, aux), expected.shape)
    smooth = ~kink
    assert smooth.mean() > 0.95
    # Constants are rounded to float32.
    np.testing.assert_allclose(got[smooth], expected[smooth], rtol=2e-6, atol=2e-6)
    s, *places = leaves.values()
    with np.errstate(all="ignore"):
        plain = np.broadcast_to(function(s, *places, *in_float64(aux)), s.shape)
    np.testing.assert_allclose(value(program.score, leaves, aux), plain, rtol=2e-6, atol=2e-6)


def test_there_are_thirty_functions():
    assert len(SCORES) >= 30


@pytest.mark.parametrize("name", ["alibi", "T5", "bias", "of a float index"])
def test_the_derivative_by_an_element_is_its_difference(name):
    function, aux = SCORES[name]
    program = trace(function, aux=tuple(map(metadata, aux))).program
    (partial,) = program.partials
    leaves = points()
    (k,) = (k for k, x in enumerate(aux) if isinstance(x, np.ndarray))
    assert partial.aux == k
    shifted = [
        tuple(x.astype("f8") + (step if n == k else 0) for n, x in enumerate(aux))
        for step in (STEP, -STEP)
    ]
    up, down = (value(program.score, leaves, x) for x in shifted)
    got = np.broadcast_to(value(partial.slope, leaves, aux), up.shape)
    np.testing.assert_allclose(got, (up - down) / (2 * STEP), rtol=1e-6, atol=1e-6)


def test_what_the_axes_of_a_read_are_indexed_by():
    table, bias = (metadata(np.zeros(shape, np.float32)) for shape in ((3, 9), (2, 3, 5, 9)))

    def score(s, b, h, q, k, table, bias):
        return s * table[h, k - q + 4] + bias[b, 0, q, k] + table[0, k]

    program = trace(score, aux=(table, bias)).program
    assert {(p.aux, p.axes) for p in program.partials} == {
        (0, ("h", "")),
        (0, ("0", "j")),
        (1, ("b", "0", "i", "j")),
    }


def test_whole_numbers_and_truth_values_have_no_derivative():
    s = LEAF["s"]
    trunc = trace(lambda s, b, h, q, k: s.int() + nm.where(s > 0, 1.0, 2.0)).program.score
    assert derivative(trunc, s) is None
    assert derivative(LEAF["i"], s) is None
    assert derivative(const(2.0), s) is None


def test_at_a_tie_minimum_and_maximum_take_the_first():
    at_0 = {"s": np.zeros(1), "b": 0, "h": 0, "i": 0, "j": 0}
    for function in (nm.minimum, nm.maximum):
        for first, second in ((3.0, 5.0), (5.0, 3.0)):
            score = trace(lambda s, b, h, q, k, f=function, x=first, y=second: f(x * s, y * s))
            assert value(score.program.slope, at_0, ()) == first


def test_a_side_that_is_not_taken_does_not_count():
    program = trace(lambda s, b, h, q, k: nm.where(s > 0, nm.log(s), 0.0)).program
    at_0 = {"s": np.zeros(1), "b": 0, "h": 0, "i": 0, "j": 0}
    assert value(program.slope, at_0, ()) == 0


def test_a_score_that_is_only_masked_does_not_bend():
    assert not trace(lambda s, b, h, q, k: s + 1).program.bends
    assert not trace(None, lambda b, h, q, k: k <= q).program.bends
    assert not trace(lambda s, b, h, q, k: (s * 4) * 0.25 - q).program.bends
    assert trace(lambda s, b, h, q, k: nm.where(k <= q, s, -math.inf)).program.bends
