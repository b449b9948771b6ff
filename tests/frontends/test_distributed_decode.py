"""Decoding over ranks, and keys that travel in 8 bits, on PyTorch's tensors."""

import pytest

torch = pytest.importorskip("torch")

from numflash.distributed.decode import decode, shard_lengths, shard_positions  # noqa: E402
from numflash.distributed.wire import wire_of  # noqa: E402
from tests.support.ranks import on_ranks  # noqa: E402

RANKS, PAGE = 2, 4


def operands(tokens):
    torch.manual_seed(0)
    q = torch.randn(2, 1, 4, 16).bfloat16()
    return q, torch.randn(2, tokens, 2, 16).bfloat16(), torch.randn(2, tokens, 2, 8).bfloat16()


def attended(q, k, v, seqlens):
    """Attention in float64 of the first keys of each sequence."""
    found = []
    for b, n in enumerate(seqlens.tolist()):
        one = (x[b : b + 1].transpose(1, 2).double() for x in (q, k[:, :n], v[:, :n]))
        found.append(torch.nn.functional.scaled_dot_product_attention(*one, enable_gqa=True))
    return torch.cat(found).transpose(1, 2)


@pytest.mark.parametrize("scatter_heads", [False, True])
def test_pages_of_tensors(scatter_heads):
    q, k, v = operands(12)
    seqlens = torch.tensor([11, 3], dtype=torch.int32)

    def work(comm):
        mine = shard_lengths(seqlens, PAGE, comm.rank, RANKS)
        assert mine.dtype == torch.int32
        rows = shard_positions(torch.arange(2 * PAGE), PAGE, comm.rank, RANKS).clamp(max=11)
        shards = (x[:, rows] for x in (k, v))
        more = {"seqlens_k": mine, "scatter_heads": scatter_heads, "return_lse": True}
        return decode(q, *shards, comm=comm, **more)

    results = on_ranks(RANKS, work)
    if scatter_heads:
        out = torch.cat([out for out, _ in results], 2)
    else:
        (out, lse), (other, other_lse) = results
        assert torch.equal(out, other) and torch.equal(lse, other_lse)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), attended(q, k, v, seqlens), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", [None, "e4m3"])
def test_keys_of_tensors_travel(kind):
    _, k, v = operands(12)
    wire = wire_of(kind, k, v)
    own, arrived = wire.new(12), wire.new(12, zeroed=True)
    wire.fill(own, 4, k[:, :8], v[:, :8])
    sides = wire.messages(own, 4, 12), wire.messages(arrived, 4, 12)
    for source, into in zip(*sides, strict=True):
        assert source.dtype == torch.uint8 and source.dim() == 1
        into.copy_(source)
    for x, found, rounded in zip((k, v), wire.unpack(arrived), wire.rounded(k, v), strict=True):
        assert found.dtype == torch.bfloat16 and not found[:, :4].any()
        torch.testing.assert_close(found[:, 4:], rounded[:, :8], atol=0, rtol=0)
        share = 0.0 if kind is None else 0.07
        assert ((rounded - x).abs() <= share * x.abs().amax(-1, keepdim=True)).all()
