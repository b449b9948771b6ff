"""Attention over several GPUs."""

from numflash.distributed.communicators.local import local
from numflash.distributed.decode import decode, shard_lengths, shard_positions, token_owner

__all__ = ["decode", "local", "shard_lengths", "shard_positions", "token_owner"]
