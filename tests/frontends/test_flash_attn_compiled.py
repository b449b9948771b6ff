"""Programs with flash-attn's names under `torch.compile(fullgraph=True)`."""

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.flash_attn import version_3  # noqa: E402
from numflash.flash_attn.layers.rotary import apply_rotary_emb  # noqa: E402
from tests.support.covering import some, thorough  # noqa: E402

_CU = torch.tensor([0, 5, 12], dtype=torch.int32)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


def _block(qkv, dropout_p):
    """Packed and dense attention, one after another."""
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, _CU, 7, dropout_p, causal=True)
    q, kv = qkv[None, :, 0], torch.stack([out, out], dim=1)[None]
    out = flash_attn.flash_attn_kvpacked_func(q, kv, softcap=2.0, window_size=(5, None))
    return flash_attn.flash_attn_func(q, out, out, attention_chunk=6)


def test_training(launched):
    torch.manual_seed(0)
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    qkv, dout = torch.randn(12, 3, 1, 16), torch.randn(1, 12, 1, 16)
    found = []
    for block in (_block, compiled):
        x = qkv.clone().requires_grad_()
        torch.manual_seed(1)
        out = block(x, 0.1)
        found.append((out.detach(), *torch.autograd.grad(out, x, dout)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    ran = launched.families
    assert ran.count("backward-dkdv") == 6
    assert ran[: len(ran) // 2] == ran[len(ran) // 2 :]


def test_numbers_that_change(launched):
    torch.manual_seed(0)
    q = torch.randn(1, 12, 1, 16)

    def call(q, chunk, scale):
        out, lse = version_3.flash_attn_func(
            q, q, q, scale, True, attention_chunk=chunk, return_attn_probs=True
        )
        return out, lse

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for chunk, scale in ((4, 0.1), (8, 0.2), (3, 0.3)):
        for x, y in zip(compiled(q, chunk, scale), call(q, chunk, scale), strict=True):
            assert torch.equal(x, y)
        results.append(x)
    assert not torch.equal(results[0], results[1])
    assert launched.take() == ["forward"] * 6


_ROTARY = [(False, False), (True, True), (False, True), (True, False)]


@pytest.mark.parametrize("interleaved, inplace", some(_ROTARY, (False, False), (True, True)))
def test_rotary(interleaved, inplace, launched):
    torch.manual_seed(0)
    qkv, dout, angles = torch.randn(2, 6, 3, 1, 16), torch.randn(2, 6, 1, 16), torch.rand(9, 8)
    cos, sin = angles.cos(), angles.sin()

    def rotated(qkv, offsets):
        q, k = (qkv * 1)[:, :, 0], (qkv * 1)[:, :, 1]
        options = {"interleaved": interleaved, "inplace": inplace}
        q, k = (apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, **options) for x in (q, k))
        return q * k

    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True)
    for offsets in (1, torch.tensor([3, 2])):
        found = []
        for function in (rotated, compiled):
            x = qkv.clone().requires_grad_()
            out = function(x, offsets)
            found.append((out.detach(), *torch.autograd.grad(out, x, dout)))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)
    assert set(launched.families) == {"rotary"}
    assert len(launched) >= 2 * 2 * 4


@thorough
@pytest.mark.parametrize("is_packed", [False, True])
def test_opcheck_of_rotary(is_packed):
    torch.manual_seed(0)
    x, angles = torch.randn(1, 6, 16).movedim(0, 1), torch.rand(9, 8)
    ends = torch.tensor([0, 4, 6], dtype=torch.int32) if is_packed else None
    x = (x if is_packed else x[None]).requires_grad_()
    given = x, angles.cos(), angles.sin(), None, ends, 2, False, False, "bshd"
    torch.library.opcheck(torch.ops.numflash.apply_rotary.default, given)
