"""The public functions end to end in the simulator: shapes, strides, empties, plans, streams.

Whether the numbers are right for every dtype, mask and size is `test_attention`'s business; here
each call is compared with the reference to see that it read and wrote where it should.
"""

import types

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.api import attention as api
from numflash.api import plans
from numflash.calls import backward, quantization, ready
from numflash.calls import forward as calls
from numflash.calls import fp8_forward as fp8_calls
from numflash.configs import parse_config
from numflash.configs.formats import NAN_CODE
from numflash.runtime.arrays import _NumPy
from numflash.selection import choice as selection
from numflash.selection import rules as dispatch
from numflash.selection.rules import Choice
from numflash.simulator import SEED

# A ragged tile of queries, two of keys.
PORTABLE = {
    "forward": "m8n8w1",
    "backward-dq": "m8n8w1",
    "backward-dkdv": "m8n8w1",
    "delta": "w1",
    "combine": "w2",
}
# A ragged tile of each; of rows of packed heads, too.
TENSOR_CORES = {
    "forward": "sm80-m16n16w1s1",
    "backward-dq": "sm80-m16n16w1s2",
    "backward-dkdv": "sm80-m16n16w1s2",
}
FP8_CONFIG = "fp8-sm80-m16n32w1s1"
B, SQ, SK, H, HKV, D, DV = 1, 5, 11, 2, 1, 32, 32
NAN = np.float32(np.nan)


def choose_small(family, traits, limits, rows=None, positive_scale=True, no_bulk_copies=None):
    """float16 on the tensor cores, float32 on the portable kernels."""
    if traits.fp8:
        return Choice(family, parse_config(family, FP8_CONFIG), traits, "small", ())
    on_tensor_cores = traits.dtype == "float16" and family in TENSOR_CORES
    config = parse_config(family, (TENSOR_CORES if on_tensor_cores else PORTABLE)[family])
    return Choice(family, config, traits, "small", ())


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_results(monkeypatch):
    """Small tiles; and NaN wherever a kernel leaves a result out."""
    for module in (plans, dispatch, selection):
        monkeypatch.setattr(module, "choose", choose_small)
    monkeypatch.setattr(ready, "_ready", {})
    empty = _NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.fill({"uint8": NAN_CODE, "int32": -7}.get(dtype, np.nan))
        return array

    monkeypatch.setattr(_NumPy, "empty", poisoned)


