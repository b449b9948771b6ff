"""Rotary embeddings by compiled code: the bits of the simulator."""

import numpy as np
import pytest

import numflash
from numflash.runtime.views import numpy_dtype
from tests.executed.conftest import normal
from tests.support.covering import some

CASES = {
    # (arch, shape, dtype, rotary_dim, dtype of tables, options)
    "halves": ("sm_80", (2, 5, 3, 64), "float16", 64, "float32", {}),
    "interleaved": ("sm_75", (2, 5, 3, 64), "bfloat16", 32, "bfloat16", {"interleaved": True}),
    "exact": ("sm_90a", (1, 9, 5, 40), "float32", 24, "float32", {"conjugate": True}),
    "pair-by-pair": ("sm_80", (2, 5, 3, 20), "bfloat16", 6, "float32", {"interleaved": True}),
    "packed": (
        "sm_80",
        (9, 3, 32),
        "float16",
        32,
        "float16",
        {
            "cu_seqlens": np.array([1, 1, 4, 4, 8], np.int32),
            "offsets": np.array([3, 2, -1, 9], np.int32),
        },
    ),
}


@pytest.mark.parametrize("name", some(CASES, "halves", "packed"))
def test_compiled_code_has_the_bits_of_the_simulator(executed, name):
    arch, shape, dtype, rotary_dim, tables, options = CASES[name]
    x = normal(shape, numpy_dtype(dtype))
    cos, sin = numflash.rotary_tables(12, rotary_dim, dtype=tables)
    executed(arch)
    got = numflash.apply_rotary(x, cos, sin, **options)
    inside = numflash.apply_rotary(x.copy(), cos, sin, out=x, **options)
    np.testing.assert_array_equal(inside, got)
    x = normal(shape, numpy_dtype(dtype))
    executed(arch, code="python")
    assert got.tobytes() == numflash.apply_rotary(x, cos, sin, **options).tobytes()
    wanted = numflash.reference.apply_rotary(x, cos, sin, **options)
    rounding = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), wanted, atol=rounding)


def test_a_wrong_sign_is_seen(executed):
    """The first product of a pair, not subtracted but added."""
    x = normal((1, 3, 1, 32), np.float32)
    cos, sin = numflash.rotary_tables(3, 32)
    executed("sm_80", lambda ptx: ptx.replace("neg.f32", "mov.f32"))
    got = numflash.apply_rotary(x, cos, sin)
    assert np.abs(got - numflash.reference.apply_rotary(x, cos, sin)).max() > 0.1


def test_offsets_beyond_two_to_the_31st(executed):
    executed("sm_80")
    x = normal((2, 3, 2, 16), np.float16)
    cos, sin = numflash.rotary_tables(3, 16)
    wanted = numflash.apply_rotary(x, cos, sin)
    room = np.empty(2**31 + 4096, np.float16)  # untouched pages cost nothing
    steps = (2 * (2**31 + 64), *x.strides[1:])
    far = np.lib.stride_tricks.as_strided(room, x.shape, steps)
    far[...] = x
    np.testing.assert_array_equal(numflash.apply_rotary(far, cos, sin), wanted)
    np.testing.assert_array_equal(numflash.apply_rotary(far, cos, sin, out=far), wanted)
