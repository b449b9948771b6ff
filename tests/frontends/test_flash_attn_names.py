"""A program written for flash-attn with its imports renamed, and the small functions beside."""

import re
import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.flash_attn import bert_padding, version_3  # noqa: E402
from numflash.flash_attn.flash_attn_interface import flash_attn_func  # noqa: E402
from numflash.flash_attn.layers.rotary import apply_rotary_emb  # noqa: E402
from tests.frontends.flash_attn_reference import attend, attend_alone, rotate  # noqa: E402

PROGRAM = """
import torch
import torch.nn.functional as F
from packaging import version

import flash_attn
from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func
from flash_attn.layers.rotary import apply_rotary_emb

assert version.parse(flash_attn.__version__) >= version.parse("2.1")


def block(weight, x, mask, angles):
    batch, seqlen, heads, dim = x.shape
    qkv = torch.einsum("bshd,tde->bsthe", x, weight)
    q, k, v = qkv.unbind(dim=2)
    q, k = (apply_rotary_emb(x, angles.cos(), angles.sin()) for x in (q, k))
    qkv = torch.stack([q, k, v], dim=2)
    packed, indices, cu_seqlens, longest, *_ = unpad_input(qkv, mask)
    out = flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, 0.0, causal=True)
    return x + pad_input(out, indices, batch, seqlen), qkv


def train(weight, x, mask, angles):
    losses = []
    for _ in range(2):
        weight = weight.detach().requires_grad_()
        out, _ = block(weight, x, mask, angles)
        loss = F.mse_loss(out[mask], x.roll(1, dims=-1)[mask])
        loss.backward()
        weight = weight - 0.5 * weight.grad
        losses.append(loss.item())
    return losses, weight.detach()


@torch.no_grad()
def generate(weight, x, angles, tokens):
    batch, seqlen, heads, dim = x.shape
    k_cache, v_cache = torch.zeros(2, batch, seqlen + tokens, heads, dim, dtype=x.dtype).unbind()
    _, qkv = block(weight, x, torch.ones(batch, seqlen, dtype=torch.bool), angles)
    k_cache[:, :seqlen], v_cache[:, :seqlen] = qkv[:, :, 1], qkv[:, :, 2]
    out = flash_attn_qkvpacked_func(qkv, softmax_scale=None, causal=True, window_size=(-1, -1))
    lengths = torch.full((batch,), seqlen, dtype=torch.int32)
    for _ in range(tokens):
        q, k, v = torch.einsum("bshd,tde->bsthe", out[:, -1:], weight).unbind(dim=2)
        out = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos=angles.cos(),
            rotary_sin=angles.sin(),
            rotary_interleaved=False,
            cache_seqlens=lengths,
            causal=True,
        )
        lengths += 1
    return out, k_cache
"""


def _renamed(program: str) -> str:
    program = re.sub(r"^from flash_attn", "from numflash.flash_attn", program, flags=re.M)
    return re.sub(
        r"^import flash_attn$", "import numflash.flash_attn as flash_attn", program, flags=re.M
    )


def _as_defined() -> dict[str, ModuleType]:
    """flash-attn as its documentation defines it, for the program before it is renamed."""
    modules = {
        name: ModuleType(name)
        for name in (
            "flash_attn",
            "flash_attn.bert_padding",
            "flash_attn.flash_attn_interface",
            "flash_attn.layers",
            "flash_attn.layers.rotary",
        )
    }

    def varlen(qkv, cu_seqlens, longest, dropout_p, causal):
        ends = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        return attend_alone(*qkv.unbind(1), ends, ends, causal=causal)[0].to(qkv.dtype)

    def dense(qkv, softmax_scale, causal, window_size):
        return attend(*qkv.unbind(2), causal=causal)[0].to(qkv.dtype)

    def cached(q, k_cache, v_cache, k, v, *, rotary_cos, rotary_sin, cache_seqlens, **more):
        assert more == {"rotary_interleaved": False, "causal": True}
        place = cache_seqlens.long()[:, None]
        q, k = (rotate(x, rotary_cos, rotary_sin, place, False) for x in (q, k))
        batch, count = torch.arange(len(q)), int(place[0, 0]) + 1
        k_cache[batch, place[:, 0]], v_cache[batch, place[:, 0]] = k[:, 0], v[:, 0]
        return attend(q, k_cache[:, :count], v_cache[:, :count])[0].to(q.dtype)

    def rotary(x, cos, sin):
        return rotate(x, cos, sin, torch.arange(x.shape[1])[None], False)

    def unpad(x, mask):
        lengths = mask.sum(1)
        ends = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
        return x[mask], mask, ends, int(lengths.max()), lengths

    def pad(x, mask, batch, seqlen):
        return torch.zeros(batch, seqlen, *x.shape[1:], dtype=x.dtype).index_put((mask,), x)

    modules["flash_attn"].__version__ = "2.8.4"
    modules["flash_attn"].flash_attn_varlen_qkvpacked_func = varlen
    modules["flash_attn"].flash_attn_with_kvcache = cached
    modules["flash_attn.flash_attn_interface"].flash_attn_qkvpacked_func = dense
    modules["flash_attn.bert_padding"].unpad_input = unpad
    modules["flash_attn.bert_padding"].pad_input = pad
    modules["flash_attn.layers.rotary"].apply_rotary_emb = rotary
    return modules


