"""Calls of `numflash.torch` that users get wrong, or that would go wrong without a word."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

import numpy as np  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.runtime import torch_tensors  # noqa: E402
from numflash.runtime.errors import UnsupportedError  # noqa: E402

SHAPE = 1, 9, 2, 8


def negated():
    """(a view whose memory holds other values, the same values in memory)."""
    x = torch.randn(SHAPE, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x, x.clone().resolve_neg()


@pytest.mark.parametrize(
    "given", [np.zeros(SHAPE, np.float32), None, [1.0]], ids=["an array", "None", "a list"]
)
def test_what_is_no_tensor_is_named(given):
    q, v = torch.zeros(SHAPE), torch.zeros(SHAPE, requires_grad=True)
    with pytest.raises(TypeError, match=r"^k must be a tensor, got"):
        nt.attention(q, given, v)
    with pytest.raises(TypeError, match=r"^q must be a tensor, got"):
        nt.attention(given, q, v)
    with pytest.raises(TypeError, match=r"^q must be a tensor, got"):
        nt.attention(given, q, q, dropout_p=0.1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^q must be"):
        nt.attention(given, q, q)


@pytest.mark.parametrize("given", [np.zeros(SHAPE, np.float32), None], ids=["an array", "None"])
def test_what_is_no_tensor_is_named_by_others(given):
    x, cos = torch.zeros(1, 4, 2, 8), torch.zeros(4, 4)
    with pytest.raises(TypeError, match=r"^x must be a tensor, got"):
        nt.apply_rotary(given, cos, cos)
    with pytest.raises(TypeError, match=r"^sin must be a tensor, got"):
        nt.apply_rotary(x.requires_grad_(), cos, given)
    with pytest.raises(TypeError, match=r"^lses\[1\] must be a tensor, got"):
        nt.merge_partials([x, x], [x[..., 0], given])
    with pytest.raises(TypeError, match=r"^outs must be a list of tensors, or a tensor, got"):
        nt.merge_partials(given, [x])


@pytest.mark.parametrize("kind", ["sparse_coo", "nested", "quantised"])
def test_a_tensor_that_is_not_dense_is_named(kind):
    x = torch.zeros(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that it may change
        odd = {
            "sparse_coo": lambda: x.to_sparse(),
            "nested": lambda: torch.nested.nested_tensor([x[0]]),
            "quantised": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        }[kind]()
    for attention in (nt.attention, numflash.attention):
        with pytest.raises(TypeError, match=rf"^k must be a dense tensor .*{kind}"):
            attention(x, odd, x)
    # On a GPU the same checks stand before an address is read.
    if kind != "quantised":
        operand, key = torch_tensors.Torch().glance(odd)
        assert operand.pointer == 0 and key is None


def test_a_trace_of_torchscript_is_no_constant():
    q, k, v = torch.randn(3, *SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        traced = torch.jit.trace(lambda q: nt.attention(q, k, v, causal=True), q)
    wanted = nt.attention(v, k, v, causal=True)
    torch.testing.assert_close(traced(v), wanted, rtol=0, atol=0)


def test_a_derivative_in_forward_mode_is_not_lost():
    x = torch.randn(SHAPE)
    with forward_ad.dual_level():
        assert nt.attention(x, x, x).shape == x.shape
        both = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(UnsupportedError, match="reverse mode only"):
            nt.attention(x, both, x)
        with pytest.raises(UnsupportedError, match=r"k carries .* forward mode"):
            numflash.attention(x, both, x)
        with pytest.raises(UnsupportedError, match="reverse mode only"):
            nt.attention(x, x, x, bias=both[0, :, 0, 0].view(1, 1, 9))
        with pytest.raises(UnsupportedError, match="reverse mode only"):
            nt.attention(
                x, x, x, score_mod=lambda s, b, h, i, j, t: s + t[j], aux=(both[0, :, 0, 0],)
            )


def test_where_torchs_attention_has_forward_mode_it_runs():
    x = torch.randn(SHAPE).transpose(1, 2)
    with (
        forward_ad.dual_level(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        wanted = forward_ad.unpack_dual(
            scaled_dot_product_attention(forward_ad.make_dual(x, x), x, x)
        ).tangent
        found = nt.scaled_dot_product_attention(forward_ad.make_dual(x, x), x, x)
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, wanted)


def test_memory_of_other_values_is_not_read():
    x, same = negated()
    for attention in (nt.attention, numflash.attention):
        with pytest.raises(TypeError, match=r"k is a negated view.*k\.resolve_neg\(\)"):
            attention(same, x, same)
    # On a GPU nothing else stands between a kernel and the address.
    operand, key = torch_tensors.Torch().glance(x)
    assert operand.pointer == 0 and key is None


def test_a_gradient_that_is_a_negated_view(launched):
    x, same = negated()
    for given in (x, same):
        q = torch.ones(SHAPE, requires_grad=True)
        nt.attention(q, q, same).backward(given)
        assert "backward-dq" in launched.take()
        if given is x:
            first = q.grad
    torch.testing.assert_close(first, q.grad, rtol=0, atol=0)


def test_functions_of_numflash_are_not_traced():
    q = torch.randn(SHAPE)
    wanted = numflash.attention(q, q, q) + 1

    def call(q):
        return numflash.attention(q, q, q) + 1

    torch._dynamo.reset()
    found = torch.compile(call, backend="aot_eager")(q)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch._dynamo.reset()  # else the code that was compiled for the first is taken
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"functions of numflash\.torch are"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q)
