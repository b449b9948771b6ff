"""Cases with a mask or a bias of PyTorch's, ONNX's and JAX's tests, as numflash is asked for them.

The tables hold their shapes and flags; the results are those of a few lines of NumPy in float64.
"""

import ml_dtypes
import numpy as np
import pytest

import numflash
from tests.support.covering import some


def exact(q, k, v, bias=None, mask=None, softcap=0.0):
    """Attention of (batch, heads, seqlen, head_dim), heads of k and v repeated, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    s = softcap * np.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    s = s if mask is None else np.where(mask, s, -np.inf)
    largest = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isneginf(largest), 0, largest))
    total = p.sum(-1, keepdims=True)
    return np.where(total > 0, p / np.where(total > 0, total, 1), 0) @ v


def normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


# Small tiles for small problems, which the simulator computes whole.
CONFIG = "m16n16w1"


# Sample inputs of scaled_dot_product_attention in PyTorch 2.14 (`op_db`) without dropout: q and k,
# attn_mask, is_causal. Arrays of three axes are (batch, seqlen, head_dim); here they get a head.
BATCH, ROWS, KEYS, HEADS, DIM = 4, 3, 6, 4, 8
THREE = (BATCH, ROWS, DIM), (BATCH, KEYS, DIM)
FOUR = (BATCH, HEADS, ROWS, DIM), (BATCH, HEADS, KEYS, DIM)
BROADCAST = (HEADS, ROWS, DIM), (BATCH, HEADS, KEYS, DIM)
TORCH = {
    "three axes, causal": (THREE, None, True),
    "three axes": (THREE, None, False),
    "four axes, causal": (FOUR, None, True),
    "four axes": (FOUR, None, False),
    "broadcast q, causal": (BROADCAST, None, True),
    "broadcast q": (BROADCAST, None, False),
    "attn_mask": (FOUR, ((ROWS, KEYS), "float32"), False),
    "attn_mask of booleans": (FOUR, ((ROWS, KEYS), "bool"), False),
    "attn_bias": (FOUR, ((BATCH, HEADS, ROWS, KEYS), "float32"), False),
}


@pytest.mark.parametrize("name", some(TORCH, "broadcast q, causal", "attn_mask of booleans"))
def test_torch(name):
    (of_q, of_k), attn_mask, is_causal = TORCH[name]
    rng = np.random.default_rng(len(name))
    q, k, v = normal(rng, of_q), normal(rng, of_k), normal(rng, of_k)
    if q.ndim == k.ndim == 3:
        q, k, v = (x[:, None] for x in (q, k, v))
    q = np.broadcast_to(q, (BATCH, *q.shape[-3:]))
    options, asked = {"causal": is_causal, "causal_align": "top_left"}, {}
    if attn_mask is not None:
        asked = _mask(rng, *attn_mask)
    seen = np.tril(np.ones((ROWS, KEYS), bool)) if is_causal else None
    out = numflash.attention(q, k, v, layout="bhsd", config=CONFIG, **options, **asked)
    wanted = exact(q, k, v, **{"mask": seen, **asked})
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def _mask(rng, shape, dtype):
    """An attn_mask as the option that it is: of booleans a mask, of numbers a bias."""
    if dtype == "bool":
        return {"mask": rng.random(shape) < 0.7}
    return {"bias": normal(rng, shape, dtype)}


# Node tests of ONNX's Attention that have attn_mask (onnx/backend/test/case/node/attention.py),
# of float32: batch, heads of q, heads of k and v, queries, keys, head_dim of v, its mask, options.
# Keys of the past stand before those of the present. A group's heads are neighbours.
PAST = 12
ONNX = {
    "4d_attn_mask": (2, 3, 3, 4, 6, 8, ((4, 6), "float32"), {}),
    "4d_attn_mask_3d": (2, 3, 3, 4, 6, 8, ((2, 1, 4, 6), "float32"), {}),
    "4d_attn_mask_3d_causal": (2, 3, 3, 4, 6, 8, ((2, 1, 4, 6), "float32"), {"causal": True}),
    "4d_attn_mask_4d": (2, 3, 3, 4, 6, 8, ((2, 3, 4, 6), "float32"), {}),
    "4d_attn_mask_4d_causal": (2, 3, 3, 4, 6, 8, ((2, 3, 4, 6), "float32"), {"causal": True}),
    "4d_attn_mask_bool": (2, 3, 3, 4, 6, 8, ((4, 6), "bool"), {}),
    "4d_attn_mask_bool_4d": (2, 3, 3, 4, 6, 8, ((2, 3, 4, 6), "bool"), {}),
    "4d_gqa_attn_mask": (2, 9, 3, 4, 6, 8, ((4, 6), "float32"), {}),
    "4d_diff_heads_sizes_attn_mask": (2, 3, 3, 4, 6, 10, ((4, 6), "float32"), {}),
    "4d_with_past_and_present": (2, 3, 3, 4, 6 + PAST, 8, ((4, 6 + PAST), "float32"), {}),
    "4d_gqa_with_past_and_present": (2, 9, 3, 4, 6 + PAST, 8, ((4, 6 + PAST), "float32"), {}),
    "4d_diff_heads_with_past": (2, 3, 3, 4, 6 + PAST, 10, ((4, 6 + PAST), "float32"), {}),
    "softcap and attn_mask": (2, 3, 3, 4, 6, 8, ((4, 6), "float32"), {"softcap": 2.0}),
}


@pytest.mark.parametrize(
    "name",
    some(ONNX, "4d_attn_mask_3d_causal", "4d_diff_heads_with_past", "softcap and attn_mask"),
)
def test_onnx(name):
    batch, heads_q, heads_kv, rows, keys, head_dim_v, mask, options = ONNX[name]
    rng = np.random.default_rng(len(name))
    q = rng.random((batch, heads_q, rows, 8)).astype(np.float32)
    k = rng.random((batch, heads_kv, keys, 8)).astype(np.float32)
    v = rng.random((batch, heads_kv, keys, head_dim_v)).astype(np.float32)
    asked = _mask(rng, *mask)
    out = numflash.attention(
        q, k, v, layout="bhsd", causal_align="top_left", config=CONFIG, **options, **asked
    )
    options = dict(options)
    if options.pop("causal", False):
        options["mask"] = np.tril(np.ones((rows, keys), bool))
    wanted = exact(q, k, v, **options, **asked)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


# Modes of testDotProductAttentionMask of JAX (tests/nn_test.py), bfloat16, with gradients; their
# sizes are 2, 128, 4, 32. There a query beyond its length gets a mean, here 0.
JAX = ["bias", "causal", "padding", "custom", "causal padding", "custom padding", "bias causal"]
JAX += ["causal sliding_window"]


@pytest.mark.parametrize("modes", some(JAX, "bias causal", "causal padding", JAX[-1]))
def test_jax(modes):
    batch, tokens, heads, head_dim = 2, 24, 1, 16
    rng = np.random.default_rng(len(modes))
    shape = batch, tokens, heads, head_dim
    q, k, v, dout = (normal(rng, shape, ml_dtypes.bfloat16) for _ in range(4))
    options = {"causal": "causal" in modes}
    if "padding" in modes:
        options["mask_mod"] = lambda b, h, i, j, rows, keys: (i < rows[b]) & (j < keys[b])
        lengths = (tokens // 2, tokens // 4), (tokens // 4, tokens // 2)
        options["aux"] = tuple(np.array(x, np.int32) for x in lengths)
    if "custom" in modes:
        options["mask"] = np.tril(np.ones((tokens, tokens), bool))[None, None]
    if "bias" in modes:
        options["bias"] = normal(rng, (batch, heads, tokens, tokens), ml_dtypes.bfloat16)
    if "sliding_window" in modes:
        options["window_size"] = (tokens // 4, 0)
    report = numflash.check(q, k, v, dout=dout, **options)
    assert report.passed, f"\n{report}"
