"""The specification against something simpler still: loops over Python floats, and differences.

`numflash.reference` is what every kernel is tested against, so it is tested against code that
shares nothing with it: the definition written out for one number at a time, and gradients as
central differences of the forward.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from numflash import reference

# name: ((batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v), options)
CASES = {
    "plain": ((2, 4, 5, 2, 2, 3, 2), {}),
    "scale": ((1, 3, 4, 1, 1, 3, 3), {"softmax_scale": -1.7}),
    "scale-0": ((1, 3, 4, 1, 1, 3, 3), {"softmax_scale": 0}),
    "groups": ((2, 3, 4, 6, 2, 2, 3), {}),
    "causal-square": ((1, 5, 5, 1, 1, 2, 2), {"causal": True}),
    "causal-wide": ((1, 3, 6, 1, 1, 2, 2), {"causal": True}),
    "causal-tall": ((1, 6, 3, 1, 1, 2, 2), {"causal": True}),
    "top-left-wide": ((1, 3, 6, 1, 1, 2, 2), {"causal": True, "causal_align": "top_left"}),
    "shift": ((1, 5, 6, 2, 1, 2, 2), {"causal": True, "shift": -2}),
    "shift-window-alibi": (
        (1, 5, 6, 2, 2, 2, 2),
        {"window_size": (1, 1), "shift": 3, "alibi_slopes": (2,), "causal_align": "top_left"},
    ),
    "top-left-tall": ((1, 6, 3, 1, 1, 2, 2), {"causal": True, "causal_align": "top_left"}),
    "window": ((1, 6, 6, 1, 1, 2, 2), {"window_size": (1, 2)}),
    "window-list": ((1, 6, 6, 1, 1, 2, 2), {"window_size": [2, 0]}),
    "window-left": ((1, 6, 4, 1, 1, 2, 2), {"window_size": (1, None)}),
    "window-right": ((1, 4, 6, 1, 1, 2, 2), {"window_size": (-1, 1)}),
    "window-0": ((1, 4, 6, 1, 1, 2, 2), {"window_size": (0, 0)}),
    "window-top-left": (
        (1, 4, 6, 1, 1, 2, 2),
        {"window_size": (1, 1), "causal_align": "top_left"},
    ),
    "window-tall": ((1, 7, 3, 1, 1, 2, 2), {"window_size": (0, 1)}),
    "window-causal": ((1, 6, 6, 1, 1, 2, 2), {"window_size": (2, 3), "causal": True}),
    "softcap": ((1, 4, 5, 2, 1, 3, 2), {"softcap": 0.7}),
    "alibi": ((2, 4, 6, 3, 3, 2, 2), {"alibi_slopes": (3,)}),
    "alibi-batch": ((2, 6, 4, 2, 1, 2, 2), {"alibi_slopes": (2, 2)}),
    "alibi-top-left": ((1, 6, 4, 2, 2, 2, 2), {"alibi_slopes": (2,), "causal_align": "top_left"}),
    "bhsd": ((2, 4, 5, 4, 2, 3, 2), {"layout": "bhsd", "causal": True}),
    "one": ((1, 1, 1, 1, 1, 1, 1), {}),
    "everything": (
        (2, 5, 7, 4, 2, 3, 2),
        {
            "softmax_scale": 0.8,
            "causal": True,
            "window_size": (3, 1),
            "softcap": 1.3,
            "alibi_slopes": (2, 4),
            "layout": "bhsd",
        },
    ),
}
each_case = pytest.mark.parametrize("shape, options", CASES.values(), ids=CASES)


def problem(shape, options, seed=0):
    """q, k, v, dout and the options with slopes in place of their shape."""
    batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal(s)
        for s in (
            (batch, seqlen_q, heads_q, head_dim),
            (batch, seqlen_k, heads_kv, head_dim),
            (batch, seqlen_k, heads_kv, head_dim_v),
            (batch, seqlen_q, heads_q, head_dim_v),
        )
    ]
    if options.get("layout") == "bhsd":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    if "alibi_slopes" in options:
        options = options | {"alibi_slopes": rng.uniform(0.1, 1, options["alibi_slopes"])}
    return arrays, options


def attend(q, keys, values, position, slope, options):
    """(out, lse) of one query, in Python floats. `position` is the key it stands at."""
    scale = options.get("softmax_scale")
    scale = 1 / math.sqrt(len(q)) if scale is None else scale
    left, right = options.get("window_size", (-1, -1))
    cap = options.get("softcap", 0)
    scored = []
    for j, (key, value) in enumerate(zip(keys, values, strict=True)):
        if options.get("causal") and j > position:
            continue
        if left not in (None, -1) and position - j > left:
            continue
        if right not in (None, -1) and j - position > right:
            continue
        score = scale * sum(a * b for a, b in zip(q, key, strict=True))
        if cap:
            score = cap * math.tanh(score / cap)
        scored.append((score - slope * abs(position - j), value))
    total = sum(math.exp(score) for score, _ in scored)
    out = [0.0] * len(values[0]) if len(values) else []
    for score, value in scored:
        out = [o + math.exp(score) / total * x for o, x in zip(out, value, strict=True)]
    return out, math.log(total) if scored else -math.inf


def by_loops(q, k, v, options):
    """Attention on 4-D arrays, one query at a time."""
    heads_first = options.get("layout") == "bhsd"
    if not heads_first:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    batch, heads, seqlen_q, _ = q.shape
    seqlen_k, group = k.shape[2], heads // k.shape[1]
    slopes = np.broadcast_to(options.get("alibi_slopes", 0.0), (batch, heads))
    shift = 0 if options.get("causal_align") == "top_left" else seqlen_k - seqlen_q
    shift += options.get("shift", 0)
    out, lse = np.zeros((batch, heads, seqlen_q, v.shape[3])), np.zeros((batch, heads, seqlen_q))
    for b, h, i in np.ndindex(batch, heads, seqlen_q):
        out[b, h, i], lse[b, h, i] = attend(
            q[b, h, i].tolist(),
            k[b, h // group].tolist(),
            v[b, h // group].tolist(),
            i + shift,
            float(slopes[b, h]),
            options,
        )
    return (out if heads_first else out.swapaxes(1, 2)), lse


# Forward


@each_case
def test_attention_is_the_definition_written_out(shape, options):
    (q, k, v, _), options = problem(shape, options)
    out, lse = reference.attention(q, k, v, **options)
    expected_out, expected_lse = by_loops(q, k, v, options)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected_out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-14)


def test_a_query_that_sees_no_key_gives_0_and_minus_infinity():
    (q, k, v, dout), options = problem((1, 6, 3, 2, 1, 2, 2), {"causal": True})
    out, lse = reference.attention(q, k, v, **options)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -np.inf).all()
    assert (out[:, 3:] != 0).all() and np.isfinite(lse[..., 3:]).all()
    dq, dk, dv = reference.attention_backward(dout, q, k, v, **options)
    assert (dq[:, :3] == 0).all()
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}], ids=str)
def test_without_keys_every_result_is_that_of_seeing_none(options):
    (q, k, v, dout), _ = problem((2, 3, 0, 2, 1, 4, 5), {})
    out, lse = reference.attention(q, k, v, **options)
    assert out.shape == (2, 3, 2, 5) and (out == 0).all()
    assert lse.shape == (2, 2, 3) and (lse == -np.inf).all()
    dq, dk, dv = reference.attention_backward(dout, q, k, v, **options)
    assert (dq == 0).all() and dq.shape == q.shape
    assert (dk.shape, dv.shape) == (k.shape, v.shape)


def test_without_queries_gradients_of_keys_and_values_are_0():
    (q, k, v, dout), _ = problem((2, 0, 3, 2, 1, 4, 5), {})
    out, lse = reference.attention(q, k, v)
    assert (out.shape, lse.shape) == ((2, 0, 2, 5), (2, 2, 0))
    dq, dk, dv = reference.attention_backward(dout, q, k, v)
    assert dq.shape == q.shape
    assert (dk == 0).all() and (dv == 0).all() and (dk.shape, dv.shape) == (k.shape, v.shape)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_absent_axes_are_axes_of_one(layout):
    (q, k, v, dout), options = problem((1, 4, 5, 2, 2, 3, 2), {"layout": layout})
    full, full_lse = reference.attention(q, k, v, **options)
    full_gradients = reference.attention_backward(dout, q, k, v, **options)
    out, lse = reference.attention(q[0], k[0], v[0], **options)
    assert (out == full[0]).all() and (lse == full_lse[0]).all()
    gradients = reference.attention_backward(dout[0], q[0], k[0], v[0], **options)
    for got, expected in zip(gradients, full_gradients, strict=True):
        assert (got == expected[0]).all()

    head = np.s_[0, :, 1] if layout == "bshd" else np.s_[0, 1]
    out, lse = reference.attention(q[head], k[head], v[head], **options)
    assert lse.shape == (4,)
    np.testing.assert_allclose(out, full[head], rtol=1e-14)
    np.testing.assert_allclose(lse, full_lse[0, 1], rtol=1e-14)
    gradients = reference.attention_backward(dout[head], q[head], k[head], v[head], **options)
    for got, expected in zip(gradients, full_gradients, strict=True):
        np.testing.assert_allclose(got, expected[head], rtol=1e-12, atol=1e-15)


def test_large_scores_do_not_overflow():
    (q, k, v, dout), _ = problem((1, 3, 4, 1, 1, 2, 2), {})
    out, lse = reference.attention(1e3 * q, 1e3 * k, v)
    scores = 1e6 * np.einsum("bihd,bjhd->bhij", q, k) * 2**-0.5
    assert np.isfinite(out).all()
    np.testing.assert_allclose(lse, scores.max(-1), rtol=1e-12)
    assert all(np.isfinite(x).all() for x in reference.attention_backward(dout, 1e3 * q, k, v))


# Masks


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (4, 4), (3, 7), (7, 3), (0, 3), (3, 0)])
def test_visible_is_the_definition_written_out(seqlen_q, seqlen_k):
    sides = (None, -1, 0, 1, 2, 9)
    for causal in (False, True):
        for align in ("bottom_right", "top_left"):
            for left in sides:
                for right in sides:
                    seen = reference.visible(seqlen_q, seqlen_k, causal, align, (left, right))
                    assert seen.shape == (seqlen_q, seqlen_k) and seen.dtype == bool
                    shift = seqlen_k - seqlen_q if align == "bottom_right" else 0
                    for i, j in np.ndindex(seen.shape):
                        distance = j - (i + shift)
                        allowed = not (causal and distance > 0)
                        allowed &= left in (None, -1) or -distance <= left
                        allowed &= right in (None, -1) or distance <= right
                        assert seen[i, j] == allowed


def test_bottom_right_means_that_the_last_query_sees_the_last_key():
    wide = reference.visible(2, 4, causal=True)
    assert wide.tolist() == [[True, True, True, False], [True, True, True, True]]
    tall = reference.visible(4, 2, causal=True)
    assert tall.tolist() == [[False, False], [False, False], [True, False], [True, True]]
    first = reference.visible(2, 4, causal=True, causal_align="top_left")
    assert first.tolist() == [[True, False, False, False], [True, True, False, False]]


# Gradients


@each_case
def test_gradients_are_those_of_central_differences(shape, options):
    (q, k, v, dout), options = problem(shape, options, seed=1)
    gradients = reference.attention_backward(dout, q, k, v, **options)
    step = 1e-5

    def loss():
        return float((reference.attention(q, k, v, **options)[0] * dout).sum())

    for array, gradient in zip((q, k, v), gradients, strict=True):
        assert gradient.shape == array.shape and gradient.dtype == np.float64
        differences = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + step
            above = loss()
            array[index] = value - step
            below = loss()
            array[index] = value
            differences[index] = (above - below) / (2 * step)
        scale = max(np.abs(differences).max(initial=0), 1e-3)
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-6 * scale)


# The naive computation, which sets the error budgets


def _errors(precision):
    (q, k, v, dout), _ = problem((2, 40, 50, 2, 1, 32, 32), {}, seed=2)
    # Numbers that all precisions hold exactly: only the computation rounds.
    q, k, v, dout = (x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (q, k, v, dout))
    exact = [*reference.attention(q, k, v), *reference.attention_backward(dout, q, k, v)]
    naive = [
        *reference.naive(q, k, v, precision=precision),
        *reference.naive_backward(dout, q, k, v, precision=precision),
    ]
    return naive, [
        np.abs(a - b).max() / np.abs(b).max() for a, b in zip(naive, exact, strict=True)
    ]


@pytest.mark.parametrize(
    "precision, epsilon", [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 2**-24)]
)
def test_naive_errs_by_a_few_roundings_of_its_precision(precision, epsilon):
    naive, errors = _errors(precision)
    dtype = np.dtype(getattr(ml_dtypes, precision, None) or precision)
    for index, (array, error) in enumerate(zip(naive, errors, strict=True)):
        is_lse = index == 1
        assert array.dtype == (np.float32 if is_lse else dtype)
        assert epsilon / 64 < error < 64 * epsilon


def test_naive_in_float64_is_the_reference():
    assert _errors("float64")[1] == [0.0] * 5


def test_naive_rounds_its_inputs_first():
    q = np.full((1, 1), 1 + 2.0**-9)  # between two bfloat16 numbers
    k, v = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    rounded = q.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert rounded != q
    got = reference.naive(q, k, v, precision="bfloat16")[0]
    assert (got == reference.naive(rounded, k, v, precision="bfloat16")[0]).all()


def test_naive_rounds_the_scores():
    # The scores are 4096 and 4097, which is no float16 number: rounded, the two are equal.
    v = np.array([[0.0], [1.0]])
    q, k = np.array([[64.0, 1.0]]), np.array([[64.0, 0.0], [64.0, 1.0]])
    assert reference.naive(q, k, v, precision="float16", softmax_scale=1.0)[0] == 0.5
    exact = reference.attention(q, k, v, softmax_scale=1.0)[0]
    np.testing.assert_allclose(exact, 1 / (1 + math.exp(-1)))


def test_naive_ignores_no_option():
    for name, (shape, options) in CASES.items():
        (q, k, v, dout), options = problem(shape, options, seed=3)
        exact = reference.attention(q, k, v, **options)
        close = reference.naive(q, k, v, precision="float32", **options)
        for a, b in zip(close, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
        exact = reference.attention_backward(dout, q, k, v, **options)
        close = reference.naive_backward(dout, q, k, v, precision="float32", **options)
        for a, b in zip(close, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
