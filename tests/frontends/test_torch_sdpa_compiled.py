"""Compiled code in which `scaled_dot_product_attention` is numflash's."""

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.nn import functional  # noqa: E402

import numflash.torch as nt  # noqa: E402
from tests.support.covering import ALL  # noqa: E402

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]
HEADS, WIDTH = 2, 16


@pytest.fixture(autouse=True)
def disabled():
    """Each test begins and ends with torch's own, and with nothing compiled."""
    torch._dynamo.reset()
    yield
    nt.disable()
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """Attention of (batch, seqlen, WIDTH), with what stands around it."""

    def __init__(self, attend=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attend, self.options = torch.nn.LayerNorm(WIDTH), attend, options
        self.to_heads, self.back = (torch.nn.Linear(WIDTH, n * WIDTH) for n in (3, 1))

    def forward(self, x, mask=None):
        parts = self.to_heads(self.norm(x)).chunk(3, -1)
        q, k, v = (y.view(*y.shape[:-1], HEADS, -1).transpose(1, 2) for y in parts)
        attend = self.attend or functional.scaled_dot_product_attention
        heads = attend(q, k, v, mask, **self.options)
        return x + self.back(heads.transpose(1, 2).flatten(-2))


def compiled(module, backend="aot_eager", **options):
    return torch.compile(module, fullgraph=True, backend=backend, **options)


def results(module, x, *mask):
    module.zero_grad()
    out = module(x, *mask)
    out.square().sum().backward()
    return out, *(parameter.grad for parameter in module.parameters())


def expect_same(found, want):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


WAYS = ["the function", "enable", "replacing_sdpa"]
BACKENDS = ["aot_eager", "inductor"] if ALL else ["aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_block_is_one_graph(way, backend, launched):
    x = torch.randn(1, 5, WIDTH)
    want = results(Block(is_causal=True), x)
    assert launched == []
    block = Block(
        nt.scaled_dot_product_attention if way == "the function" else None, is_causal=True
    )
    fast = compiled(block, backend)
    if way == "enable":
        nt.enable()
    with nt.replacing_sdpa() if way == "replacing_sdpa" else nullcontext():
        found = results(fast, x)
    assert launched.take() == ["forward", *BACKWARD]
    expect_same(found, want)
    if way == "replacing_sdpa":
        # Outside of the context it is compiled again.
        fast(x)
        assert launched.take() == []


def test_one_graph_of_many_lengths(launched):
    nt.enable()
    fast = compiled(Block(is_causal=True), dynamic=True)
    with torch.no_grad():
        for seqlen in (5, 7):
            found = fast(torch.ones(1, seqlen, WIDTH))
            assert launched.take() == ["forward"] and found.shape == (1, seqlen, WIDTH)


def test_a_mask_with_a_gradient(launched):
    x, mask = torch.randn(1, 5, WIDTH), torch.randn(HEADS, 5, 5, requires_grad=True)
    want = results(Block(), x, mask)
    slope, mask.grad = mask.grad, None
    nt.enable()
    found = results(compiled(Block()), x, mask)
    assert launched.take()[:4] == ["forward", *BACKWARD]
    expect_same((*found, mask.grad), (*want, slope))


def test_a_boolean_mask_with_a_row_masked_whole(launched):
    x, mask = torch.randn(1, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).tril(-1)
    want = results(Block(), x, mask)
    nt.enable()
    expect_same(results(compiled(Block()), x, mask), want)
    assert launched.take() == ["forward", *BACKWARD]


def test_dropout_is_drawn_anew(launched):
    nt.enable()
    x, fast = torch.randn(1, 8, WIDTH), compiled(Block(dropout_p=0.5))
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = fast(x), fast(x)
        torch.manual_seed(0)
        assert fast(x).equal(first) and not second.equal(first)
    assert launched.take() == ["forward"] * 3


@pytest.mark.parametrize("way", WAYS if ALL else ["enable"])
def test_torchs_own_runs_where_numflash_cannot(way, launched):
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    want = results(Block(is_causal=True).double(), x)
    block = Block(
        nt.scaled_dot_product_attention if way == "the function" else None, is_causal=True
    )
    fast = compiled(block.double())
    if way == "enable":
        nt.enable()
    with nt.replacing_sdpa() if way == "replacing_sdpa" else nullcontext():
        found = results(fast, x)
    assert launched == []
    expect_same(found, want)


def test_graphs_follow_enable_and_disable(launched):
    x, fast = torch.randn(1, 5, WIDTH), compiled(Block(is_causal=True))
    want = fast(x)
    assert launched.take() == []
    nt.enable()
    torch.testing.assert_close(fast(x), want, atol=1e-5, rtol=0)
    assert launched.take() == ["forward"]
    nt.disable()
    assert fast(x).equal(want) and launched == []


def test_modules_of_torch(launched):
    """Its own layer, in training, where it asks for its attention by the operator."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    x = torch.randn(1, 5, WIDTH)
    want = results(layer, x)
    nt.enable()
    found = results(compiled(layer), x)
    assert launched.take() == ["forward", *BACKWARD]
    expect_same(found, want)


def test_an_exported_program_keeps_numflashs_operator(launched):
    x, block = torch.randn(1, 5, WIDTH), Block(nt.scaled_dot_product_attention, is_causal=True)
    program = torch.export.export(block, (x,))
    assert any("numflash" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), Block(is_causal=True)(x), atol=1e-5, rtol=0)
    assert launched.take() == ["forward"]


@pytest.mark.skipif(not ALL, reason="compiles C++: NUMFLASH_TEST_ALL=1")
def test_what_is_kept_on_disk_is_not_confused(launched, tmp_path, monkeypatch):
    """Graphs of one process, found by the next: here after all that is in memory is forgotten."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, want = torch.randn(1, 5, WIDTH), None
    for _ in range(2):
        for switch, families in ((nt.disable, []), (nt.enable, ["forward"])):
            switch()
            torch._dynamo.reset()
            with torch.no_grad():
                found = compiled(Block(is_causal=True), "inductor")(x)
            assert launched.take() == families
            want = found if want is None else want
            torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
