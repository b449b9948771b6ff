"""What `bench distributed` runs, and what the schedules say of it."""

from typing import Any, NamedTuple

from numflash.distributed import Explanation, Layout, explain

RANKS = (1, 2, 4, 8)
METHODS = ("gather", "ring", "heads")
DIRECTIONS = ("forward", "backward")
OF_BOTH = (
    "problem",
    "direction",
    "ranks",
    "method",
    "ms",
    "share of one GPU's speed",
    "exposed ms",
    "lockstep",
    "MiB sent",
)
"""Columns of what is measured, and of the model's table."""


class Case(NamedTuple):
    """One problem, which ranks share.

    Attributes:
        seqlen: tokens of all ranks.
        heads_q, heads_kv, head_dim: as everywhere.
        window: keys that a query sees before its own; None: all.
        dtype: of the operands.
    """

    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int = 128
    window: int | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        mask = "causal" if self.window is None else f"window {self.window}"
        return f"{self.seqlen} tokens, {self.heads_q}/{self.heads_kv} x {self.head_dim}, {mask}"

    @property
    def mask(self) -> dict[str, Any]:
        """The options of `attention` that say what a query sees."""
        return {"causal": True, "window_size": (self.window, 0)}

    def layout(self, ranks: int) -> Layout:
        """Zigzag under a causal mask, contiguous with a window."""
        make = Layout.zigzag if self.window is None else Layout.contiguous
        return make(self.seqlen, ranks)

    def explained(self, ranks: int, method: str, direction: str, **figures) -> Explanation:
        """What the ranks do."""
        return explain(
            self.layout(ranks),
            num_heads_q=self.heads_q,
            num_heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            dtype=self.dtype,
            method=method,
            backward=direction == "backward",
            **self.mask,
            **figures,
        )


def cases(quick: bool = False) -> list[Case]:
    """Grouped heads from 8k to 128k tokens, as many of both at 128k, and a window."""
    if quick:
        return [Case(2**15, 32, 8)]
    grouped = [Case(seqlen, 32, 8) for seqlen in (2**13, 2**15, 2**17)]
    return [*grouped, Case(2**17, 32, 32), Case(2**17, 32, 8, window=4096)]
