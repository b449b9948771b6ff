"""`numflash.torch.attention` in eager mode: results, gradients, and what is refused."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

import numpy as np  # noqa: E402

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.api.comparison import compare  # noqa: E402
from tests.support.covering import ALL  # noqa: E402

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]
SHAPE = 1, 9, 2, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(n=3, shape=SHAPE, dtype=torch.float32, grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(n)]


def on_host(x):
    return np.asarray(x.detach().double())


def bias_of(dtype):
    return torch.randn(1, 2, 9, 9).to(dtype).requires_grad_()


# What is asked besides, as functions of a dtype; each with the names of what has a gradient.
ASKED = {
    "nothing": lambda dtype: {},
    "causal, a window": lambda dtype: {"causal": True, "window_size": (5, 0), "softcap": 4.0},
    "bias": lambda dtype: {"bias": bias_of(dtype)},
    "slopes and sinks": lambda dtype: {
        "alibi_slopes": torch.tensor([0.5, 0.25]).requires_grad_(),
        "sinks": torch.tensor([0.1, -0.3]).requires_grad_(),
    },
    "a table that score_mod reads": lambda dtype: {
        "score_mod": lambda s, b, h, i, j, table: s * table[h, i],
        "aux": (torch.rand(2, 9).to(dtype).requires_grad_(),),
    },
}


# Each dtype with nothing, and each option with one dtype; NUMFLASH_TEST_ALL=1 takes all with all.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMBINED = [
    (name, dtype)
    for n, name in enumerate(ASKED)
    for m, dtype in enumerate(DTYPES)
    if ALL or n == 0 or n % 3 == m
]


@pytest.mark.parametrize("name, dtype", COMBINED, ids=str)
def test_results_and_gradients_are_within_the_budget(name, dtype, launched):
    options = ASKED[name](dtype)
    q, k, v = operands(dtype=dtype)
    out, lse = nt.attention(q, k, v, return_lse=True, **options)
    assert launched.take() == ["forward"]
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    torch.autograd.backward((out, lse), (dout, dlse))
    assert set(launched.take()) >= set(BACKWARD)
    learned = {n: x for n, x in options.items() if isinstance(x, torch.Tensor)}
    learned |= {f"aux{n}": x for n, x in enumerate(options.get("aux", ()))}
    learned = {"q": q, "k": k, "v": v} | learned
    got = {"out": out, "lse": lse} | {f"d{n}": x.grad for n, x in learned.items()}
    assert all(x.grad.dtype == x.dtype for x in learned.values())
    given = {n: on_host(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    if "aux" in given:
        given["aux"] = tuple(on_host(x) for x in given["aux"])
    given |= {"dlse": on_host(dlse), "wrt": tuple(learned)}
    dtypes = {n: "float32" for n in ("dsinks", "dalibi_slopes")}
    report = compare(
        {n: on_host(x) for n, x in got.items()},
        *map(on_host, (q, k, v)),
        precision=str(dtype).removeprefix("torch."),
        dtypes=dtypes,
        dout=on_host(dout),
        **given,
    )
    assert report.passed, f"\n{report}"


def test_only_what_is_wanted_is_made(launched):
    q, k, v = operands(grad=False)
    v.requires_grad_()
    nt.attention(q, k, v).sum().backward()
    assert launched.take() == ["forward", "delta", "backward-dkdv"]
    v = v.detach()
    sinks = torch.zeros(2, requires_grad=True)
    nt.attention(q, k, v, sinks=sinks).sum().backward()
    assert sinks.grad.abs().min() > 0
    table = torch.zeros(9, requires_grad=True)
    given = {"score_mod": lambda s, b, h, i, j, t: s + t[j], "aux": (table,)}
    nt.attention(q, k, v, **given).sum().backward()
    assert table.grad.abs().min() > 0
    launched.clear()
    nt.attention(q, k, v)
    assert launched.take() == ["forward"]
    with torch.no_grad():
        assert not nt.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert nt.attention(q, k, v).is_inference()


def test_lse_alone_has_a_gradient():
    q, k, v = operands()
    _, lse = nt.attention(q, k, v, return_lse=True)
    lse.sum().backward()
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    dq, dk = torch.autograd.grad(s.logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close(q.grad, dq, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k.grad, dk, rtol=1e-4, atol=1e-5)
    assert not v.grad.any()


def naive(q, k, v):
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def test_views_broadcast_operands_and_gradients():
    """Slices, transposed axes, strides of 0, also of the gradient that arrives."""
    packed = torch.randn(1, 9, 3, 2, 8, requires_grad=True)
    q, k, v = packed.unbind(2)
    few = torch.randn(1, 1, 9, 8, requires_grad=True)
    cases = {
        "slices": ((q, k, v), (packed,)),
        "broadcast heads": ((q, *[few.expand(1, 2, 9, 8).transpose(1, 2)] * 2), (few, packed)),
        "last axis apart": ((q.transpose(1, 3).contiguous().transpose(1, 3), k, v), (packed,)),
    }
    for name, (given, leaves) in cases.items():
        reduce = torch.sum if name == "slices" else lambda x: x.square().sum()
        found = torch.autograd.grad(reduce(nt.attention(*given)), leaves)
        wanted = torch.autograd.grad(reduce(naive(*given)), leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape_q, shape_k", [((0, 9, 2, 8),) * 2, ((2, 0, 2, 8), (2, 9, 2, 8))])
def test_empty(shape_q, shape_k):
    q = torch.randn(shape_q, requires_grad=True)
    k, v = operands(2, shape_k)
    out = nt.attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert not k.grad.any() and not v.grad.any()


def test_no_keys():
    q = operands(1)[0]
    k, v = operands(2, (1, 0, 2, 8))
    out = nt.attention(q, k, v)
    out.sum().backward()
    assert not out.any() and not q.grad.any()


def test_packed_sequences(launched):
    q, k, v = operands(shape=(14, 1, 8))
    ends = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
    out, lse = nt.attention_varlen(q, k, v, ends, ends, 9, 9, causal=True, return_lse=True)
    (out.square().sum() + lse.sum()).backward()
    assert {"forward", "backward-dq"} <= set(launched.take())
    found = [x.grad for x in (q, k, v)]
    for rows in (slice(0, 5), slice(5, 14)):
        alone = [x.detach()[None, rows].requires_grad_() for x in (q, k, v)]
        one, of_one = nt.attention(*alone, causal=True, return_lse=True)
        (one.square().sum() + of_one.sum()).backward()
        torch.testing.assert_close(out[rows], one[0])
        for gradient, x in zip(found, alone, strict=True):
            torch.testing.assert_close(gradient[rows], x.grad[0])
    plan = numflash.plan_varlen(ends, ends)
    again = nt.attention_varlen(q, k, v, ends, ends, schedule=plan, causal=True)
    torch.testing.assert_close(again, out)
    again.sum().backward()


def test_a_block_mask_and_lengths():
    q, k, v = operands(shape=(1, 32, 1, 8))
    mask = numflash.create_block_mask(
        lambda b, h, i, j: i >= j, 1, 1, 32, 32, block_size=16, like=q.detach()
    )
    nt.attention(q, k, v, block_mask=mask).sum().backward()
    found = [x.grad for x in (q, k, v)]
    wanted = torch.autograd.grad(nt.attention(q, k, v, causal=True).sum(), (q, k, v))
    torch.testing.assert_close(found, list(wanted))
    lengths = torch.tensor([5], dtype=torch.int32)
    out = nt.attention(q[:, :9], k, v, seqlens_k=lengths)
    torch.testing.assert_close(out, nt.attention(q[:, :9], k[:, :5], v[:, :5]))


def test_float32_results_of_16_bits():
    q, k, v = operands(dtype=torch.bfloat16)
    out = nt.attention(q, k, v, out_dtype="float32")
    out.square().sum().backward()
    assert (out.dtype, q.grad.dtype) == (torch.float32, torch.bfloat16)
    given = [x.detach().float().requires_grad_() for x in (q, k, v)]
    naive(*given).square().sum().backward()
    torch.testing.assert_close(q.grad.float(), given[0].grad, rtol=0.05, atol=0.05)


def test_a_config_for_each_direction(launched):
    q, k, v = operands()
    config = {"forward": "m8n16w2", "backward-dq": "m8n16w2"}
    nt.attention(q, k, v, config=config).sum().backward()
    assert {"forward m8n16w2", "backward-dq m8n16w2"} <= set(launched)


def test_without_gradients_all_that_numflash_takes():
    q, k, v = operands(dtype=torch.float16, shape=(1, 9, 1, 64), grad=False)
    out = torch.empty_like(q)
    assert nt.attention(q, k, v, out=out) is out
    torch.testing.assert_close(out, nt.attention(q, k, v))
    in_fp8, decision = nt.attention(q, k, v, precision="auto", return_decision=True)
    assert in_fp8.shape == q.shape and decision.in_fp8.shape == (1, 1)
    coded = numflash.quantize_fp8(k)
    assert nt.attention(q, coded, v).shape == q.shape


def test_a_change_in_place_before_the_backward_is_an_error():
    slopes = torch.tensor([0.5, 0.25])
    for changed in ("q", "k", "v", "slopes", "out"):
        q, k, v = [x * 1 for x in operands()]
        out = nt.attention(q, k, v, alibi_slopes=slopes)
        loss = out.sum()
        with torch.no_grad():
            {"q": q, "k": k, "v": v, "slopes": slopes, "out": out}[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
