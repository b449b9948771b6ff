"""Attention over several GPUs: gather, ring, heads and decoding, on the transport of others.

    from numflash.distributed import Layout, attention, of_torch

    layout = Layout.zigzag(seqlen, ranks=8)                 # who holds which tokens
    q, k, v = (layout.shard(x, rank) for x in (q, k, v))    # or made there, by layout.positions
    out = attention(q, k, v, layout=layout, comm=of_torch(group), causal=True)

Importing it imports no framework: communicators import theirs when they are made.
"""

from numflash.distributed.attention import (
    attention,
    attention_backward,
    ring_attention,
    ulysses_attention,
)
from numflash.distributed.communicators import CommunicatorError
from numflash.distributed.communicators.cupy_nccl import of_cupy
from numflash.distributed.communicators.local import local
from numflash.distributed.communicators.torch_groups import of_torch
from numflash.distributed.decode import decode, shard_lengths, shard_positions, token_owner
from numflash.distributed.explain import Explanation, explain
from numflash.distributed.layouts import Layout, Segment

__all__ = [
    "CommunicatorError",
    "Explanation",
    "Layout",
    "Segment",
    "attention",
    "attention_backward",
    "decode",
    "explain",
    "local",
    "of_cupy",
    "of_torch",
    "ring_attention",
    "shard_lengths",
    "shard_positions",
    "token_owner",
    "ulysses_attention",
]
