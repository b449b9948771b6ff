"""Arrays of the public functions: layouts, strides, empties, and nothing written beside a result.

Whether the numbers are right for every dtype, mask and size is `test_attention`'s business; here
each call is compared with the reference to see that it read and wrote where it should.
"""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.simulator import SEED
from tests.support.api_calls import DV, HKV, NAN, SK, SQ, B, D, H, arrays, assert_close


def assert_right(q, k, v, **options):
    """Compare a forward and a backward call with the reference."""
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    exact_out, exact_lse = reference.attention(q, k, v, **options)
    assert_close(out, exact_out, q.dtype)
    assert_close(lse, exact_lse, q.dtype)
    assert (out.dtype, lse.dtype) == (q.dtype, np.float32)
    gradients = numflash.attention_backward(out, q, k, v, out, lse, **options)
    exact = reference.attention_backward(out, q, k, v, **options)
    for gradient, array, expected in zip(gradients, (q, k, v), exact, strict=True):
        assert gradient.dtype == array.dtype and gradient.flags.c_contiguous
        assert_close(gradient, expected, q.dtype)


def test_simulating_says_where_kernels_run():
    assert numflash.simulating() is True


# Layouts and ranks


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_arrays_of_4_3_and_2_dimensions(rng, dtype, layout):
    q, k, v = arrays(rng, 2, layout, dtype)
    assert_right(q, k, v, layout=layout, causal=True)
    assert_right(q[1], k[1], v[1], layout=layout)
    head = np.s_[0, :, 0] if layout == "bshd" else np.s_[0, 0]
    assert_right(q[head], k[head], v[head], layout=layout)


def test_lse_has_the_axes_of_q_with_heads_before_rows(rng):
    q, k, v = arrays(rng, 2)
    for index, shape in (((), (2, H, SQ)), ((0,), (H, SQ)), (np.s_[0, :, 0], (SQ,))):
        result = numflash.attention(q[index], k[index], v[index], return_lse=True)
        assert isinstance(result, tuple) and result[1].shape == shape
    assert isinstance(numflash.attention(q, k, v), np.ndarray)


# Strides


STRIDED = {
    "negative": lambda x: np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3),
    "every-other-column": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "last-axis-reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "last-axis-first": lambda x: np.ascontiguousarray(x.transpose(3, 0, 1, 2)).transpose(
        1, 2, 3, 0
    ),
    "unaligned": lambda x: np.concatenate([x.ravel()[:1], x.ravel()])[1:].reshape(x.shape),
}


def _amid_nan(x):
    """A view of the same values with NaN before, after and between its rows."""
    shape = (x.shape[0] + 1, 2 * x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 7)
    whole = np.full(shape, NAN, x.dtype)
    view = whole[1:, 1::2, 1:-1, 3:-4]
    view[...] = x
    return view


@pytest.mark.parametrize("stride", [*STRIDED.values(), _amid_nan], ids=[*STRIDED, "amid-nan"])
def test_strides_are_honoured(rng, dtype, stride):
    q, k, v = arrays(rng, 2, dtype=dtype)
    strided = [stride(x) for x in (q, k, v)]
    for x, original in zip(strided, (q, k, v), strict=True):
        assert (x == original).all()
    assert_right(*strided, causal=True)


def test_broadcast_inputs_are_read_in_place(rng, dtype):
    q, k, v = arrays(rng, 2, dtype=dtype)
    k, v = (np.broadcast_to(x[:1, :, :1], (2, SK, H, D)) for x in (k, v))
    assert 0 in k.strides
    assert_right(q, k, v)


def test_slopes_may_have_strides(rng, dtype):
    q, k, v = arrays(rng, 2, dtype=dtype)
    slopes = np.array([0.5, NAN, 0.25, NAN], np.float32)[::2]
    assert_right(q[:1], k[:1], v[:1], alibi_slopes=slopes)
    per_batch = np.array([[0.5, 0.25], [NAN, NAN], [0.125, 1.0]], np.float32)[::2, ::-1]
    assert_right(q, k, v, alibi_slopes=per_batch)
    broadcast = np.broadcast_to(np.float32(0.5), (1, H))
    assert_right(q[:1], k[:1], v[:1], alibi_slopes=broadcast)


def test_gradients_and_results_may_be_strided_in_backward(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    dout = rng.standard_normal(out.shape).astype(dtype)
    expected = numflash.attention_backward(dout, q, k, v, out, lse)
    for stride in (_amid_nan, STRIDED["last-axis-reversed"]):
        got = numflash.attention_backward(stride(dout), q, k, v, stride(out), lse)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, dtype)


