"""Tiny random models: logits, gradients and generated tokens as with "eager", on our kernels.

Two models by default, without cases that others contain; all with NUMFLASH_TEST_ALL=1.
"""

import os

import pytest

pytest.importorskip(
    "transformers", reason='needs transformers: pip install "numflash[transformers]"'
)

import torch
from transformers import AttentionMaskInterface

import numflash.transformers
from tests.support import transformers_models as models
from tests.support.transformers_models import (
    DECODERS,
    HOLES,
    IDS,
    LEFT,
    RIGHT,
    error,
    generated,
    gradients,
    logits,
)

NAME = numflash.transformers.NAME
ALL = os.environ.get("NUMFLASH_TEST_ALL") == "1"
STATIC = {"cache_implementation": "static", "disable_compile": True}
POSITIONS = torch.tensor([[*range(5), *range(8)], [*range(2), *range(7), *range(4)]])


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = gradients(model, RIGHT)
    model.gradient_checkpointing_disable()
    model.eval()
    return found


BOTH = {"forward", "backward-dq", "backward-dkdv", "delta"}
OF_SINKS = {"array-sums"}
ONLY = {"forward"}
DECODE = {"forward", "combine"}
LENGTHS = {"forward", "combine", "prepare", "schedule"}
# Name -> (what to compare, the kernels that may run, of which "forward" must).
CASES = {
    "logits": (logits, ONLY),
    "right padding": (lambda m: logits(m, RIGHT), ONLY),
    "left padding": (lambda m: logits(m, LEFT), ONLY),
    "holes": (lambda m: logits(m, HOLES), ONLY),
    "gradients": (gradients, BOTH),
    "gradients, left padding": (lambda m: gradients(m, LEFT), BOTH),
    "gradients, packed": (
        lambda m: gradients(m, position_ids=POSITIONS, use_cache=False),
        BOTH,
    ),
    "gradients, checkpointing": (checkpointed, BOTH),
    "packed": (lambda m: logits(m, position_ids=POSITIONS, use_cache=False), ONLY),
    "generate": (generated, DECODE),
    "generate, left padding": (lambda m: generated(m, LEFT), DECODE),
    "generate, static": (lambda m: generated(m, **STATIC), LENGTHS),
    "generate, static, left padding": (lambda m: generated(m, LEFT, **STATIC), LENGTHS),
}
SOME = {
    "gemma2": (
        "left padding",
        "holes",
        "gradients, left padding",
        "gradients, checkpointing",
        "generate, left padding",
        "generate, static, left padding",
    ),
    "gpt_oss": (
        "logits",
        "left padding",
        "gradients, left padding",
        "packed",
        "generate, static",
    ),
    "llama": ("left padding",),
    "mistral": ("left padding",),
    "qwen3": ("packed",),
}
MATRIX = dict.fromkeys(DECODERS, CASES) if ALL else SOME


@pytest.fixture(autouse=True)
def registered():
    numflash.transformers.register()


def compared(model, run, launched) -> float:
    model.set_attn_implementation("eager")
    wanted = run(model)
    assert launched == []
    model.set_attn_implementation(NAME)
    return error(run(model), wanted)


@pytest.mark.parametrize("name, case", [(n, case) for n in MATRIX for case in MATRIX[n]])
def test_as_eager(name, case, launched):
    run, kernels = CASES[case]
    assert compared(models.decoder(name), run, launched) < 5e-6
    assert "forward" in launched.families and set(launched.families) <= kernels | OF_SINKS
    if kernels is BOTH:
        assert {"backward-dq", "backward-dkdv"} <= set(launched.families)


def test_a_window_longer_than_a_static_cache(launched):
    """The cache of its layers is no longer than the others'."""
    model = models.decoder("mistral", sliding_window=40)
    assert compared(model, lambda m: generated(m, LEFT, **STATIC), launched) < 5e-6
    assert set(launched.take()) <= LENGTHS


def test_every_layer_runs_and_attention_matters(launched):
    """One kernel a layer; with keys that padding hides, the logits are others."""
    model = models.decoder("gemma2")
    model.set_attn_implementation(NAME)
    (found,) = logits(model, LEFT)
    assert launched.take() == ["forward"] * 2
    assert error([logits(model)[0][LEFT.bool()]], [found]) > 1e-2


def test_without_our_mask_function_models_are_wrong(launched, monkeypatch):
    """So that the tests above see a mask that is not passed."""
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    model = models.decoder("gemma2")
    assert compared(model, lambda m: logits(m, LEFT), launched) > 1e-2
    assert compared(model, lambda m: logits(m), launched_again := []) > 1e-2
    assert launched_again == []  # its window is the mask's


@pytest.mark.parametrize("padding", [None, RIGHT, HOLES] if ALL else [HOLES])
def test_an_encoder(padding, launched):
    model = models.encoder()

    def run(model):
        model.zero_grad()
        found = model(input_ids=IDS, attention_mask=padding).last_hidden_state
        kept = found if padding is None else found[padding.bool()]
        weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
        (kept * weights).sum().backward()
        return [kept.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert compared(model, run, launched) < 5e-6
    assert set(launched.take()) == BOTH


@pytest.mark.parametrize("kind", ["Bart", "T5"] if ALL else ["T5"])
def test_an_encoder_and_a_decoder(kind, launched):
    """Cross attention; in T5 a learned bias of positions, with its gradient."""
    model = models.encoder_decoder(kind)
    decoder_ids = IDS[:, :7]

    def run(model):
        model.zero_grad()
        given = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": decoder_ids}
        found = model(**given).logits
        found.square().sum().backward()
        return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert compared(model, run, launched) < 5e-6
    assert launched.take().count("forward") == 3


@pytest.mark.skipif(not ALL, reason="NUMFLASH_TEST_ALL=1 runs it")
def test_an_encoder_and_a_decoder_generate(launched):
    model = models.encoder_decoder()

    def run(model):
        given = {"input_ids": IDS, "attention_mask": RIGHT}
        found = model.generate(**given, max_new_tokens=3, do_sample=False, num_beams=1)
        return [found.float()]

    assert compared(model, run, launched) == 0
    assert set(launched.take()) <= DECODE


@pytest.mark.parametrize("kind", ["bool", "float"] if ALL else ["float"])
def test_a_mask_of_four_axes(kind, launched):
    model = models.decoder("llama", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(5)
    kept = torch.rand(2, 1, 13, 13, generator=generator) > 0.4
    kept |= torch.eye(13, dtype=torch.bool)
    added = torch.where(kept, torch.randn(kept.shape, generator=generator), -1e9)
    given = {"eager": torch.where(kept, 0.0, -1e9), NAME: kept}
    if kind == "float":
        given = {"eager": added, NAME: added}
    found = []
    for name, each in given.items():
        model.set_attn_implementation(name)
        found.append(gradients_of(model, each))
    assert error(found[1], found[0]) < 5e-6
    assert set(launched.take()) == BOTH


def gradients_of(model, mask):
    model.zero_grad()
    found = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    found.square().sum().backward()
    return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_in_16_bits(how, launched):
    """The error against float32 is at most twice eager's."""
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    wanted = logits(models.decoder("gpt_oss"), LEFT)
    model = models.decoder("gpt_oss")
    if how != "autocast":
        model = model.to(dtype)
    errors = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            errors.append(error(logits(model, LEFT), wanted))
    assert errors[1] < 2 * errors[0]
    assert launched.take() == ["forward"] * 2
