"""A program that was written for flash-attn: transformers' own way to it, by numflash's names."""

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")
pytest.importorskip(
    "transformers", reason="needs transformers: pip install numflash[transformers]"
)

from transformers import modeling_flash_attention_utils as program  # noqa: E402

import numflash.flash_attn as flash_attn  # noqa: E402
from tests.frontends.flash_attn_reference import attend  # noqa: E402

# What it found before, if a test of transformers has run in this process.
_REMEMBERED = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


@pytest.fixture
def forward(monkeypatch):
    """Its function for flash-attn, which finds numflash's names where it imports the other's."""
    found = (
        flash_attn.flash_attn_func,
        flash_attn.flash_attn_varlen_func,
        flash_attn.flash_attn_with_kvcache,
        flash_attn.bert_padding.pad_input,
        flash_attn.bert_padding.unpad_input,
    )
    monkeypatch.setattr(program, "_lazy_imports", lambda *_, **__: found)
    for name in _REMEMBERED:
        monkeypatch.setattr(program, name, None)
    program.lazy_import_flash_attention("ours")

    def forward(q, k, v, mask, **options):
        return program._flash_attention_forward(
            q, k, v, mask, q.shape[1], True, implementation="ours", **options
        )

    return forward


def test_padding_a_window_and_softcap(forward, launched):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 12, 2, 16))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    out = forward(q, k, v, mask, sliding_window=5, softcap=3.0)
    assert launched.take() == ["schedule", "forward"]
    dout = torch.randn_like(out) * mask[..., None, None]
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for entry, rows in enumerate((slice(None), slice(4, None))):
        own = [x[entry : entry + 1, rows] for x in (q, k, v)]
        wanted, _ = attend(*own, causal=True, window_size=(4, 4), softcap=3.0)
        torch.testing.assert_close(out[entry, rows].double(), wanted[0], atol=1e-3, rtol=1e-3)
        for x, y in zip(
            grads, torch.autograd.grad(wanted, own, dout[None, entry, rows].double()), strict=True
        ):
            torch.testing.assert_close(x[entry, rows], y[0], atol=1e-3, rtol=1e-3)


def test_sequences_packed_by_their_positions(forward, launched):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 2, 16)
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    sinks = torch.randn(2)
    out = forward(q, k, v, None, position_ids=places, s_aux=sinks)
    for rows in (slice(5), slice(5, 12)):
        own = (x[:, rows] for x in (q, k, v))
        wanted, _ = attend(*own, causal=True, learnable_sink=sinks)
        torch.testing.assert_close(out[:, rows].double(), wanted, atol=1e-3, rtol=1e-3)
    assert launched.take() == ["schedule", "forward"]
