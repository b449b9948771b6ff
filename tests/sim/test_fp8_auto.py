"""precision="auto": which heads are computed in 8 bits, and that the others are not."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.calls import forward
from numflash.calls import fp8_forward as fp8_calls
from tests.support.covering import some, thorough

DATA = Path(__file__).parents[2] / "examples" / "data" / "minilm_layer.npz"
HEADS_KV, GROUP = 2, 2
# Few tokens a thread block: the simulator runs all of its threads.
SMALL = {"fp8": numflash.Fp8Recipe(block=32)}
AUTO = {"precision": "auto", **SMALL}


def arrays(rng, q_sizes=(1,), k_sizes=(1,), seqlen_q=18, seqlen_k=40, dtype=np.float16, batch=1):
    """q, k, v of random numbers; each key-value head, and its group, has a size of its own."""

    def one(seqlen, sizes, heads):
        sizes = np.resize(np.repeat(sizes, heads // HEADS_KV), heads)[:, None]
        return (rng.standard_normal((batch, seqlen, heads, 64)) * sizes).astype(dtype)

    return (
        one(seqlen_q, q_sizes, HEADS_KV * GROUP),
        one(seqlen_k, k_sizes, HEADS_KV),
        one(seqlen_k, (1,), HEADS_KV),
    )


def errors(out, q, k, v, **options) -> np.ndarray:
    """(batch, heads_kv): the root mean square of the error over that of the exact result."""
    exact, _ = reference.attention(q, k, v, **options)
    batch, seqlen, heads, head_dim = exact.shape
    shape = batch, seqlen, k.shape[2], heads // k.shape[2], head_dim
    squares = ((out.astype(np.float64) - exact) ** 2).reshape(shape).sum((1, 3, 4))
    return np.sqrt(squares / (exact**2).reshape(shape).sum((1, 3, 4)))


def by_head(out, heads_kv=HEADS_KV) -> np.ndarray:
    """(batch, heads_kv, ...): the parts of a result that one decision is about."""
    batch, seqlen, heads, head_dim = out.shape
    return np.moveaxis(out.reshape(batch, seqlen, heads_kv, heads // heads_kv, head_dim), 2, 1)


CALLS = {
    "float16-causal": (np.float16, {"causal": True}),
    "bfloat16-softcap": (ml_dtypes.bfloat16, {"softcap": 5.0}),
}


@pytest.mark.parametrize("name", some(CALLS, "float16-causal"))
def test_each_head_is_that_of_its_precision(name):
    dtype, options = CALLS[name]
    q, k, v = arrays(np.random.default_rng(0), (1, 4), (1, 4), dtype=dtype)
    out, lse, decision = numflash.attention(
        q, k, v, **AUTO, return_lse=True, return_decision=True, **options
    )
    in_8_bits = numflash.attention(q, k, v, precision="fp8", return_lse=True, **SMALL, **options)
    in_16_bits = numflash.attention(q, k, v, return_lse=True, **options)
    assert decision.in_fp8.tolist() == [[1, 0]]
    chosen = decision.in_fp8.astype(bool)
    for got, eight, sixteen in zip((out, lse), in_8_bits, in_16_bits, strict=True):
        if got.ndim == 3:  # lse: (batch, heads, seqlen)
            got, eight, sixteen = (np.swapaxes(x, 1, 2)[..., None] for x in (got, eight, sixteen))
        got, eight, sixteen = map(by_head, (got, eight, sixteen))
        assert (got[chosen] == eight[chosen]).all() and (got[~chosen] == sixteen[~chosen]).all()


BUDGETS = [(0, "block", 0.06), (0, "block", 0.12), (1, "token", 0.12), (2, "head", 0.06)]


@pytest.mark.parametrize(("seed", "recipe", "budget"), some(BUDGETS, BUDGETS[0]))
def test_heads_in_8_bits_keep_within_the_budget(seed, recipe, budget):
    rng = np.random.default_rng(seed)
    q, k, v = arrays(rng, rng.uniform(0.2, 3, HEADS_KV), rng.uniform(0.2, 3, HEADS_KV))
    # An outlier here and there, as in FlashAttention-3's study.
    for x in (q, k, v):
        x += (10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 1e-3)).astype(x.dtype)
    options = {"precision": "auto", "fp8": numflash.Fp8Recipe(recipe, 32)}
    out, decision = numflash.attention(
        q, k, v, max_rel_error=budget, return_decision=True, **options
    )
    estimated = decision.estimated_error
    assert (decision.in_fp8 == (estimated <= budget)).all()
    assert (errors(out, q, k, v) <= budget).all()


@thorough
def test_the_estimate_is_near_the_error_where_scores_are_small():
    q, k, v = arrays(np.random.default_rng(0), seqlen_q=32, seqlen_k=128)
    out, decision = numflash.attention(q, k, v, **AUTO, return_decision=True)
    actual = errors(out, q, k, v)
    assert (decision.in_fp8 == 1).all()
    assert (0.9 * actual < decision.estimated_error).all()
    assert (decision.estimated_error < 1.3 * actual).all()


@thorough
def test_a_budget_decides_for_all_or_none():
    q, k, v = arrays(np.random.default_rng(0), seqlen_q=5, seqlen_k=9)
    for budget, expected in ((1e-6, 0), (1e6, 1)):
        out, decision = numflash.attention(
            q, k, v, **AUTO, max_rel_error=budget, return_decision=True
        )
        assert (decision.in_fp8 == expected).all()
        assert decision.in_fp8.shape == decision.estimated_error.shape == (1, HEADS_KV)
        alone = numflash.attention(q, k, v, **({"precision": "fp8", **SMALL} if expected else {}))
        assert out.tobytes() == alone.tobytes()


def test_each_kernel_passes_over_the_heads_of_the_other(monkeypatch):
    # The one in 16 bits comes last, and would hide what the first one does in vain.
    def in_8_bits_only(request, config):
        if request.traits.fp8:
            return forward.kernels_of(request, config)
        return forward.ForwardKernels(request, {}, {})

    q, k, v = arrays(np.random.default_rng(0), (1, 4), (1, 4), seqlen_q=5, seqlen_k=9)
    out = np.full_like(q, np.nan)
    with monkeypatch.context() as patch:
        patch.setattr(fp8_calls, "kernels_of", in_8_bits_only)
        numflash.plan(q, k, v, out=out, **AUTO).launch()
    assert np.isnan(by_head(out)).all((2, 3, 4)).tolist() == [[False, True]]


@thorough
def test_one_bad_block_keeps_its_head_in_16_bits():
    q, k, v = arrays(np.random.default_rng(0), seqlen_q=2, seqlen_k=150, batch=2)
    k[0, 140:, 1] *= 30  # only the last blocks of 32 keys
    v[1, 7, 0, 3] = np.nan
    decision = numflash.attention(q, k, v, **AUTO, return_decision=True)[1]
    assert decision.in_fp8.tolist() == [[1, 0], [0, 1]]


@thorough
def test_a_plan_decides_anew_at_each_launch():
    q, k, v = arrays(np.random.default_rng(0))
    plan = numflash.plan(q, k, v, **AUTO)
    plan.launch()
    assert plan.decision.in_fp8.all()
    k[:, :, 1] *= 8
    out = plan.launch()
    assert plan.decision.in_fp8.tolist() == [[1, 0]]
    assert out.tobytes() == numflash.attention(q, k, v, **AUTO).tobytes()


@thorough
def test_a_trained_encoder_s_heads():
    with np.load(DATA) as stored:
        q, k, v = (np.ascontiguousarray(stored[name][:1, :, :4]) for name in "qkv")
    out, decision = numflash.attention(q, k, v, **AUTO, max_rel_error=0.06, return_decision=True)
    chosen = decision.in_fp8.astype(bool)
    found = errors(out, q, k, v)
    assert chosen.any() and not chosen.all()
    assert (found <= 0.06).all() and (found[~chosen] < 2e-3).all()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"precision": "fp8", "return_decision": True}, ValueError, "return_decision goes with"),
        ({"precision": "fp8", "max_rel_error": 0.1}, ValueError, "max_rel_error goes with"),
        ({"precision": "auto", "max_rel_error": 0}, ValueError, "must be positive"),
        ({"precision": "auto", "max_rel_error": "small"}, TypeError, "must be a real number"),
        ({"precision": "auto", "softmax_scale": -1.0}, numflash.UnsupportedError, "softmax_scale"),
    ],
    ids=str,
)
def test_refusals(options, error, words):
    q, k, v = arrays(np.random.default_rng(0), seqlen_q=3, seqlen_k=3)
    with pytest.raises(error, match=words):
        numflash.attention(q, k, v, **options)


def test_arrays_that_have_8_bits_leave_no_choice():
    q, k, v = arrays(np.random.default_rng(0), seqlen_q=3, seqlen_k=3)
    with pytest.raises(TypeError, match="q, k and v need 16"):
        numflash.attention(q, numflash.quantize_fp8(k), v, **AUTO)
