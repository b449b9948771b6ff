"""Parts merged in place by compiled code: the bits of the simulator."""

import numpy as np
import pytest

import numflash
from numflash.runtime.views import numpy_dtype
from tests.executed.conftest import normal
from tests.support.covering import some, thorough

CASES = {
    # (arch, shape, dtype of the part)
    "16 bits": ("sm_90a", (1, 9, 3, 64), "float16"),
    "32 bits": ("sm_80", (2, 5, 2, 256), "float32"),
    "one by one": ("sm_75", (1, 5, 3, 20), "bfloat16"),
}


def parts(shape, dtype):
    """(out, lse, part, part_lse); two queries see no key on one side, the last on neither."""
    batch, tokens, heads, _ = shape
    statistics = batch, heads, tokens
    out, part = normal(shape, np.float32), normal(shape, numpy_dtype(dtype))
    lse, part_lse = normal(statistics, np.float32), 2 * normal(statistics, np.float32)[..., ::-1]
    lse[..., 0] = part_lse[..., 1] = lse[..., -1] = part_lse[..., -1] = -np.inf
    return out, lse, part, part_lse


@thorough
@pytest.mark.parametrize("name", some(CASES, "16 bits", "one by one"))
def test_compiled_code_has_the_bits_of_the_simulator(executed, name):
    arch, shape, dtype = CASES[name]
    executed(arch)
    out, lse, *part = parts(shape, dtype)
    exact, exact_lse = numflash.merge_partials([out, part[0].astype("float32")], [lse, part[1]])
    numflash.merge_onto(out, lse, *part)
    executed(arch, code="python")
    again, again_lse, *part = parts(shape, dtype)
    numflash.merge_onto(again, again_lse, *part)
    assert out.tobytes() == again.tobytes()
    # Compilers have a logarithm of their own.
    np.testing.assert_allclose(lse, again_lse, rtol=0, atol=5e-7)
    np.testing.assert_allclose(out, exact, atol=1e-6)
    np.testing.assert_allclose(lse, exact_lse, atol=1e-6)
    assert (out[:, -1] == 0).all() and np.isneginf(lse[..., -1]).all()
