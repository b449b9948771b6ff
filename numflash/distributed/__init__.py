"""Attention over several GPUs."""

from numflash.distributed.communicators.local import local
from numflash.distributed.decode import decode, shard_lengths, shard_positions, token_owner
from numflash.distributed.explain import Explanation, explain
from numflash.distributed.layouts import Layout, Segment

__all__ = [
    "Explanation",
    "Layout",
    "Segment",
    "decode",
    "explain",
    "local",
    "shard_lengths",
    "shard_positions",
    "token_owner",
]