# What is written


def test_results_are_written_to_the_last_row_and_column(rng, dtype):
    shape = (1, 23, 1, 29)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    assert_right(q, k, v)


@pytest.mark.parametrize("head_dim_v", [24, 27], ids=["vectors", "elements"])
def test_out_is_written_and_nothing_beside_it(rng, dtype, head_dim_v):
    q, k, v = arrays(rng, dtype=dtype)
    v = v[..., :head_dim_v]
    whole = np.full((B + 1, SQ + 5, H + 2, head_dim_v + 16), dtype(7))
    out = whole[1:, 2:-3, 1:-1, 8:-8]
    result = numflash.attention(q, k, v, out=out)
    assert result is out
    assert_close(out, reference.attention(q, k, v)[0], dtype)
    out[...] = 7
    assert (whole == 7).all()


def test_out_may_be_interleaved_with_the_inputs(rng, dtype):
    packed = rng.standard_normal((B, SQ, 4, H, D)).astype(dtype)
    inputs = packed[:, :, :3].copy()
    q, k, v, out = (packed[:, :, i] for i in range(4))
    out.fill(NAN)
    numflash.attention(q, k, v, out=out)
    assert (packed[:, :, :3] == inputs).all()
    assert_close(out, reference.attention(q, k, v)[0], dtype)


def test_out_of_another_call_is_not_found(rng):
    q, k, v = arrays(rng)
    first, second = np.empty_like(q), np.empty_like(q)
    assert numflash.attention(q, k, v, out=first) is first
    assert numflash.attention(q, k, v, out=second) is second
    assert (first == second).all()


def test_inputs_are_left_alone(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    before = [x.copy() for x in (q, k, v)]
    out, lse = numflash.attention(q, k, v, return_lse=True)
    kept = out.copy(), lse.copy()
    numflash.attention_backward(out, q, k, v, out, lse)
    assert all((a == b).all() for a, b in zip((q, k, v), before, strict=True))
    assert (out == kept[0]).all() and (lse == kept[1]).all()


def test_read_only_inputs_are_read(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    for x in (q, k, v):
        x.flags.writeable = False
    assert_right(q, k, v)


# Empties


@pytest.mark.parametrize("causal", [False, True])
def test_empty_batches_give_empty_results(causal):
    q, k = np.zeros((0, SQ, H, D), np.float32), np.zeros((0, SK, HKV, D), np.float32)
    out, lse = numflash.attention(q, k, k, causal=causal, return_lse=True)
    assert (out.shape, lse.shape) == ((0, SQ, H, D), (0, H, SQ))
    gradients = numflash.attention_backward(out, q, k, k, out, lse, causal=causal)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("causal", [False, True])
def test_without_queries_results_are_empty_and_gradients_0(rng, dtype, causal):
    q, k, v = arrays(rng, dtype=dtype)
    q = q[:, :0]
    out, lse = numflash.attention(q, k, v, causal=causal, return_lse=True)
    assert (out.shape, lse.shape) == ((B, 0, H, DV), (B, H, 0))
    dq, dk, dv = numflash.attention_backward(out, q, k, v, out, lse, causal=causal)
    assert dq.shape == q.shape
    assert (dk.shape, dv.shape) == (k.shape, v.shape)
    assert (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 3)}], ids=str)
def test_without_keys_results_are_0_and_lse_is_minus_infinity(rng, dtype, options):
    q, k, v = arrays(rng, dtype=dtype)
    k, v = k[:, :0], v[:, :0]
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    assert out.shape == (B, SQ, H, DV) and (out == 0).all()
    assert lse.shape == (B, H, SQ) and (lse == -np.inf).all()
    dq, dk, dv = numflash.attention_backward(out, q, k, v, out, lse, **options)
    assert dq.shape == q.shape and (dq == 0).all()
    assert (dk.shape, dv.shape) == (k.shape, v.shape)


def test_out_may_be_empty():
    q, k = np.zeros((B, 0, H, D), np.float32), np.zeros((B, SK, H, D), np.float32)
    out = np.zeros((B, 0, H, D), np.float32)
    assert numflash.attention(q, k, k, out=out) is out


# Order


def test_the_order_of_threads_does_not_change_a_bit(rng, monkeypatch):
    q, k, v = arrays(rng, dtype=np.float16)
    results = []
    for seed in (1, 2):
        monkeypatch.setattr(SEED, "value", seed)
        out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
        gradients = numflash.attention_backward(out, q, k, v, out, lse, causal=True)
        results.append([x.tobytes() for x in (out, lse, *gradients)])
    assert results[0] == results[1]
