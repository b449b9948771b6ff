"""`numflash.torch.scaled_dot_product_attention` on torch's own samples, beside its math path."""

import math

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')
pytest.importorskip("expecttest", reason="torch's samples need it: pip install expecttest")

import numflash.torch as nt  # noqa: E402
from numflash.reference import dropout_mask  # noqa: E402
from tests.support.covering import ALL  # noqa: E402

DTYPES = torch.float32, torch.float16, torch.bfloat16
BACKWARD = ["delta", "backward-dkdv", "backward-dq"]


def samples(dtype):
    """What torch tests its function with: (query, key, value, options)."""
    from torch.testing._internal import common_methods_invocations as torchs

    # That import forbids to set torch's flags, for all tests of this process.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    torch.manual_seed(0)
    found = []
    for sample in torchs.sample_inputs_scaled_dot_product_attention(None, "cpu", dtype, True):
        found.append((sample.input, *sample.args, sample.kwargs))
    return found


def math_path(query, key, value, keep, attn_mask=None, dropout_p=0.0, is_causal=False):
    """torch's; `keep` says which weights stay."""
    function = torch.ops.aten._scaled_dot_product_attention_math.default
    return function(query, key, value, attn_mask, dropout_p, is_causal, keep)[0]


@pytest.fixture
def math_in_16_bits():
    """torch's math path computes 16-bit floats in 16 bits, not in float32."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def kept(query, key, dropout_p):
    """The weights that numflash keeps when it draws the next number, as torch's math path."""
    if not dropout_p:
        return None
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    *batch, heads = 1, *lead
    seed = torch.randint(2**62, ()).item()
    sizes = math.prod(batch), heads, query.shape[-2], key.shape[-2]
    keep = torch.tensor(dropout_mask(*sizes, dropout_p=dropout_p, seed=seed))
    return keep.view(*lead, *keep.shape[2:])


def in_double(x):
    return x.detach().double().requires_grad_()


def with_gradients(function, tensors, dout):
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))


def reach(query, key, value, mask, out, dout):
    """By how much results move, relative to an error of each weight and of the sums of rows.

    Gradients begin at out, rounded, and at weights made of scores of any size again.
    """
    query, key, value, out, dout = (x.abs().double() for x in (query, key, value, out, dout))
    of_a_row = (out * dout).sum(-1)
    scale = query.shape[-1] ** -0.5
    yield value.max()
    yield of_a_row.max() * key.max() * scale
    yield of_a_row.sum(-1).max() * query.max() * scale
    yield dout.sum(-2).max()
    yield of_a_row.sum()


# All of torch's samples; by default of each shape, with dropout or not, and the one with a mask.
EACH = [(n, dtype) for n in range(25) for dtype in DTYPES]
SOME = [(n, DTYPES[k % 3]) for k, n in enumerate((6, 8, 16, 24))]


@pytest.mark.parametrize("n, dtype", EACH if ALL else SOME, ids=str)
def test_torchs_samples(n, dtype, launched, math_in_16_bits):
    query, key, value, options = samples(dtype)[n]
    mask, dropout_p = options.pop("attn_mask", None), options["dropout_p"]
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    torch.manual_seed(n)
    keep = kept(query, key, dropout_p)

    def theirs(query, key, value, mask=None):
        return math_path(query, key, value, keep, attn_mask=mask, **options)

    dout = torch.rand_like(theirs(*tensors))
    torch.manual_seed(n)
    out = nt.scaled_dot_product_attention(query, key, value, mask, **options)
    assert launched.take() == ["forward"]
    found = out, *torch.autograd.grad(out, tensors, dout)
    assert launched.take() == BACKWARD + ([] if mask is None else ["backward-tiles"])

    naive = with_gradients(theirs, tensors, dout)
    exact = with_gradients(theirs, [in_double(x) for x in tensors], dout)
    scores = (query @ key.mT).double().abs().max() * query.shape[-1] ** -0.5
    epsilon = torch.finfo(dtype).eps
    rounding = epsilon + 2**-22 * scores
    reaches = reach(query, key, value, mask, exact[0], dout)
    for x, y, z, far in zip(found, naive, exact, reaches, strict=False):
        assert x.dtype == y.dtype and x.shape == y.shape
        budget = 2 * (y - z).abs().max() + epsilon * z.abs().max() + rounding * far
        assert (x - z).abs().max() <= budget
