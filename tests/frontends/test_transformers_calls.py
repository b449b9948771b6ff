"""What layers ask for: caches, sequences without padding, dropout, and what is refused."""

import inspect
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip(
    "transformers", reason='needs transformers: pip install "numflash[transformers]"'
)

import torch
import transformers
from transformers import DataCollatorWithFlattening

import numflash.transformers
from numflash.calls import ready
from numflash.calls.launch import Launcher
from numflash.frontends.transformers import expect_version
from numflash.frontends.transformers.attention import attention
from numflash.frontends.transformers.masks import mask
from numflash.reference import dropout_mask
from tests.support import transformers_models as models
from tests.support.transformers_models import IDS, LEFT, NO_PADDING, error, logits

NAME = numflash.transformers.NAME
# What models call their cache in this version.
_PARAMETERS = inspect.signature(transformers.LlamaModel.forward).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"


@pytest.fixture(autouse=True)
def registered():
    numflash.transformers.register()


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, each with all that makes it another one, of what is launched."""
    found, bind = [], Launcher.bind

    def recorded(self, operands):
        found.append(str(self))
        return bind(self, operands)

    monkeypatch.setattr(Launcher, "bind", recorded)
    return found


class Layer(torch.nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def tensors(*tokens: int, batch: int = 1, heads: int = 2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    lengths = tokens if len(tokens) > 1 else tokens * 2
    return [
        torch.randn(batch, heads, n, 8, generator=generator, dtype=dtype)
        for n in (lengths[0], lengths[1], lengths[1])
    ]


TOKENS = 6  # of keys 13 to 18
ONE_LAYER = {"num_hidden_layers": 1}
ALL = os.environ.get("NUMFLASH_TEST_ALL") == "1"


def decoding(model, tokens: int, cache, padding):
    """Logits of a prompt and of tokens after it, fed one by one."""
    found = []
    with torch.no_grad():
        for step in range(tokens):
            first = step == 0
            given = IDS if first else IDS[:, step : step + 1]
            more = torch.ones(2, step, dtype=torch.long)
            out = model(
                input_ids=given,
                attention_mask=torch.cat([padding, more], 1),
                **{CACHE: cache},
            )
            found.append(out.logits[:, -1])
            yield found


@pytest.mark.parametrize("name, padding", [("llama", LEFT)] + [("gemma2", LEFT)] * ALL)
def test_decoded_tokens_share_their_kernels(name, padding, kernels, launched):
    """Keys that grow ask for no other kernel, whatever their number."""
    model = models.decoder(name, **(ONE_LAYER if name == "llama" else {}))
    model.set_attn_implementation(NAME)
    cache = transformers.DynamicCache(config=model.config)
    known = None
    for step, _ in enumerate(decoding(model, TOKENS, cache, padding)):
        if step >= 2:
            assert known is None or set(kernels) == known
            known = set(kernels)
        kernels.clear()
    assert "forward" in launched.families


@pytest.mark.parametrize("name, padding", [("gemma2", NO_PADDING)] + [("llama", LEFT)] * ALL)
def test_with_a_static_cache_nothing_is_made_ready_anew(name, padding, monkeypatch):
    """A window's cache of a static size, which fills while tokens come, asks twice."""
    model = models.decoder(name, **({"sliding_window": 17} if name == "gemma2" else ONE_LAYER))
    model.set_attn_implementation(NAME)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    made = []
    for _ in decoding(model, TOKENS, cache, padding):
        made.append(len(ready._ready))
    new = [b - a for a, b in pairwise(made[1:])]
    assert new[0] == 0 and sum(1 for n in new if n) <= (name == "gemma2"), new


def test_chunks_of_a_prompt_and_of_a_window():
    """A prompt in parts, with a window that is shorter than what comes before."""
    model = models.decoder("mistral", **ONE_LAYER)
    found = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(input_ids=IDS[:, a:b], **{CACHE: cache}).logits
                for a, b in ((0, 4), (4, 10), (10, 13))
            ]
        found[name] = parts
    assert error(found[NAME], found["eager"]) < 5e-6


def test_a_collator_without_padding(launched):
    """Its cu_seq_lens become those of attention_varlen; windows are those of the mask."""
    model = models.decoder("mistral", **ONE_LAYER)
    rows = [{"input_ids": IDS[0, :9].tolist()}, {"input_ids": IDS[1, :7].tolist()}]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    del batch["labels"]
    assert {"cu_seq_lens_q", "max_length_q"} <= set(batch)
    found = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        launched.clear()
        result = model(**batch, use_cache=False).logits
        result.square().sum().backward()
        found[name] = [result.detach(), *(p.grad.clone() for p in model.parameters())]
    assert error(found[NAME], found["eager"]) < 5e-6
    assert {"forward", "schedule", "backward-dq"} <= set(launched.families)
    alone = []
    for row in rows:
        with torch.no_grad():
            alone.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0])
    assert error([found[NAME][0][0]], [torch.cat(alone)]) < 5e-6


