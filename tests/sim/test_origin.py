"""A part of a larger problem computes its share of it: `origin`, with `shift`."""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import ready
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import WHOLE, Origin, describe
from numflash.runtime.driver import limits_of_device
from numflash.runtime.views import ArrayView, contiguous_strides
from tests.support.covering import some, thorough

HEADS, SEQLEN = 8, 24
SINKS = np.linspace(-2, 4, HEADS, dtype=np.float32)
SLOPES = {
    "by head": (2.0 ** -np.arange(1, HEADS + 1)).astype(np.float32),
    "by batch entry": np.linspace(0.1, 2, 2 * HEADS, dtype=np.float32).reshape(2, HEADS),
}
# (GPU, dtype, precision, config of the forward)
KERNELS = {
    "portable": ("sm_80", "float32", None, "m16n16w2"),
    "sm80": ("sm_80", "float16", None, "sm80-m16n16w1s1"),
    "sm80-split": ("sm_80", "float16", None, "sm80-m16n16w1s2x2"),
    "sm90": ("sm_90a", "float16", None, "sm90-m64n32w4s1-overlap"),
    "fp8": ("sm_89", "float16", "fp8", "fp8-sm89-m16n64w1s1"),
}


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """A function that chooses the simulated GPU."""

    def be(arch):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", arch)
        limits_of_device.cache_clear()

    monkeypatch.setattr(ready, "_ready", {})
    yield be
    limits_of_device.cache_clear()


def inputs(dtype, head_dim=32):
    """q, k, v and dout: 8 query heads share 4 key-value heads."""
    rng = np.random.default_rng(3)
    shapes = [(2, SEQLEN, heads, head_dim) for heads in (HEADS, HEADS // 2, HEADS // 2, HEADS)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@thorough
@pytest.mark.parametrize("slopes", some(SLOPES, "by batch entry"))
@pytest.mark.parametrize("name", some(KERNELS, "sm80-split"))
def test_a_part_of_the_heads_and_queries_computes_its_share(on, name, slopes):
    arch, dtype, precision, config = KERNELS[name]
    on(arch)
    q, k, v, _ = inputs(dtype)
    options = {"causal": True}
    of_heads = {"sinks": SINKS, "alibi_slopes": SLOPES[slopes]}
    of_call = {**of_heads, "precision": precision, "config": config, "return_lse": True}
    whole = numflash.attention(q, k, v, **options, **of_call)
    rows, heads = slice(10, 19), slice(4, 8)
    origin = rows.start, 0, heads.start
    # Query `rows.start` stands at key `rows.start`.
    options |= {"causal_align": "top_left", "shift": rows.start, "origin": origin}
    part = [x[:, :, heads.start // 2 :] for x in (k, v)]
    found = numflash.attention(q[:, rows, heads], *part, **options, **of_call)
    # A part has scales of its own.
    atol = 2e-3 if precision is None else 0.1
    np.testing.assert_allclose(found[0], whole[0][:, rows, heads], atol=atol)
    np.testing.assert_allclose(found[1], whole[1][:, heads, rows], atol=atol)
    exact = reference.attention(q[:, rows, heads], *part, **options, **of_heads)
    everything = reference.attention(q, k, v, causal=True, **of_heads)
    np.testing.assert_allclose(exact[0], everything[0][:, rows, heads], rtol=1e-12)


@thorough
def test_the_gradients_of_parts_are_those_of_the_whole():
    q, k, v, dout = (x[:, :13, : x.shape[2] // 2] for x in inputs("float32", 16))
    slopes = SLOPES["by batch entry"][:, :4]
    options = {"sinks": SINKS[:4], "alibi_slopes": slopes, "causal": True}
    wrt = "q", "k", "sinks", "alibi_slopes"
    call = q, k, v
    out, lse = numflash.attention(*call, return_lse=True, **options)
    whole = numflash.attention_backward(dout, *call, out, lse, wrt=wrt, **options)
    parts = []
    for first in (0, 2):
        heads, heads_kv = np.s_[:, :, first : first + 2], np.s_[:, :, first // 2 : first // 2 + 1]
        call = q[heads], k[heads_kv], v[heads_kv]
        options["origin"] = 0, 0, first
        results = out[heads], np.ascontiguousarray(lse[:, first : first + 2])
        parts.append(numflash.attention_backward(dout[heads], *call, *results, wrt=wrt, **options))
    for name, a, b, expected in zip(wrt, *parts, whole, strict=True):
        # Those of heads are zero where a part has none.
        found = np.concatenate([a, b], 2) if name in ("q", "k") else a + b
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)


@thorough
def test_functions_and_biases_see_the_numbers_of_the_whole():
    q, k, v, dout = inputs("float32", 16)
    rng = np.random.default_rng(5)
    given = {
        "bias": rng.standard_normal((HEADS, SEQLEN, SEQLEN)).astype(np.float32),
        "mask": rng.random((2, 1, SEQLEN, SEQLEN)) < 0.8,
        "score_mod": lambda s, b, h, i, j: s + 0.1 * h - 0.01 * i * j,
        "mask_mod": lambda b, h, i, j: (i + h) % 3 != j % 4,
    }
    rows, heads = np.s_[:, 10:19, 4:8], np.s_[:, 6:, 2:]
    call = q[rows], k[heads], v[heads], dout[rows]
    # Without the first six keys the whole hides them, too.
    hidden = given | {"mask": given["mask"] & (np.arange(SEQLEN) >= 6)}
    whole = numflash.attention(q, k, v, **hidden)
    options = {**given, "origin": (10, 6, 4)}
    np.testing.assert_allclose(numflash.attention(*call[:3], **options), whole[rows], atol=1e-5)
    report = numflash.check(*call[:3], dout=call[3], **options)
    assert report.passed, f"\n{report}"


@thorough
def test_arrays_of_heads_may_have_any_strides_and_more_heads():
    q, k, v, _ = inputs("float32", 16)
    few = np.s_[:1, :, :2]
    call = q[few], k[few], v[few]
    room = np.full((2, 3 * HEADS), np.nan, np.float32)
    room[:, ::3] = SLOPES["by batch entry"]
    sinks = np.full(2 * HEADS, np.nan, np.float32)[::-2]
    sinks[:] = SINKS
    expected = numflash.attention(*call, alibi_slopes=room[:1, 15:21:3].copy(), sinks=SINKS[5:7])
    found = numflash.attention(*call, alibi_slopes=room[:1, ::3], sinks=sinks, origin=(7, 3, 5))
    np.testing.assert_array_equal(found, expected)
    # The arrays are read by each call, wherever they are then.
    again = numflash.attention(
        *call, alibi_slopes=room[:1, ::3].copy(), sinks=sinks + 0, origin=[7, 3, 5]
    )
    np.testing.assert_array_equal(again, expected)


def test_a_problem_knows_its_origin():
    shape = 1, 9, 2, 16
    view = ArrayView(0, shape, contiguous_strides(shape), "float16", 0)
    views = dict.fromkeys("qkv", view)
    for given, known in ((None, WHOLE), ((7, np.int32(3), 5), Origin(7, 3, 5))):
        problem, _ = describe(views, AttentionOptions(origin=given))
        assert problem.origin == known and type(problem.origin.column) is int
