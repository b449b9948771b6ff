"""`torch.compile` of whole models: one graph, numflash's operator in it, the logits of eager."""

import os

import pytest

pytest.importorskip(
    "transformers", reason='needs transformers: pip install "numflash[transformers]"'
)

import torch
from transformers import CompileConfig
from transformers.masking_utils import chunked_causal_mask_function

import numflash.transformers
from numflash.frontends.transformers.masks import mask
from tests.support import transformers_models as models
from tests.support.transformers_models import (
    IDS,
    LEFT,
    NO_PADDING,
    RIGHT,
    error,
    generated,
    gradients,
    logits,
)

NAME = numflash.transformers.NAME
ALL = os.environ.get("NUMFLASH_TEST_ALL") == "1"
POSITIONS = torch.tensor([[*range(5), *range(8)], [*range(2), *range(7), *range(4)]])


def hidden(model):
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=RIGHT).last_hidden_state
    return [found[RIGHT.bool()]]


# Name -> (model, what to compare, whether its mask is dense).
CASES = {
    "window, gradients": (
        lambda: models.decoder("mistral", num_hidden_layers=1),
        lambda m: gradients(m, LEFT, use_cache=False),
        False,
    ),
    "windows and none, gradients": (
        lambda: models.decoder("gemma2"),
        lambda m: gradients(m, LEFT, use_cache=False),
        False,
    ),
    "causal": (
        lambda: models.decoder("llama"),
        lambda m: logits(m, NO_PADDING, use_cache=False),
        False,
    ),
    "sinks": (
        lambda: models.decoder("gpt_oss"),
        lambda m: logits(m, LEFT, use_cache=False),
        False,
    ),
    "encoder": (models.encoder, hidden, False),
    "packed": (
        lambda: models.decoder("llama"),
        lambda m: logits(m, position_ids=POSITIONS, use_cache=False),
        True,
    ),
    "chunks": (lambda: models.decoder("llama4"), lambda m: logits(m, LEFT, use_cache=False), True),
}


@pytest.fixture(autouse=True)
def registered():
    numflash.transformers.register()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dense(monkeypatch):
    """The shapes of the dense masks that are made."""
    from numflash.frontends.transformers import masks

    made, make = [], masks.sdpa_mask

    def recorded(*args, **options):
        found = make(*args, **options)
        made.append(tuple(found.shape))
        return found

    monkeypatch.setattr(masks, "sdpa_mask", recorded)
    return made


@pytest.mark.parametrize("name", CASES if ALL else ["window, gradients"])
def test_a_model_is_one_graph(name, launched, dense):
    make, run, is_dense = CASES[name]
    model = make()
    model.set_attn_implementation("eager")
    wanted = run(model)
    model.set_attn_implementation(NAME)
    launched.clear()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(run(compiled), wanted) < 5e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert launched.families.count("forward") == model.config.num_hidden_layers
    assert bool(dense) == is_dense


@pytest.mark.skipif(not ALL, reason="NUMFLASH_TEST_ALL=1 runs it")
def test_a_mask_with_a_function_enters_a_graph_and_another_one_takes_the_same(launched):
    """A mask that was made outside; tensors that its function reads are the graph's inputs."""
    model = models.decoder("llama", num_hidden_layers=1)
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for shift in (0, 3):
        chunks = chunked_causal_mask_function(4, torch.tensor([0, shift]))
        made = mask(batch_size=2, q_length=13, kv_length=13, mask_function=chunks)
        assert "mask_mod" in made.of_call()
        assert error(run(compiled, made), run(model, made)) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert launched.take() == ["forward"] * 4


def run(model, made):
    with torch.no_grad():
        return [model(input_ids=IDS, attention_mask=made, use_cache=False).logits]


@pytest.mark.parametrize(
    "name, padding",
    [("llama", None), ("llama", LEFT), ("gemma2", LEFT)] if ALL else [("llama", LEFT)],
)
def test_generating_with_a_static_cache_is_one_graph(name, padding, launched):
    """Each token runs the same graph: its mask comes from outside of it."""
    model = models.decoder(name, **({"num_hidden_layers": 1} if name == "llama" else {}))
    model.set_attn_implementation("eager")
    static = {"cache_implementation": "static"}
    wanted = generated(model, padding, **static, disable_compile=True)
    model.set_attn_implementation(NAME)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    launched.clear()
    torch._dynamo.utils.counters.clear()
    found = generated(model, padding, **static, compile_config=config)
    assert error(found, wanted) < 5e-6
    # A window's cache fills up meanwhile, which the library itself compiles anew.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if name == "gemma2" else 1)
    assert launched.families.count("forward") == 4 * model.config.num_hidden_layers