def test_a_program_with_its_imports_renamed(monkeypatch, launched):
    for name, module in _as_defined().items():
        monkeypatch.setitem(sys.modules, name, module)
    results = []
    for program in (PROGRAM, _renamed(PROGRAM)):
        torch.manual_seed(0)
        names = {}
        exec(compile(program, "a program", "exec"), names)
        weight, x = torch.randn(3, 16, 16) * 0.3, torch.randn(2, 8, 1, 16)
        mask, angles = torch.arange(8) < torch.tensor([[8], [5]]), torch.rand(12, 8)
        losses, weight = names["train"](weight, x, mask, angles)
        generated = names["generate"](weight, x, angles, 2)
        assert losses[1] < losses[0]
        results.append((torch.tensor(losses), weight, *generated))
        if program is PROGRAM:
            assert launched == []
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=5e-3, rtol=5e-3)
    ran = launched.take()
    assert ran.count("backward-dkdv") == 2
    assert ran.count("forward") == 2 + 1 + 1 + 2
    assert ran.count("rotary") == 2 * 4 + 2


def test_submodules():
    assert flash_attn_func is flash_attn.flash_attn_func
    assert flash_attn.layers.rotary.apply_rotary_emb is apply_rotary_emb
    assert flash_attn.bert_padding is bert_padding


def test_padding_taken_out_and_put_back():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 2, 4, dtype=torch.float64).requires_grad_()
    mask = torch.arange(6) < torch.tensor([[4], [0], [6]])
    unused = (torch.arange(6) == 5) & ~mask
    packed, indices, ends, longest, used = bert_padding.unpad_input(x, mask.int(), unused.int())
    assert (ends.tolist(), ends.dtype, longest) == ([0, 5, 6, 12], torch.int32, 6)
    assert used.tolist() == [4, 0, 6]
    assert torch.equal(packed, x[mask | unused])
    put_back = bert_padding.pad_input(packed, indices, 3, 6)
    assert torch.equal(put_back, torch.where((mask | unused)[..., None, None], x, 0))
    (got,) = torch.autograd.grad(put_back.square().sum(), x)
    assert torch.equal(got, 2 * put_back.detach())
    rows = bert_padding.index_first_axis(x.flatten(0, 1), indices)
    assert torch.equal(rows, packed)


def test_several_sequences_in_a_row_of_a_batch():
    x = torch.arange(18.0).reshape(3, 6, 1)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [0, 3, 2, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    unpad = bert_padding.unpad_input_for_concatenated_sequences
    packed, indices, ends, longest = unpad(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert packed.flatten().tolist() == indices.tolist()
    assert (ends.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [3, torch.tensor([3, 0])], ids=["3", "tensor"])
def test_rotary(interleaved, offsets, launched):
    torch.manual_seed(0)
    x, dout = torch.randn(2, 2, 9, 2, 32).unbind(0)
    x.requires_grad_()
    angles = torch.rand(12, 8)
    cos, sin = angles.cos(), angles.sin()
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    places = torch.as_tensor(offsets).expand(2)[:, None] + torch.arange(9)
    wanted = rotate(x, cos, sin, places, interleaved)
    torch.testing.assert_close(out, wanted)
    (got,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, x, dout)[0])
    twice = x.detach() * 1
    given = twice.requires_grad_() * 1
    same = apply_rotary_emb(given, cos, sin, interleaved, True, offsets)
    assert same.data_ptr() == given.data_ptr()
    torch.testing.assert_close(same, wanted)
    torch.testing.assert_close(torch.autograd.grad(same, twice, dout)[0], got)
    assert launched.take() == ["rotary"] * 4


def test_rotary_of_packed_sequences(launched):
    torch.manual_seed(0)
    x, angles = torch.randn(9, 2, 16), torch.rand(8, 4)
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    out = apply_rotary_emb(x, angles.cos(), angles.sin(), cu_seqlens=ends, max_seqlen=6)
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(
        out, rotate(x[None], angles.cos(), angles.sin(), places[None], False)[0]
    )
    assert launched.take() == ["rotary"]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_out", [False, True])
def test_combine(dtype, has_out, launched):
    torch.manual_seed(0)
    outs, lses = torch.randn(3, 2, 5, 2, 8), torch.randn(3, 2, 5, 2)
    out = torch.empty(2, 5, 2, 8, dtype=dtype or torch.float32) if has_out else None
    joined, lse = flash_attn.flash_attn_combine(outs, lses, out, dtype)
    assert joined.dtype == (dtype or torch.float32)
    assert (joined is out) == has_out
    weights = torch.softmax(lses, 0)[..., None]
    rtol = 1e-5 if dtype is None else 1e-2
    torch.testing.assert_close(joined.float(), (weights * outs).sum(0), atol=rtol, rtol=rtol)
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0))
    assert launched.take()[-1] == "combine"


def test_version_3_has_pairs_of_results(launched):
    q, k, v = torch.randn(3, 1, 16, 1, 16)
    out, lse = version_3.flash_attn_func(q, k, v, 0.3, True, return_attn_probs=True)
    wanted, wanted_lse, _ = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, True, **_WITH_LSE)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert launched.take() == ["forward"] * 2
    with pytest.raises(TypeError, match="takes 17 arguments by position, got 18"):
        version_3.flash_attn_func(*[None] * 18)


_WITH_LSE = {"return_attn_probs": True}