def test_sequences_without_a_mask():
    """As of encoders of images: both ways, and a window."""
    q, k, v = tensors(14)
    places = torch.tensor([0, 5, 14])
    given = {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": 9}
    found, _ = attention(Layer(False), q, k, v, None, **given)
    parts = [
        attention(Layer(False), *(x[:, :, a:b] for x in (q, k, v)), None)[0]
        for a, b in ((0, 5), (5, 14))
    ]
    assert error([found], [torch.cat(parts, 1)]) < 1e-6
    found, _ = attention(Layer(), q, k, v, None, sliding_window=3, **given)
    inside = mask(
        batch_size=1,
        q_length=9,
        kv_length=9,
        mask_function=transformers.masking_utils.sliding_window_causal_mask_function(3),
    )
    part, _ = attention(Layer(), *(x[:, :, 5:] for x in (q, k, v)), inside)
    assert error([found[:, 5:]], [part]) < 1e-6


def test_sequences_need_a_batch_of_one():
    q, k, v = tensors(8, batch=2)
    with pytest.raises(ValueError, match="batch of one, in which all sequences lie, got 2"):
        attention(Layer(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, 8]))


def test_of_several_batch_entries_the_mask_holds():
    q, k, v = tensors(8, batch=2)
    positions = torch.tensor([[*range(5), *range(3)], [*range(2), *range(6)]])
    function = transformers.masking_utils.and_masks(
        transformers.masking_utils.remap_positions_for_packed_sequence(
            transformers.masking_utils.causal_mask_function, positions
        ),
        transformers.masking_utils.packed_sequence_mask_function((positions == 0).cumsum(-1)),
    )
    made = mask(batch_size=2, q_length=8, kv_length=8, mask_function=function)
    assert made.packed is not None
    found = [attention(Layer(), q, k, v, made, **more)[0] for more in ({}, {"cu_seq_lens_q": q})]
    assert torch.equal(*found)


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("layer", [False, True])
def test_without_a_mask_the_layer_says_whether_it_is_causal(layer, is_causal):
    q, k, v = tensors(6)
    found, weights = attention(Layer(layer), q, k, v, None, is_causal=is_causal, scaling=0.5)
    causal = layer if is_causal is None else is_causal
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5)
    assert weights is None and found.is_contiguous()
    assert error([found], [wanted.transpose(1, 2)]) < 1e-6
    one, _ = attention(Layer(layer), q[:, :, :1], k, v, None)
    assert error([one], [attention(Layer(False), q, k, v, None)[0][:, :1]]) < 1e-6


def test_dropout_in_training_alone(launched):
    """The weights that a seed drops, forward and backward; the seed is PyTorch's."""
    q, k, v = (x.requires_grad_() for x in tensors(12))
    torch.manual_seed(7)
    found, _ = attention(Layer(), q, k, v, None, dropout=0.25)
    found.square().sum().backward()
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, (1,)))
    kept = torch.tensor(dropout_mask(1, 2, 12, 12, dropout_p=0.25, seed=seed))
    given = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    scores = given[0] @ given[1].transpose(2, 3) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.softmax(scores, -1) * kept / 0.75
    wanted = (weights @ given[2]).transpose(1, 2)
    wanted.square().sum().backward()
    pairs = zip((q, k, v), given, strict=True)
    assert error([found.detach()], [wanted.detach()]) < 1e-5
    assert all(error([a.grad], [b.grad]) < 1e-5 for a, b in pairs)
    again, _ = attention(Layer(), q, k, v, None, dropout=0.25)
    assert error([again.detach()], [found.detach()]) > 1e-2
    model = models.decoder("llama", attention_dropout=0.5, **ONE_LAYER)
    model.set_attn_implementation(NAME)
    assert torch.equal(logits(model)[0], logits(model)[0])
    model.train()
    assert not torch.equal(logits(model)[0], logits(model)[0])
    assert set(launched.take()) == {"forward", "delta", "backward-dq", "backward-dkdv"}


