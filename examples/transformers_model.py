"""A model of transformers with numflash: a padded batch, and a training step.

    python examples/transformers_model.py

A tiny Mistral with random weights, on the GPU, or in the simulator on the CPU. Its sliding window
and the padding become what kernels take: no array of queries and keys is made for them. The
logits are compared with those of "eager" attention; then the model is trained for two steps, and
its loss falls.
"""

import torch
from transformers import MistralConfig, MistralForCausalLM

import numflash
import numflash.transformers
from numflash.runtime.commands import command

DEVICE = "cpu" if numflash.simulating() else "cuda"
VOCABULARY, TOKENS = 50, 24


def make() -> MistralForCausalLM:
    """A model that attends by "eager"."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        attn_implementation="eager",
    )
    return MistralForCausalLM(config).to(DEVICE)


@command
def main() -> int:
    """Compare, train, and say what came of it."""
    numflash.transformers.register()
    model = make()
    ids = torch.randint(VOCABULARY, (2, TOKENS), device=DEVICE)
    padding = torch.ones_like(ids)
    padding[1, :9] = 0  # the second text is shorter, and padded on the left
    is_text = padding.bool()

    with torch.no_grad():
        wanted = model(ids, attention_mask=padding).logits[is_text]
        model.set_attn_implementation(numflash.transformers.NAME)
        found = model(ids, attention_mask=padding).logits[is_text]
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"logits of {len(found)} tokens: they differ from eager's by {difference:.1e} at most")

    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    labels = ids.masked_fill(~is_text, -100)
    for _ in range(2):
        loss = model(ids, attention_mask=padding, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss: {losses[0]:.3f}, after a step {losses[1]:.3f}")
    return 0 if difference < 1e-4 and losses[1] < losses[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
