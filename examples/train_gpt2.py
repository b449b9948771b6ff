"""A model like GPT-2 learns a sentence in PyTorch; its attention is numflash's.

    python examples/train_gpt2.py

The model calls torch's `scaled_dot_product_attention` and knows nothing of numflash: one call of
`numflash.torch.enable()` is the whole change. Without a GPU it runs in the simulator, on tensors
of the CPU: NUMBA_ENABLE_CUDASIM=1 python examples/train_gpt2.py
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import numflash
import numflash.torch
from numflash.runtime.commands import command

DEVICE = "cpu" if numflash.simulating() else "cuda"
TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps."
BATCH, SEQLEN, LAYERS, HEADS, WIDTH, STEPS = 2, 16, 2, 2, 32, 6


class Block(nn.Module):
    """Attention and two layers of GELU, each after a norm."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_heads, self.from_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        """(batch, seqlen, WIDTH), as x."""
        batch, seqlen, _ = x.shape
        qkv = self.to_heads(self.norm_1(x)).view(batch, seqlen, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.from_heads(heads.transpose(1, 2).reshape(batch, seqlen, WIDTH))
        return x + self.mlp(self.norm_2(x))


class GPT2(nn.Module):
    """Scores of the next token."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, WIDTH), nn.Embedding(SEQLEN, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.to_scores = nn.Linear(WIDTH, tokens, bias=False)

    def forward(self, tokens):
        """(batch, seqlen, tokens) of (batch, seqlen)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.to_scores(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def loss_of(model, tokens):
    """The mean cross entropy of the next of (batch, seqlen + 1) tokens, in mixed precision."""
    with torch.autocast(DEVICE, torch.bfloat16):
        scores = model(tokens[:, :-1])
    return F.cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten())


@command
def main() -> int:
    """Train, print the loss of each step; 1 if it has not fallen to a half."""
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    text = torch.tensor([letters.index(letter) for letter in TEXT], device=DEVICE)
    tokens = text.unfold(0, SEQLEN + 1, SEQLEN)[:BATCH]
    model = GPT2(len(letters)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    q = torch.empty(BATCH, HEADS, SEQLEN, WIDTH // HEADS, dtype=torch.bfloat16, device=DEVICE)
    print(numflash.torch.explain(q, q, q, is_causal=True))

    numflash.torch.enable()
    losses = []
    for n in range(1, STEPS + 1):
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {n:2}: loss {losses[-1]:.3f}")
    numflash.torch.disable()
    return int(not losses[-1] < losses[0] / 2)


if __name__ == "__main__":
    sys.exit(main())