def test_dropout_and_checkpointing():
    """What is computed again drops the same weights."""
    model = models.decoder("llama", attention_dropout=0.5, **ONE_LAYER)
    model.set_attn_implementation(NAME)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(models.gradients(model, LEFT))
    assert error(*found) < 1e-6


def test_a_bias_of_positions_and_sinks_have_gradients():
    q, k, v = tensors(9)
    bias = torch.randn(1, 2, 9, 9).requires_grad_()
    added = torch.randn(1, 1, 9, 9)
    sinks = torch.randn(2, dtype=torch.bfloat16).requires_grad_()
    found, _ = attention(Layer(), q, k, v, added, position_bias=bias, s_aux=sinks)
    found.square().sum().backward()
    grads = bias.grad.clone(), sinks.grad.clone()
    bias.grad = sinks.grad = None
    scores = q @ k.transpose(2, 3) * 8**-0.5 + added + bias
    of_sinks = sinks.float()[None, :, None, None].expand(1, 2, 9, 1)
    weights = torch.softmax(torch.cat([scores, of_sinks], -1), -1)[..., :-1]
    wanted = (weights @ v).transpose(1, 2)
    wanted.square().sum().backward()
    assert error([found.detach()], [wanted.detach()]) < 1e-5
    assert error([grads[0]], [bias.grad]) < 1e-5
    assert grads[1].dtype == torch.bfloat16 and error([grads[1]], [sinks.grad]) < 1e-2


@pytest.mark.parametrize("name", ["output_attentions", "head_mask", "sinks"])
def test_what_numflash_has_not_is_an_error_that_says_what_to_do(name):
    with pytest.raises(ValueError, match=rf'{name}.*set_attn_implementation\("eager"\)'):
        attention(Layer(), *tensors(4), None, **{name: True})


def test_a_model_that_is_asked_for_weights():
    model = models.decoder("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="eager"):
        model(input_ids=IDS, output_attentions=True)


def test_a_mask_of_other_sizes_is_refused():
    made = mask(batch_size=1, q_length=4, kv_length=6)
    with pytest.raises(ValueError, match=r"\(1, 4, 6\), the layer has \(1, 4, 5\)"):
        attention(Layer(), *tensors(4, 5), made)
    with pytest.raises(ValueError, match="mask must broadcast"):
        attention(Layer(), *tensors(4, 5), torch.ones(1, 1, 4, 6, dtype=torch.bool))


def test_dtypes_and_devices_are_refused():
    q, k, v = tensors(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        attention(Layer(), q, k, v, None)
    q, k, v = tensors(4)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(TypeError, match=f"^attention_mask must be boolean, or .*{dtype}"):
            attention(Layer(), q, k, v, torch.zeros(1, 1, 4, 4, dtype=dtype))
    with pytest.raises((TypeError, ValueError), match="dtype"):
        attention(Layer(), q, k.half(), v, None)
    with pytest.raises((TypeError, ValueError), match=r"meta|device"):
        attention(Layer(), q, k.to("meta"), v, None)


def test_the_name_and_why():
    """With "flash" in a name transformers looks for a package or a kernel on its hub."""
    assert NAME == "numfa" and NAME in transformers.AttentionInterface()
    transformers.AttentionInterface.register("numflash", attention)
    try:
        with pytest.raises(ValueError, match="flash attention implementation"):
            models.decoder("llama").set_attn_implementation("numflash")
    finally:
        del transformers.AttentionInterface._global_mapping["numflash"]


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.9.2", "5.9.0.dev0"])
def test_an_old_transformers_is_refused(version):
    with pytest.raises(ImportError, match=rf"transformers 5\.10 or later, got {version}"):
        expect_version(version)


@pytest.mark.parametrize("version", ["5.10.0", "5.24.0", "5.10.0rc1", "6.0.0.dev0"])
def test_a_new_transformers_is_taken(version):
    expect_version(version)


@pytest.mark.parametrize(
    "line, message",
    [
        ("m = types.ModuleType('transformers'); m.__version__ = '4.57.0'", "5.10 or later, got"),
        ("m = None", "needs transformers: pip install"),
    ],
)
def test_the_import_says_what_is_missing(line, message):
    program = f"import sys, types; {line}; sys.modules['transformers'] = m\n"
    program += "import numflash.transformers"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr


def test_the_example_runs(launched, capsys):
    path = Path(numflash.__file__).parents[1] / "examples" / "transformers_model.py"
    assert runpy.run_path(str(path))["main"]() == 0
    assert launched.families.count("forward") == 3
    assert launched.families.count("backward-dq") == 2
    assert "after a step" in capsys.readouterr().out
