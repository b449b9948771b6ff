"""Results in float32 of inputs of 16 bits: `out_dtype` and `grad_dtype`."""

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import numpy_dtype
from tests.support.covering import some, thorough

# (GPU, dtype, options): one kernel or two, split keys, packed heads, rows that are not aligned.
FORWARDS = {
    "portable": ("sm_80", "float16", {"config": "m16n16w2"}),
    "portable-bfloat16": ("sm_75", "bfloat16", {"config": "m16n16w2"}),
    "sm80": ("sm_80", "bfloat16", {"config": "sm80-m32n16w2s2"}),
    "sm80-split": ("sm_80", "float16", {"config": "sm80-m16n16w1s1x2"}),
    "sm75": ("sm_75", "float16", {"config": "sm75-m16n16w1s1"}),
    "sm90": ("sm_90a", "bfloat16", {"config": "sm90-m64n32w4s1-overlap"}),
    "sm90-packed": ("sm_90a", "float16", {"config": "sm90-m64n32w4s2-packed-persistent"}),
    "sm90-split": ("sm_90a", "float16", {"config": "sm90-m64n32w4s1x2"}),
    "fp8": ("sm_89", "float16", {"config": "fp8-sm89-m16n64w1s1", "precision": "fp8"}),
    "fp8-sm90": ("sm_90a", "bfloat16", {"config": "fp8-sm90-m64n64w4s2", "precision": "fp8"}),
    "auto": ("sm_89", "float16", {"precision": "auto"}),
}
BACKWARDS = {
    "portable": ("sm_80", "float16", {"backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"}),
    "sm80": (
        "sm_80",
        "bfloat16",
        {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s1"},
    ),
    "sm80-together": ("sm_80", "float16", {"backward": "sm80-m16n16w1s2x2"}),
    "sm75-apart": (
        "sm_75",
        "float16",
        {"backward-dq": "sm75-m16n16w1s1", "backward-dkdv": "sm75-m16n16w1s1-apart"},
    ),
}


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """A function that chooses the simulated GPU. Results hold NaN before they are written."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8)[...] = 0xFF
        return array

    def be(arch):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        limits_of_device.cache_clear()

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})
    yield be
    limits_of_device.cache_clear()


def inputs(dtype, head_dim, head_dim_v):
    """q, k, v and dout, grouped heads."""
    rng = np.random.default_rng(11)
    shapes = [(19, 4, head_dim), (40, 2, head_dim), (40, 2, head_dim_v), (19, 4, head_dim_v)]
    arrays = [rng.standard_normal((1, *shape)) for shape in shapes]
    return [x.astype(numpy_dtype(dtype)) for x in arrays]


def assert_rounded(exact, rounded):
    """One result is the other before its last rounding."""
    assert exact.dtype == np.float32 and rounded.dtype != np.float32
    np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)
    assert (exact != rounded.astype(np.float32)).any()


ALIGNED, ODD = (32, 40), (15, 17)
CASES = [
    *((name, ALIGNED) for name in FORWARDS),
    *((name, ODD) for name in ("portable", "sm80", "sm80-split", "fp8")),
]
KEPT = ("sm90-packed", ALIGNED), ("sm80-split", ODD)


@pytest.mark.parametrize(("name", "columns"), some(CASES, *KEPT))
def test_a_result_in_float32_is_the_other_before_it_is_rounded(on, name, columns):
    arch, dtype, options = FORWARDS[name]
    on(arch)
    q, k, v, _ = inputs(dtype, *columns)
    options = {**options, "causal": True, "return_lse": True}
    rounded, lse = numflash.attention(q, k, v, **options)
    exact, same = numflash.attention(q, k, v, **options, out_dtype="float32")
    np.testing.assert_array_equal(lse, same)
    assert_rounded(exact, rounded)


CASES = [
    *((name, ALIGNED) for name in BACKWARDS),
    *((name, ODD) for name in ("portable", "sm80", "sm80-together")),
]
KEPT = [("sm80-together", ODD)]


@pytest.mark.parametrize(("name", "columns"), some(CASES, *KEPT))
def test_gradients_in_float32_are_the_others_before_they_are_rounded(on, name, columns):
    arch, dtype, config = BACKWARDS[name]
    on(arch)
    q, k, v, dout = inputs(dtype, *columns)
    out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
    call, options = (dout, q, k, v, out, lse), {"causal": True, "config": config}
    rounded = numflash.attention_backward(*call, **options)
    exact = numflash.attention_backward(*call, **options, grad_dtype="float32")
    for a, b in zip(exact, rounded, strict=True):
        assert a.shape == b.shape
        assert_rounded(a, b)


@thorough
@pytest.mark.parametrize("columns", [ALIGNED, ODD], ids=str)
def test_delta_is_made_of_a_result_in_float32(on, columns):
    on("sm_80")
    q, k, v, dout = inputs("bfloat16", *columns)
    out, lse = numflash.attention(q, k, v, return_lse=True, out_dtype="float32")
    found = numflash.attention_backward(dout, q, k, v, out, lse, grad_dtype="float32")
    delta = (dout.astype(np.float32) * out).sum(-1).swapaxes(1, 2)
    expected = numflash.attention_backward(
        dout, q, k, v, None, lse, delta=delta, grad_dtype="float32"
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2 * abs(b).max())
    report = numflash.check(q, k, v, dout=dout, out_dtype="float32", grad_dtype="float32")
    assert report.passed, f"\n{report}"


def test_what_lies_between_rows_of_out_is_left_alone(on):
    on("sm_90a")
    q, k, v, _ = inputs("float16", 32, 33)
    room = np.full((1, 19, 4, 36), 7, np.float32)
    padded = np.zeros((1, 40, 2, 40), np.float16)
    padded[..., :33] = v
    v, out = padded[..., :33], room[..., :33]
    options = {"config": "sm90-m64n32w4s1", "out_dtype": "float32"}
    assert numflash.attention(q, k, v, **options, out=out) is out
    assert (room[..., 33:] == 7).all()
    np.testing.assert_allclose(out, numflash.attention(q, k, v, out_dtype="float32"), atol=2e-3)


def test_float32_is_float32_anyhow():
    q, k, v, dout = (x[:, :9, ::2].astype(np.float32) for x in inputs("float16", 16, 16))
    out, lse = numflash.attention(q, k, v, return_lse=True)
    same = numflash.attention(q, k, v, out_dtype="float32")
    np.testing.assert_array_equal(same, out)
    gradients = numflash.attention_backward(dout, q, k, v, out, lse)
    again = numflash.attention_backward(dout, q, k, v, out, lse, grad_dtype="float32")
    for a, b in zip(gradients, again, strict=True):
        np.testing.assert_array_equal(a, b)
