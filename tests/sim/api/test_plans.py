"""Streams, plans, warmup, forced configs and splits of the public functions."""

import types

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import backward, quantization, ready
from numflash.calls import forward as calls
from numflash.calls import fp8_forward as fp8_calls
from numflash.configs import parse_config
from tests.support.api_calls import (
    DV,
    NAN,
    PORTABLE,
    SK,
    SQ,
    TENSOR_CORES,
    B,
    D,
    H,
    arrays,
    assert_close,
)
from tests.support.covering import some

# Streams, plans, warmup


@pytest.mark.parametrize(
    "stream", [0, 7, types.SimpleNamespace(ptr=7), types.SimpleNamespace(cuda_stream=0)], ids=str
)
def test_streams_are_accepted(rng, stream):
    q, k, v = arrays(rng)
    expected = numflash.attention(q, k, v, return_lse=True)
    got = numflash.attention(q, k, v, return_lse=True, stream=stream)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    assert (numflash.plan(q, k, v, stream=stream).launch(stream) == expected[0]).all()


def test_backward_accepts_a_stream(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    expected = numflash.attention_backward(out, q, k, v, out, lse)
    got = numflash.attention_backward(out, q, k, v, out, lse, stream=7)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))


def test_a_plan_reads_the_arrays_as_they_are_at_each_launch(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    plan = numflash.plan(q, k, v, causal=True, window_size=(3, None))
    options = {"causal": True, "window_size": (3, None)}
    for _ in range(2):
        out = plan.launch()
        assert out is plan.out
        exact_out, exact_lse = reference.attention(q, k, v, **options)
        assert_close(out, exact_out, dtype)
        assert_close(plan.lse, exact_lse, dtype)
        for x in (q, k, v):
            x[...] = rng.standard_normal(x.shape)


def test_a_plan_writes_to_the_out_it_is_given(rng):
    q, k, v = arrays(rng)
    out = np.full((B, SQ, H, DV), NAN)
    plan = numflash.plan(q, k, v, out=out)
    assert np.isnan(out).all()
    assert plan.launch() is out is plan.out
    assert (out == numflash.attention(q, k, v)).all()


def test_a_plan_names_its_kernel(rng):
    q, k, v = arrays(rng)
    plan = numflash.plan(q, k, v)
    assert plan.kernel == f"forward {PORTABLE['forward']} float32-d32-dv32-vec"
    assert "empty" in numflash.plan(q[:, :0], k, v).kernel


def test_a_plan_of_an_empty_problem_launches_nothing():
    q, k = np.zeros((0, SQ, H, D), np.float32), np.zeros((0, SK, H, D), np.float32)
    assert numflash.plan(q, k, k).launch().shape == q.shape


def test_a_plan_with_dout_has_the_gradients_of_what_is_there_at_each_launch(rng, dtype):
    q, k, v = arrays(rng, dtype=dtype)
    dout = rng.standard_normal((B, SQ, H, DV)).astype(dtype)
    bias = rng.standard_normal((1, 1, 1, SK)).astype(dtype)
    dlse = rng.standard_normal((B, H, SQ)).astype(np.float32)
    options = {"causal": True, "bias": bias}
    asked = {"dlse": dlse, "wrt": ("bias", "q", "v"), "grad_dtype": "float32"}
    plan = numflash.plan(q, k, v, dout=dout, out_dtype="float32", **options, **asked)
    for _ in range(2):
        out = plan.launch()
        got = plan.launch_backward()
        assert got is plan.gradients
        expected = numflash.attention_backward(dout, q, k, v, out, plan.lse, **options, **asked)
        assert all((a == b).all() for a, b in zip(got, expected, strict=True))
        exact = reference.attention_backward(dout, q, k, v, **options, **asked)
        assert_close(got[1], exact[1], dtype)
        for x in (q, k, v, dout, bias, dlse):
            x[...] = rng.standard_normal(x.shape)


def test_a_plan_reads_the_delta_of_the_caller_instead_of_out(rng):
    q, k, v = arrays(rng)
    dout = rng.standard_normal((B, SQ, H, DV)).astype(np.float32)
    delta = np.zeros((B, H, SQ), np.float32)
    plan = numflash.plan(q, k, v, dout=dout, delta=delta, wrt=("q",))
    out = plan.launch()
    delta[...] = (dout * out).sum(-1).swapaxes(1, 2)
    (dq,) = plan.launch_backward()
    assert_close(dq, reference.attention_backward(dout, q, k, v)[0])


def test_a_plan_without_dout_has_no_gradients(rng):
    q, k, v = arrays(rng)
    plan = numflash.plan(q, k, v)
    assert plan.gradients is None
    with pytest.raises(ValueError, match="launch_backward needs a plan with dout"):
        plan.launch_backward()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_warmup_passes_where_there_is_nothing_to_compile(dtype):
    assert numflash.warmup(dtype, 80, 128, softcap=True, alibi=True, backward=True) is None
    assert ready._ready == {}
    assert dtype == "float32" or numflash.warmup(dtype, precision="fp8") is None
    assert numflash.warmup(dtype, varlen=True, batch_invariant=True) is None


@pytest.mark.parametrize("precision", ["fp8", "auto"])
def test_warmup_for_8_bit_floats_makes_what_calls_need(rng, precision, monkeypatch):
    made, launcher = set(), calls.Launcher

    def noted(config, *arguments):
        made.add(f"{config.family} {config} {arguments[0]}")
        return launcher(config, *arguments)

    for module in (calls, fp8_calls, quantization):
        monkeypatch.setattr(module, "Launcher", noted)
    options = {"precision": precision, "fp8": numflash.Fp8Recipe("head", seed=2)}
    q, k, v = arrays(rng, dtype=np.float16)
    slopes = np.ones(H, np.float32)
    numflash.plan(q, k, v, softcap=5.0, alibi_slopes=slopes, **options)
    needed = set(made)
    assert {kernel.split()[0] for kernel in needed} >= {"quantize", "amax", "forward"}
    made.clear()
    sizes = {"head_dim": D, "seqlen_q": SQ, "seqlen_k": SK}
    numflash.warmup("float16", **sizes, softcap=True, alibi=True, **options)
    assert made == needed
    with pytest.raises(numflash.UnsupportedError, match="no backward on 8-bit floats"):
        numflash.warmup("float16", backward=True, **options)
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16"):
        numflash.warmup("float32", **options)
    with pytest.raises(TypeError, match="fp8 must be an Fp8Recipe"):
        numflash.warmup("float16", precision=precision, fp8=8)


# Configs, precision, splits


@pytest.mark.parametrize("config", ["m16n16w2", "sm80-m32n16w1s3", "sm75-m16n16w1s1"])
def test_the_config_that_is_asked_for_runs(rng, config):
    q, k, v = arrays(rng, dtype=np.float16)
    plan = numflash.plan(q, k, v, config=config)
    assert plan.kernel == f"forward {config} float16-d32-dv32-vec"
    assert_close(plan.launch(), reference.attention(q, k, v)[0], q.dtype)
    parsed = parse_config("forward", config)
    assert numflash.plan(q, k, v, config=parsed).kernel == plan.kernel
    assert (numflash.attention(q, k, v, config=parsed) == plan.out).all()
    default = numflash.plan(q, k, v).kernel
    assert default == f"forward {TENSOR_CORES['forward']} float16-d32-dv32-vec"


def test_the_backward_runs_the_configs_that_are_asked_for(rng, monkeypatch):
    made = []
    launcher = calls.Launcher

    def noted(config, *arguments):
        made.append(str(config))
        return launcher(config, *arguments)

    monkeypatch.setattr(backward, "Launcher", noted)
    q, k, v = arrays(rng, dtype=np.float16)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    exact = reference.attention_backward(out, q, k, v)
    dkdv, dq = TENSOR_CORES["backward-dkdv"], TENSOR_CORES["backward-dq"]
    for config, expected in (
        (None, [dkdv, dq]),
        ({}, [dkdv, dq]),
        ({"backward-dq": "m16n16w2"}, [dkdv, "m16n16w2"]),
        ({"backward-dkdv": "m16n16w2"}, ["m16n16w2", dq]),
        (
            {"backward-dq": "sm75-m16n16w1s1", "backward-dkdv": "sm80-m16n32w1s1"},
            ["sm80-m16n32w1s1", "sm75-m16n16w1s1"],
        ),
    ):
        made.clear()
        got = numflash.attention_backward(out, q, k, v, out, lse, config=config)
        assert made == ["w1", *expected]
        for gradient, right in zip(got, exact, strict=True):
            assert_close(gradient, right, q.dtype)


def test_tf32_is_less_exact_than_float32_and_not_wrong(rng):
    q, k, v = arrays(rng)
    exact = reference.attention(q, k, v)[0]
    forced = "sm80-m16n16w1s2"
    errors = {}
    for precision, config in ((None, None), ("tf32", None), ("tf32", forced)):
        out = numflash.attention(q, k, v, precision=precision, config=config)
        errors[precision, config] = float(abs(out - exact).max())
    # The portable kernels multiply exactly, asked for tf32 or not.
    assert errors[None, None] == errors["tf32", None] < 1e-5
    assert 1e-5 < errors["tf32", forced] < 5e-3


WINDOW = {"window_size": (2, 0)}
SPLITS = [(2, {"causal": True}), (3, WINDOW), (5, {}), (5, WINDOW)]


@pytest.mark.parametrize(("num_splits", "options"), some(SPLITS, every=6), ids=str)
def test_splits_over_the_keys_give_the_whole(rng, num_splits, options):
    # Three blocks of keys: with 5 splits two are left with nothing.
    q = rng.standard_normal((1, SQ, 4, D)).astype(np.float16)
    k, v = (rng.standard_normal((1, 41, 2, n)).astype(np.float16) for n in (D, DV))
    kernel = f"sm80-m16n16w1s2x{num_splits}"
    config = {"forward": kernel, "combine": "w2"}
    out, lse = numflash.attention(q, k, v, return_lse=True, config=config, **options)
    exact_out, exact_lse = reference.attention(q, k, v, **options)
    assert_close(out, exact_out, q.dtype)
    assert_close(lse, exact_lse, q.dtype)
    plan = numflash.plan(q, k, v, config=config, **options)
    assert plan.kernel == f"forward {kernel} float16-d32-dv32-vec"
    for _ in range(2):
        assert (plan.launch() == out).all() and (plan.lse == lse).all()
        plan.out[...], plan.lse[...] = np.nan, np.nan


def test_splits_write_where_they_are_told_and_nothing_beside_it(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    whole = np.full((B, SQ + 2, H + 2, DV + 16), np.float16(7))
    out = whole[:, 1:-1, 1:-1, 8:-8]
    slopes = np.array([0.5, 0.25], np.float32)
    for options in ({}, {"alibi_slopes": slopes}, {"softcap": 5.0}):
        result = numflash.attention(q, k, v, out=out, config="sm80-m16n16w1s1x2", **options)
        assert result is out
        assert_close(out, reference.attention(q, k, v, **options)[0], q.dtype)
        out[...] = 7
        assert (whole == 7).all()


def test_splits_of_queries_without_keys_give_0_and_minus_infinity(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    q = np.concatenate([q] * 4, axis=1)
    options = {"causal": True, "config": "sm80-m16n16w1s1x2"}
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    unseen = q.shape[1] - SK
    assert (out[:, :unseen] == 0).all() and (lse[:, :, :unseen] == -np.inf).all()
    assert_close(out, reference.attention(q, k, v, causal=True)[0], q.dtype)
    out, lse = numflash.attention(q, k[:, :0], v[:, :0], return_lse=True, **options)
    assert (out == 0).all() and (lse == -np.inf).all()
