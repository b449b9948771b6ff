"""Parts merged in place on a GPU: rows of a larger array, against float64."""

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import to_numpy
from numflash.runtime.views import numpy_dtype


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("head_dim", [128, 40, 13])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_part_joins_the_rows_that_it_covers(cupy, dtype, head_dim):
    rng = cupy.random.default_rng(0)
    whole = rng.standard_normal((2, 1027, 9, head_dim), dtype="float32")
    lse = rng.standard_normal((2, 9, 1027), dtype="float32")
    rows, count = slice(500, 1021), 521
    part = rng.standard_normal((2, count, 9, head_dim), dtype="float32").astype(numpy_dtype(dtype))
    part_lse = rng.standard_normal((2, 9, count), dtype="float32")
    part_lse[:, :, 17] = -np.inf
    lse[:, 3, 510] = -np.inf
    before, weights = to_numpy(whole).astype(np.float64), to_numpy(lse).astype(np.float64)
    wanted, wanted_lse = before.copy(), weights.copy()
    new = to_numpy(part_lse).astype(np.float64)
    wanted_lse[:, :, rows] = np.logaddexp(weights[:, :, rows], new)
    old_weight = np.exp(weights[:, :, rows] - wanted_lse[:, :, rows]).swapaxes(1, 2)[..., None]
    weight = np.exp(new - wanted_lse[:, :, rows]).swapaxes(1, 2)[..., None]
    wanted[:, rows] = old_weight * before[:, rows] + weight * to_numpy(part).astype(np.float64)
    numflash.merge_onto(whole[:, rows], lse[:, :, rows], part, part_lse)
    np.testing.assert_allclose(to_numpy(whole), wanted, atol=4e-6)
    np.testing.assert_allclose(to_numpy(lse), wanted_lse, atol=4e-6)
