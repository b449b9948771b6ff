"""`numflash.torch.apply_rotary` and `merge_partials`: gradients, graphs, transforms."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.func import grad, vmap  # noqa: E402

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash import UnsupportedError  # noqa: E402
from numflash.frontends.torch.rotary import ROTARY  # noqa: E402

SHAPE = 2, 6, 2, 16
TABLES = numflash.rotary_tables(16, 8, like=torch.empty(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def naive(x, first=0):
    """Of (batch, seqlen, heads, head_dim), halves of the first 8 columns."""
    cos, sin = (table[first : first + x.shape[-3], None] for table in TABLES)
    a, b, rest = x.split((4, 4, x.shape[-1] - 8), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


CALLS = {
    "eager": lambda call: call,
    "compiled": lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("way", CALLS)
def test_gradients(way, launched):
    x, weight = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    out = CALLS[way](lambda x: nt.apply_rotary(x, *TABLES, offsets=3))(x)
    assert launched.take() == ["rotary"]
    close(out, naive(x, 3))
    (dx,) = torch.autograd.grad((out * weight).sum(), x)
    assert launched.take() == ["rotary"]
    close(dx, torch.autograd.grad((naive(x, 3) * weight).sum(), x)[0])


def test_offsets_lengths_and_the_other_convention():
    x = torch.randn(SHAPE, requires_grad=True)
    offsets = torch.tensor([0, 9], dtype=torch.int32)
    out = nt.apply_rotary(x, *TABLES, offsets=offsets)
    close(out, torch.stack([naive(x[0]), naive(x[1], 9)]))
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    close(dx, 2 * x)
    packed, ends = x.flatten(0, 1), torch.tensor([0, 4, 12], dtype=torch.int32)
    out = nt.apply_rotary(packed, *TABLES, cu_seqlens=ends, interleaved=True)
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    close(dx, 2 * x)
    back = nt.apply_rotary(out, *TABLES, cu_seqlens=ends, interleaved=True, conjugate=True)
    close(back, packed)


def test_it_is_linear_and_differentiates_again():
    x, y = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    for call in (
        nt.apply_rotary,
        lambda *given: ROTARY(*given, None, None, 0, False, False, "bshd"),
    ):
        (dx,) = torch.autograd.grad((call(x, *TABLES) * y).sum(), x, create_graph=True)
        (again,) = torch.autograd.grad((dx * x).sum(), y)
        close(again, naive(x))


def test_in_place():
    x = torch.randn(SHAPE, requires_grad=True)
    y = x * 1
    assert nt.apply_rotary(y, *TABLES, out=y) is y
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    close(dx, 2 * x)
    with pytest.raises(UnsupportedError, match="out must be x"):
        nt.apply_rotary(x, *TABLES, out=torch.empty(SHAPE))
    with pytest.raises(UnsupportedError, match="cos requires a gradient"):
        nt.apply_rotary(x, TABLES[0].clone().requires_grad_(), TABLES[1])
    with torch.no_grad():
        out = torch.empty(SHAPE)
        assert nt.apply_rotary(x, *TABLES, out=out) is out


def test_opcheck_and_transforms(launched):
    x = torch.randn(3, *SHAPE)
    given = x[0].clone().requires_grad_(), *TABLES, None, None, 3, False, False, "bshd"
    torch.library.opcheck(ROTARY, given)
    launched.clear()
    close(vmap(lambda x: nt.apply_rotary(x, *TABLES))(x), naive(x))
    assert launched.take() == ["rotary"]
    close(grad(lambda x: nt.apply_rotary(x, *TABLES).square().sum())(x[0]), 2 * x[0])
    weight = torch.randn(SHAPE)
    found = vmap(grad(lambda x: (nt.apply_rotary(x, *TABLES) * weight).sum()))(x)
    close(found, nt.apply_rotary(weight, *TABLES, conjugate=True).expand_as(found))
    offsets = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    found = vmap(lambda x, o: nt.apply_rotary(x, *TABLES, offsets=o))(x, offsets)
    close(found[2, 1], naive(x[2, 1], 5))


def parts_of(q, k, v):
    return [nt.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 9))]


@pytest.mark.parametrize("way", CALLS)
def test_merged_parts_have_the_gradients_of_the_whole(way, launched):
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))

    def merged(q, k, v):
        return nt.merge_partials(*zip(*parts_of(q, k, v), strict=True))

    out, lse = CALLS[way](merged)(q, k, v)
    assert ("combine" in launched.families) == (way == "eager")
    whole, of_whole = nt.attention(q, k, v, return_lse=True)
    close((out, lse), (whole, of_whole))
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad((whole * weight).sum() + of_whole.square().sum(), (q, k, v))
    found = torch.autograd.grad((out * weight).sum() + lse.square().sum(), (q, k, v))
    close(found, wanted)


def test_parts_that_a_row_does_not_see():
    outs = [torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor([[[0.5, -torch.inf, -torch.inf]]], requires_grad=True),
        torch.tensor([[[1.5, 1.0, -torch.inf]]], requires_grad=True),
    ]
    out, lse = nt.merge_partials(outs, lses)
    made = torch.autograd.grad(out.square().sum(), (*outs, *lses), create_graph=True)
    first = torch.autograd.grad(out.square().sum(), (*outs, *lses), retain_graph=True)
    close(made, first)
    assert all(x.isfinite().all() for x in first) and lse[0, 0, 2] == -torch.inf
    assert not first[0][:, 1:].any() and first[1][:, 1].any() and not first[1][:, 2].any()
    second = torch.autograd.grad(made[0].square().sum(), outs)
    assert all(x.isfinite().all() for x in second)
    stacked = torch.stack(outs).detach().requires_grad_()
    again, _ = nt.merge_partials(stacked, torch.stack(lses).detach())
    again.sum().backward()
    assert stacked.grad.shape == stacked.shape
