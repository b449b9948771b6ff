"""Training with `numflash.torch.attention`: autocast, dropout, checkpointing; what is refused."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.utils.checkpoint import (  # noqa: E402
    checkpoint,
    create_selective_checkpoint_contexts,
)

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash import UnsupportedError  # noqa: E402
from numflash.frontends.torch import operators  # noqa: E402

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]
SHAPE = 1, 9, 1, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(n=3, shape=SHAPE, dtype=torch.float32, grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["eager", "operator", "compiled"])
def test_autocast_is_that_of_pytorchs_own_attention(dtype, way):
    """The dtype of the context, not one that is fixed; gradients have the operands' dtype."""
    torch._dynamo.reset()
    call = nt.attention
    if way == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    elif way == "operator":
        call = lambda q, k, v: operators.ATTENTION(q, k, v, [], '{"arrays":[],"aux":[]}')[0]  # noqa: E731
    q, k, v = operands()
    with torch.autocast("cpu", dtype):
        out = call(q, k.to(dtype), v)
        theirs = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
    assert out.dtype == theirs.dtype == dtype
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    wanted = nt.attention(*[x.detach().to(dtype) for x in (q, k, v)])
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_autocast_leaves_float64_an_error():
    q, k, v = [x.double() for x in operands(grad=False)]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        nt.attention(q, k, v)


def test_a_seed_comes_from_pytorchs_generator():
    q, k, v = operands(grad=False)
    calls = [lambda: nt.attention(q, k, v, dropout_p=0.5)]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: nt.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    calls.append(lambda: compiled(q, k, v))
    for call in calls:
        torch.manual_seed(3)
        first, second = call(), call()
        torch.manual_seed(3)
        torch.testing.assert_close(call(), first, rtol=0, atol=0)
        assert not torch.equal(first, second)
    assert torch.equal(
        nt.attention(q, k, v, dropout_p=0.5, seed=5),
        numflash.attention(q, k, v, dropout_p=0.5, seed=5),
    )


def test_checkpointing_computes_the_same_again(launched):
    q, k, v = operands()

    def block(q, k, v):
        return nt.attention(q, k, v, dropout_p=0.5).square()

    torch.manual_seed(1)
    wanted = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    launched.clear()
    torch.manual_seed(1)
    out = checkpoint(block, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert launched.take() == ["forward", "forward", *BACKWARD]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.manual_seed(1)
    out = checkpoint(
        block,
        q,
        k,
        v,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts([operators.ATTENTION]),
    )
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert launched.take() == ["forward", *BACKWARD]  # the operator's result was kept
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_tensors_may_be_packed_away_and_back():
    """What the backward reads is saved where hooks, as of offloading, see it."""
    q, k, v = operands()
    slopes = torch.tensor([0.5])
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.append(tuple(x.shape)) or x.clone(), lambda x: x
    ):
        out = nt.attention(q, k, v, alibi_slopes=slopes)
    assert sorted(seen) == sorted([SHAPE] * 4 + [(1, 1, 9), (1,)])
    out.sum().backward()


def test_a_small_model_learns(launched):
    """Three steps, in which the loss falls."""
    layer = torch.nn.Linear(8, 24)
    x, y = torch.randn(1, 9, 1, 8), torch.randn(1, 9, 1, 8)
    optimizer, losses = torch.optim.SGD(layer.parameters(), lr=0.5), []
    for _ in range(3):
        out = nt.attention(*layer(x).chunk(3, -1), causal=True)
        loss = (out - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert launched.take() == 3 * ["forward", *BACKWARD]


def second_derivative(call):
    q, k, v = operands()
    (dq,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
    dq.sum().backward()


def raises(kind, match):
    return pytest.raises(kind, match=match)


def test_a_second_derivative_says_so():
    with raises(UnsupportedError, "first derivatives only"):
        second_derivative(nt.attention)
    q, k, v = operands()
    (dq,) = torch.autograd.grad(nt.attention(q, k, v).sum(), q, create_graph=True)
    wanted = torch.autograd.grad(nt.attention(q, k, v).sum(), q)[0]
    torch.testing.assert_close(dq.detach(), wanted, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(nt.attention, fullgraph=True, backend="aot_eager")
    with raises(RuntimeError, "double backward"):  # PyTorch's own words
        second_derivative(compiled)


def test_what_is_refused():
    q, k, v = operands()
    idle = q.detach()
    flags = torch.ones(9, 9, dtype=torch.bool)
    cases = [
        (UnsupportedError, "out cannot be given", lambda: nt.attention(q, k, v, out=idle)),
        (UnsupportedError, "8-bit floats", lambda: nt.attention(q, k, v, precision="fp8")),
        (
            UnsupportedError,
            "8-bit floats",
            lambda: nt.attention(q, k, v, precision="auto", return_decision=True),
        ),
        (
            UnsupportedError,
            "8-bit floats",
            lambda: nt.attention(q, k, v, q_descale=torch.ones(1, 1)),
        ),
        (
            UnsupportedError,
            "8-bit floats",
            lambda: nt.attention(q, numflash.quantize_fp8(idle), v),
        ),
        (ValueError, "return_decision", lambda: nt.attention(q, k, v, return_decision=True)),
        (TypeError, "unknown options: stream", lambda: nt.attention(q, k, v, stream=0)),
        (TypeError, "layout", lambda: nt.attention_varlen(q[0], k[0], v[0], layout="bshd")),
        (TypeError, "float64", lambda: nt.attention(q.double(), k.double(), v.double())),
        (TypeError, "k must be", lambda: nt.attention(q, k.to("meta"), v)),
        (ValueError, "one device", lambda: nt.attention(q.to("meta"), k, v)),
        (
            TypeError,
            "q must be",
            lambda: nt.attention(*[x.to("meta").double() for x in (q, k, v)]),
        ),
        (TypeError, "mask must be a tensor", lambda: nt.attention(q, k, v, mask=flags.numpy())),
        (
            UnsupportedError,
            "requires a gradient",
            lambda: nt.attention(q, k, v, mask=q.detach().requires_grad_()),
        ),
    ]
    for kind, message, call in cases:
        with raises(kind, message):
            call()


def test_what_only_masks_read_has_no_gradient():
    q, k, v = operands(grad=False)
    reach = torch.full((9,), 3.0, requires_grad=True)
    out = nt.attention(q, k, v, mask_mod=lambda b, h, i, j, r: j < r[i], aux=(reach,))
    with raises((TypeError, ValueError), "aux0"):
        out.sum().backward()


def test_meta_tensors_have_the_shapes_of_results():
    q, k, v = (torch.empty(2, 4, 9, 8, device="meta", dtype=torch.float16) for _ in range(3))
    out, lse = nt.attention(q, k[:, :2], v[:, :2], layout="bhsd", return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)
    ends = torch.empty(3, device="meta", dtype=torch.int32)
    out, lse = nt.attention_varlen(
        q[0, 0, :, None], k[0, 0, :, None], v[0, 0, :, None, :5], ends, ends, return_lse=True
    )
    assert (out.shape, lse.shape) == ((9, 1, 5), (1, 9))
