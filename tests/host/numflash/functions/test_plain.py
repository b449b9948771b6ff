"""Functions of users on NumPy's arrays, as the reference calls them."""

import numpy as np
import pytest

from numflash import masks
from numflash.functions.plain import on_arrays
from numflash.functions.trace import trace
from tests.support.program_values import in_float64, metadata, value
from tests.support.score_functions import HEADS, LENGTH, SCORES

PLACES = tuple(np.ogrid[:2, :HEADS, :LENGTH, :LENGTH])
SHAPE = (2, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("name", SCORES)
def test_a_function_does_on_arrays_what_its_program_does(name):
    function, aux = SCORES[name]
    s = np.random.default_rng(0).normal(0, 2, SHAPE)
    program = trace(function, aux=tuple(map(metadata, aux))).program
    with np.errstate(all="ignore"):
        got = on_arrays(function, (s, *PLACES), in_float64(aux))
    expected = value(program.score, dict(zip("sbhij", (s, *PLACES), strict=True)), aux)
    np.testing.assert_allclose(np.broadcast_to(got, SHAPE), expected, rtol=2e-6, atol=2e-6)


def test_a_computed_index_is_brought_inside():
    table = np.arange(12.0).reshape(3, 4)
    _, h, q, k = PLACES
    expected = table[h, np.clip(k - q, 0, 3)]
    for function in (
        lambda b, h, q, k, t: t[h, k - q],
        lambda b, h, q, k, t: t[h][k - q] if np.ndim(h) == 0 else t[h, k - q],
    ):
        np.testing.assert_array_equal(on_arrays(function, PLACES, (table,)), expected)
    with pytest.raises(IndexError):
        on_arrays(lambda b, h, q, k, t: t[b, h, q], PLACES, (table,))


def test_a_function_with_an_if_is_called_for_each_element():
    def window(b, h, q, k, sizes):
        if k > q:
            return False
        return q - k < sizes[h]

    sizes = np.array([1, 3, 9])
    _, h, q, k = PLACES
    expected = np.broadcast_to((k <= q) & (q - k < sizes[h]), SHAPE)
    np.testing.assert_array_equal(on_arrays(window, PLACES, (sizes,)), expected)
    with pytest.raises(ValueError, match="mine"):
        on_arrays(fails, PLACES, ())


def fails(b, h, q, k):
    raise ValueError("mine")


def test_one_of_two_functions_may_take_no_arrays():
    assert on_arrays(masks.causal, PLACES, (np.zeros(3),), True).shape == (1, 1, LENGTH, LENGTH)
    with pytest.raises(TypeError, match="positional"):
        on_arrays(masks.causal, PLACES, (np.zeros(3),))
