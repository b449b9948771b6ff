"""`numflash.torch.attention` under torch.func: grad, vjp, jacrev, vmap, in any order."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap  # noqa: E402

import numflash.torch as nt  # noqa: E402
from numflash import UnsupportedError  # noqa: E402

N, SHAPE = 3, (2, 8, 1, 8)
ALL = (0, 1, 2)


def naive(q, k, v, bias=None, causal=False):
    s = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("...hqk,...khd->...qhd", s.softmax(-1), v)


def squared(attention, **options):
    return lambda q, k, v: attention(q, k, v, **options).square().sum()


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(N, *SHAPE) for _ in range(3)]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_vmap_joins_the_batch(qkv, launched, depth):
    """Of arrays of four, three and two axes; the whole is one launch."""
    if depth == 3:
        found = vmap(vmap(vmap(nt.attention, in_dims=1, out_dims=1)))(*qkv)
    else:
        found = (vmap(nt.attention) if depth == 1 else vmap(vmap(nt.attention)))(*qkv)
    assert launched.take() == ["forward"]
    close(found, naive(*qkv))


def test_vmap_of_no_entries():
    none = torch.zeros(0, 3, 9, 2, 8)
    assert vmap(nt.attention)(none, none, none).shape == none.shape
    assert grad(lambda x: vmap(nt.attention)(x, x, x).sum())(none).shape == none.shape
    last = none.movedim(0, 4)
    assert vmap(nt.attention, in_dims=4)(last, last, last).shape == none.shape
    cos = torch.ones(9, 4)
    assert vmap(lambda x: nt.apply_rotary(x, cos, cos))(none).shape == none.shape
    with pytest.raises(UnsupportedError, match="an axis of size 0"):
        vmap(lambda x: nt.attention(x, x, x, score_mod=lambda s, b, h, i, j: s + b))(none)


def test_vmap_of_some_along_any_axis(qkv):
    q, k, v = qkv
    found = vmap(nt.attention, in_dims=(1, None, -1), out_dims=2)(
        q.movedim(0, 1), k[0], v.movedim(0, -1)
    )
    close(found, naive(q, k[:1], v).movedim(0, 2))


def test_grad(qkv):
    operands = [x[0] for x in qkv]
    close(grad(squared(nt.attention), ALL)(*operands), grad(squared(naive), ALL)(*operands))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_grad_of_vmap_and_vmap_of_grad(qkv, launched, shared):
    """Shared keys have a gradient for each in vmap(grad), and their sum in grad(vmap)."""
    q, k, v = qkv
    k, dims = (k[0], (0, None, 0)) if shared else (k, (0, 0, 0))
    found = vmap(grad(squared(nt.attention), ALL), dims)(q, k, v)
    assert launched.take() == ["forward", "delta", "backward-dkdv", "backward-dq"]
    close(found, vmap(grad(squared(naive), ALL), dims)(q, k, v))

    def total(attention):
        return lambda *operands: vmap(squared(attention), dims)(*operands).sum()

    close(grad(total(nt.attention), ALL)(q, k, v), grad(total(naive), ALL)(q, k, v))


@pytest.mark.parametrize("dim", [0, None], ids=["mapped", "shared"])
def test_the_gradient_of_a_bias(qkv, dim):
    bias = torch.randn(N, 1, 8, 8)
    bias = bias if dim == 0 else bias[0]

    def call(attention):
        return grad(lambda q, k, v, b: attention(q, k, v, bias=b).square().sum(), (0, 3))

    dims = (0, 0, 0, dim)
    close(vmap(call(nt.attention), dims)(*qkv, bias), vmap(call(naive), dims)(*qkv, bias))


def test_functions_see_their_own_batch_entry(qkv):
    def call(q, k, v):
        return nt.attention(q, k, v, mask_mod=lambda b, h, i, j: j <= i + 8 * b)

    found = vmap(call)(*qkv)
    close(found[:, 0], naive(*qkv, causal=True)[:, 0])
    close(found[:, 1], naive(*qkv)[:, 1])


def test_jacrev_vjp_and_lse(qkv):
    q, k, v = [x[0, 0, :2, :1, :4] for x in qkv]
    close(jacrev(nt.attention)(q, k, v), jacrev(naive)(q, k, v))
    (out, lse), pull = vjp(lambda q: nt.attention(q, k, v, return_lse=True), q)

    def both(q):
        s = torch.einsum("qhd,khd->hqk", q, k) * 4**-0.5
        return naive(q, k, v), s.logsumexp(-1)

    wanted, pull_naive = vjp(both, q)
    close((out, lse), wanted)
    given = torch.randn_like(out), torch.randn_like(lse)
    close(pull(given), pull_naive(given))


def test_packed_sequences_one_after_another(qkv):
    q, k, v = [x[:, 0] for x in qkv]
    ends = torch.tensor([0, 5, 8], dtype=torch.int32)
    found = vmap(lambda q, k, v: nt.attention_varlen(q, k, v, ends, ends))(q, k, v)
    close(found[:, :5], naive(q[:, :5], k[:, :5], v[:, :5]))


@pytest.mark.parametrize("randomness, kinds", [("same", 1), ("different", N)])
def test_dropout(qkv, randomness, kinds):
    operands = [x[:1].expand(N, *SHAPE) for x in qkv]
    found = vmap(lambda *x: nt.attention(*x, dropout_p=0.5), randomness=randomness)(*operands)
    assert len({str(x.tolist()) for x in found}) == kinds


def test_a_module_as_a_function():
    linear = torch.nn.Linear(8, 24)

    def loss(parameters, x):
        q, k, v = functional_call(linear, parameters, x).chunk(3, -1)
        return nt.attention(q, k, v).square().sum()

    x, parameters = torch.randn(3, 1, 8, 1, 8), dict(linear.named_parameters())
    each = vmap(grad(loss), (None, 0))(parameters, x)
    total = grad(lambda p: torch.stack([loss(p, y) for y in x]).sum())(parameters)
    close(each["weight"].sum(0), total["weight"])


def test_what_does_not_exist_says_so(qkv):
    q, k, v = [x[0, :, :2] for x in qkv]
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        jacrev(jacrev(squared(nt.attention)))(q, k, v)
    with pytest.raises(UnsupportedError, match="reverse mode only"):
        hessian(squared(nt.attention))(q, k, v)
    with pytest.raises(UnsupportedError, match="reverse mode only"):
        jvp(lambda q: nt.attention(q, k, v), (q,), (q,))


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_compiled(qkv, transform):
    torch._dynamo.reset()
    operands = qkv if transform is vmap else [x[0] for x in qkv]
    compiled = torch.compile(transform(squared(nt.attention)), fullgraph=True, backend="aot_eager")
    close(compiled(*operands), transform(squared(naive))(*operands))