@pytest.fixture(params=[np.float32, np.float16], ids=["portable", "tensor-cores"])
def dtype(request):
    """The dtype that each implementation's kernels get here."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)


def arrays(rng, batch=B, layout="bshd", dtype=np.float32):
    """q, k, v of the sizes above."""
    q = rng.standard_normal((batch, SQ, H, D)).astype(dtype)
    k = rng.standard_normal((batch, SK, HKV, D)).astype(dtype)
    v = rng.standard_normal((batch, SK, HKV, DV)).astype(dtype)
    if layout == "bhsd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    return q, k, v


def assert_close(got, expected, dtype=np.float32):
    """Equal up to the roundings; a value left out, or read from beside, is far off."""
    assert got.shape == expected.shape
    relative, absolute = (1e-4, 1e-5) if dtype == np.float32 else (1e-2, 1e-2)
    np.testing.assert_allclose(got, expected, rtol=relative, atol=absolute)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_warmup_passes_where_there_is_nothing_to_compile(dtype):
    assert numflash.warmup(dtype, 80, 128, softcap=True, alibi=True, backward=True) is None
    assert ready._ready == {}
    assert dtype == "float32" or numflash.warmup(dtype, precision="fp8") is None


@pytest.mark.parametrize("precision", ["fp8", "auto"])
def test_warmup_for_8_bit_floats_makes_what_calls_need(rng, precision, monkeypatch):
    made, launcher = set(), calls.Launcher

    def noted(config, *arguments):
        made.add(f"{config.family} {config} {arguments[0]}")
        return launcher(config, *arguments)

    for module in (calls, fp8_calls, quantization):
        monkeypatch.setattr(module, "Launcher", noted)
    monkeypatch.setattr(plans, "SIMULATED", False)
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


@pytest.mark.parametrize("num_splits", [2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)}], ids=str)
def test_splits_over_the_keys_give_the_whole(rng, num_splits, options):
    # Three blocks of keys: with 5 splits two are left with nothing.
    q = rng.standard_normal((2, SQ, 4, D)).astype(np.float16)
    k, v = (rng.standard_normal((2, 41, 2, n)).astype(np.float16) for n in (D, DV))
    config = f"sm80-m16n16w1s2x{num_splits}"
    out, lse = numflash.attention(q, k, v, return_lse=True, config=config, **options)
    exact_out, exact_lse = reference.attention(q, k, v, **options)
    assert_close(out, exact_out, q.dtype)
    assert_close(lse, exact_lse, q.dtype)
    plan = numflash.plan(q, k, v, config=config, **options)
    assert plan.kernel == f"forward {config} float16-d32-dv32-vec"
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


def test_what_is_explained_is_what_runs(rng, monkeypatch):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, causal=True)
    choice = explanation.forward
    plan = numflash.plan(q, k, v, causal=True)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert str(choice.config) == TENSOR_CORES["forward"]
    assert explanation.geometry.pack == H // HKV
    for family, choice in explanation.backward.items():
        assert str(choice.config) == TENSOR_CORES[family]


def fp8_arrays(rng):
    """Three `Fp8Array`s as attention takes them."""
    q, k, v = arrays(rng, dtype=np.float16)
    rotated = (numflash.quantize_fp8(x, block=16, hadamard=True) for x in (q, k))
    return *rotated, numflash.quantize_fp8(v, block=16, transposed=True)


def codes_with_scales(rng):
    """e4m3 codes of 4 and 2 heads with a scale per head of k, and the scales as options."""
    codes, options = [], {}
    for name, seqlen, heads in (("q", SQ, 4), ("k", SK, 2), ("v", SK, 2)):
        x = rng.standard_normal((B, seqlen, heads, D)).astype(np.float16)
        x[:, :, heads // 2 :] *= 4
        share = x.reshape(B, seqlen, 2, -1)
        share_codes, descale = reference.quantize_fp8(share, "head")
        options[f"{name}_descale"] = np.ascontiguousarray(descale[..., 0])
        codes.append(share_codes[..., : share.shape[-1]].reshape(x.shape).copy())
    return codes, options


def test_what_is_explained_on_8_bit_floats_is_what_runs(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, precision="fp8", config=FP8_CONFIG)
    choice, plan = explanation.forward, numflash.plan(q, k, v, precision="fp8", config=FP8_CONFIG)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert str(choice.config) == FP8_CONFIG and choice.traits.fp8
    assert explanation.geometry.pack == H // HKV
    assert (explanation.combine, explanation.backward) == (None, {})
    text = str(explanation)
    assert "no backward on 8-bit floats" in text and "multiplied as float16" in text
    # Blocks of 16 keys share a scale, tiles have 32.
    quantized = fp8_arrays(rng)
    choice = numflash.explain_dispatch(*quantized, config={"forward": FP8_CONFIG}).forward
    assert choice.traits.key_scales
    plan = numflash.plan(*quantized, config=FP8_CONFIG)
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    codes, scales = codes_with_scales(rng)
    assert not numflash.explain_dispatch(*codes, **scales).forward.traits.key_scales


def test_both_kernels_of_a_chosen_precision_are_explained(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    explanation = numflash.explain_dispatch(q, k, v, precision="auto", max_rel_error=0.2)
    plan = numflash.plan(q, k, v, precision="auto", max_rel_error=0.2)
    choice, other = explanation.forward, explanation.in_16_bits
    assert plan.kernel == f"forward {choice.config} {choice.traits}"
    assert (choice.traits.fp8, other.traits.fp8) == (True, False)
    assert choice.traits.selected and other.traits.selected
    assert str(other.config) == TENSOR_CORES["forward"] and str(other) in str(explanation)
    with pytest.raises(ValueError, match="max_rel_error"):
        numflash.explain_dispatch(q, k, v, precision="auto", max_rel_error=-1)


def test_splits_on_8_bit_floats_are_explained(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    options = {"precision": "fp8", "config": f"{FP8_CONFIG}x2"}
    explanation = numflash.explain_dispatch(q, k, v, **options)
    assert explanation.geometry.num_splits == 2
    assert explanation.combine.family == "combine" and not explanation.combine.traits.fp8
    assert "split over 2 blocks" in str(explanation)


def test_what_is_asked_about_8_bit_floats_is_checked(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    with pytest.raises(ValueError, match='precision="fp8"'):
        numflash.explain_dispatch(q, k, v, fp8=numflash.Fp8Recipe())
    with pytest.raises(ValueError, match="backward-dq"):
        numflash.explain_dispatch(q, k, v, precision="fp8", config={"backward-dq": "m16n16w2"})
    codes, scales = codes_with_scales(rng)
    with pytest.raises(ValueError, match="v_descale must have"):
        numflash.explain_dispatch(*codes, **scales | {"v_descale": np.ones((B, 7), np.float32)})
    assert numflash.explain_dispatch(q[:, :0], k, v, precision="fp8").forward.traits.fp8


def test_calls_on_8_bit_floats_are_neither_captured_nor_tuned(rng, monkeypatch):
    noted = []
    monkeypatch.setattr(selection.capture, "note", noted.append)
    monkeypatch.setattr(selection.autotune, "tune", lambda *args: noted.append(args))
    monkeypatch.setattr(selection.tuned, "find", lambda *args: noted.append(args))
    monkeypatch.setattr(selection.tuned, "enabled", lambda: True)
    q, k, v = arrays(rng, dtype=np.float16)
    for config in (None, FP8_CONFIG, f"{FP8_CONFIG}x2"):
        numflash.plan(q, k, v, precision="fp8", config=config)
        numflash.explain_dispatch(q, k, v, precision="fp8", config=config)
    assert noted == []


# check


@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "token"])
def test_check_on_8_bit_floats(rng, granularity):
    q, k, v = arrays(rng, dtype=np.float16)
    recipe = numflash.Fp8Recipe(granularity, 16, granularity != "head", 3)
    report = numflash.check(q, k, v, precision="fp8", fp8=recipe, config=FP8_CONFIG)
    assert report.passed, f"\n{report}"
    exact = reference.attention(q, k, v)
    tile = {"tile_n": 32}
    options = {"granularity": granularity, "block": 16, "hadamard": recipe.hadamard, "seed": 3}
    specified = reference.attention_fp8(q, k, v, **options, **tile)
    for error, right, wanted in zip(report.errors, exact, specified, strict=True):
        assert error.naive_error == abs(wanted - right).max() > 1e-3


def test_check_takes_8_bit_arrays_and_codes(rng):
    q, _, _ = arrays(rng, dtype=np.float16)
    quantized = fp8_arrays(rng)
    codes, scales = codes_with_scales(rng)
    for given, options in ((quantized, {}), ((q, *quantized[1:]), {}), (codes, scales)):
        report = numflash.check(*given, config=FP8_CONFIG, causal=True, softcap=5.0, **options)
        assert report.passed, f"\n{report}"
        # Of right codes: wrong ones would be far off, and allow as much.
        assert report.errors[0].naive_error < 0.15, f"\n{report}"
        # Against what the codes stand for: q's rounding counts where q comes with 16 bits.
        rounded = given[0] is q
        assert (report.errors[1].error > 1e-3) is rounded


def test_check_on_8_bit_floats_takes_layouts_and_fewer_axes(rng):
    q, k, v = arrays(rng, layout="bhsd", dtype=np.float16)
    options = {"precision": "fp8", "config": FP8_CONFIG, "stream": 0}
    slopes = np.array([0.5, 0.25], np.float32)
    assert numflash.check(q, k, v, layout="bhsd", alibi_slopes=slopes, **options).passed
    assert numflash.check(q[0], k[0], v[0], layout="bhsd", **options).passed
    assert numflash.check(q[0, 0], k[0, 0], v[0, 0], **options).passed


def test_check_takes_a_chosen_precision(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    for budget in (1e-3, 1.0):
        report = numflash.check(q, k, v, precision="auto", max_rel_error=budget)
        assert report.passed, f"\n{report}"
        assert (report.errors[0].error > 5e-3) is (budget == 1.0)


def test_check_finds_what_is_wrong_on_8_bit_floats(rng, monkeypatch):
    attention = api.attention

    def wrong(*args, **options):
        out, lse = attention(*args, **options)
        out[0, 2, 0, 3] += 1
        return out, lse

    monkeypatch.setattr(api, "attention", wrong)
    report = numflash.check(*arrays(rng, dtype=np.float16), precision="fp8", config=FP8_CONFIG)
    assert [error.passed for error in report.errors] == [False, True]


def test_check_refuses_gradients_on_8_bit_floats(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    for options in ({"precision": "fp8"}, codes_with_scales(rng)[1]):
        with pytest.raises(numflash.UnsupportedError, match="no backward on 8-bit floats"):
            numflash.check(q, k, v, dout=q, **options)


def test_check_reports_every_error_and_its_budget(rng):
    q, k, v = arrays(rng)
    report = numflash.check(q, k, v, causal=True)
    assert isinstance(report, numflash.CheckReport) and report.passed
    assert [error.name for error in report.errors] == ["out", "lse"]
    for error in report.errors:
        assert 0 < error.error <= error.budget and error.naive_error > 0
    header, *lines = str(report).splitlines()
    assert header.split() == ["error", "naive", "budget"]
    assert [line.split()[0] for line in lines] == ["out", "lse"]
    assert all(line.endswith("  ok") for line in lines)


def test_check_takes_every_option_of_attention(rng):
    q, k, v = arrays(rng, layout="bhsd")
    out = np.full((B, H, SQ, DV), NAN)
    report = numflash.check(
        q,
        k,
        v,
        dout=rng.standard_normal(out.shape).astype(np.float32),
        softmax_scale=0.2,
        causal=True,
        causal_align="top_left",
        window_size=(30, -1),
        softcap=5.0,
        alibi_slopes=np.array([0.5, 0.25], np.float32),
        layout="bhsd",
        out=out,
        stream=0,
        return_lse=True,
    )
    assert report.passed, f"\n{report}"
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert not np.isnan(out).any()


@pytest.mark.parametrize(
    ("dtype", "precision", "config"),
    [
        (np.float16, None, None),
        (np.float16, None, "sm80-m16n16w1s1x2"),
        (np.float16, None, {"forward": "m16n16w2", "backward-dq": "sm75-m16n16w1s1"}),
        (np.float32, "tf32", {"backward-dkdv": "sm80-m16n16w1s1"}),
    ],
)
def test_check_takes_configs_and_precision(rng, dtype, precision, config):
    q, k, v = arrays(rng, dtype=dtype)
    before = dict(config) if isinstance(config, dict) else config
    report = numflash.check(q, k, v, dout=q, precision=precision, config=config)
    assert report.passed, f"\n{report}"
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert config == before


def test_check_of_tf32_allows_more_than_that_of_float32(rng):
    q, k, v = arrays(rng)
    exact, rounded = (
        numflash.check(q, k, v, precision=precision, config="m8n8w1")
        for precision in (None, "tf32")
    )
    for strict, lax in zip(exact.errors, rounded.errors, strict=True):
        assert strict.error == lax.error and strict.budget * 100 < lax.budget


def test_check_says_which_result_is_wrong(rng, monkeypatch):
    attention = api.attention

    def wrong(*args, **options):
        out, lse = attention(*args, **options)
        out[0, 2, 0, 3] += 0.01
        return out, lse

    monkeypatch.setattr(api, "attention", wrong)
    report = numflash.check(*arrays(rng))
    assert not report.passed
    assert [error.passed for error in report.errors] == [False, True]
    out_line, lse_line = str(report).splitlines()[1:]
    assert out_line.endswith("TOO LARGE") and lse_line.endswith("ok")


def test_check_counts_nan_as_an_infinite_error(rng):
    q, k, v = arrays(rng)
    v[0, 5, 0, 7] = np.nan
    exact = reference.attention(q, k, v)[0]
    assert np.isnan(exact).any()
    report = numflash.check(q, k, v)
    out = np.nan_to_num(numflash.attention(q, k, v))
    from numflash.api.check import measure

    assert not np.isnan(report.errors[0].error)
    assert measure("out", out, exact, exact, 2**-24).error == np.inf


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
