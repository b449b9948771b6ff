"""What README.md shows of each framework runs, with smaller shapes, on numflash's kernels."""

import re
from pathlib import Path

import pytest

import numflash

README = (Path(numflash.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(module: str, smaller: dict[str, str]) -> dict:
    """Run the block that imports a front end; what it defines."""
    (code,) = [block for block in BLOCKS if f"import {module}" in block]
    for text, other in smaller.items():
        assert text in code
        code = code.replace(text, other)
    given = {}
    exec(code, given)
    return given


def test_torch(launched):
    torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')
    try:
        found = run("numflash.torch", {'2, 1024, 16, 64, device="cuda"': "1, 32, 2, 16"})
        assert all(found[name].grad.isfinite().all() for name in "qkv")
        assert {"forward", "backward-dq"} <= set(launched.take())
        x = torch.randn(1, 1, 16, 16)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert launched.take() == ["forward"]
    finally:
        found["numflash"].torch.disable()


def test_transformers(launched, monkeypatch):
    transformers = pytest.importorskip(
        "transformers", reason='needs transformers: pip install "numflash[transformers]"'
    )
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )

    def from_pretrained(name, **options):
        return transformers.AutoModelForCausalLM.from_config(config, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = run("numflash.transformers", {})["model"]
    ids = model.dummy_inputs["input_ids"] % 32
    assert model(ids).logits.isfinite().all()
    assert launched.take() == ["forward"]


def test_jax(launched):
    pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')
    found = run("numflash.jax", {"2, 1024, 16, 64": "1, 32, 2, 16"})
    assert [x.shape for x in found["gradients"]] == [(1, 32, 2, 16)] * 3
    assert {"forward", "backward-dq"} <= set(launched.families)
