"""A small transformer learns a sentence that is cut over two processes, as if it were one.

    python examples/train_distributed.py [PROCESSES]

Each process has its part of every sequence, by `Layout.zigzag`, and all weights. Attention sees
the whole sequence through `numflash.torch.distributed_attention`; the rest of the model works on
the part, with the positions that the layout says. One process then does the same alone, and the
losses must be equal but for rounding. Over NCCL where there is a GPU for each process; else over
gloo, in the simulator on the CPU: NUMBA_ENABLE_CUDASIM=1 python examples/train_distributed.py
"""

import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812

import numflash
import numflash.torch
from numflash.distributed import Layout, of_torch
from numflash.runtime.commands import command

TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps."
LETTERS = sorted(set(TEXT))
SEQLEN, LAYERS, HEADS, KV_HEADS, WIDTH, STEPS = 32, 2, 2, 1, 32, 3
HEAD_DIM = WIDTH // HEADS
# Between one process and several, sums are added in other orders.
TOLERANCE = 1e-4


class Block(nn.Module):
    """Attention with grouped heads over all processes, and two layers of GELU."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_heads = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.from_heads = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, layout, comm):
        """(batch, tokens of this process, WIDTH), as x."""
        qkv = self.to_heads(self.norm_1(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        heads = numflash.torch.distributed_attention(
            q, k, v, layout=layout, comm=comm, causal=True
        )
        x = x + self.from_heads(heads.flatten(2))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    """Scores of the next token."""

    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(SEQLEN, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.to_scores = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, letters, layout, comm):
        """(batch, tokens, letters) of (batch, tokens), those of this process."""
        # Not 0, 1, 2, ...: a process has the tokens of several places of the sequence.
        positions = torch.from_numpy(layout.positions(comm.rank)).long().to(letters.device)
        x = self.letters(letters) + self.places(positions)
        for block in self.blocks:
            x = block(x, layout, comm)
        return self.to_scores(x)


def train(rank: int, processes: int, folder: str) -> list[float]:
    """The loss of each step, which is the mean over the whole sequence."""
    on_gpus = not numflash.simulating()
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder}/meeting-{processes}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=5),
    )
    layout, comm = Layout.zigzag(SEQLEN, processes), of_torch()

    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT], device=device)
    whole = text[None, :SEQLEN], text[None, 1 : SEQLEN + 1]
    letters, following = (layout.shard(x, rank) for x in whole)

    losses = []
    for _ in range(STEPS):
        scores = model(letters, layout, comm)
        loss = F.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum") / SEQLEN
        loss.backward()
        # Each process has the gradients of its tokens' loss; weights want those of all.
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(loss.item())
        if rank == 0:
            print(f"{processes} processes, step {len(losses)}: loss {losses[-1]:.6f}", flush=True)
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, f"losses-{processes}").write_text(" ".join(map(repr, losses)))
    return losses


@command
def main(arguments: list[str] | None = None) -> int:
    """Train in several processes and in one; 1 if a loss differs, or has not fallen."""
    arguments = sys.argv[1:] if arguments is None else arguments
    processes = int(arguments[0]) if arguments else 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (processes, 1):
            torch.multiprocessing.spawn(train, (n, folder), n)
            found[n] = [float(x) for x in Path(folder, f"losses-{n}").read_text().split()]
    several, one = found[processes], found[1]
    furthest = max(abs(a - b) for a, b in zip(several, one, strict=True))
    print(f"losses differ by {furthest:.1e} at most")
    return int(not (furthest < TOLERANCE and several[-1] < several[0]))


if __name__ == "__main__":
    sys.exit(main())
