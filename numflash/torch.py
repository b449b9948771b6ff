"""Attention on PyTorch tensors, with gradients: see `numflash.frontends.torch`."""

from numflash.frontends.torch.attention import attention, attention_varlen
from numflash.frontends.torch.context_parallel import context_parallel
from numflash.frontends.torch.distributed import distributed_attention
from numflash.frontends.torch.enabling import disable, enable, is_enabled, replacing_sdpa
from numflash.frontends.torch.explaining import explain
from numflash.frontends.torch.kvcache import attention_with_kvcache
from numflash.frontends.torch.merging import merge_partials
from numflash.frontends.torch.rotary import apply_rotary
from numflash.frontends.torch.sdpa import scaled_dot_product_attention

__all__ = [
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "context_parallel",
    "disable",
    "distributed_attention",
    "enable",
    "explain",
    "is_enabled",
    "merge_partials",
    "replacing_sdpa",
    "scaled_dot_product_attention",
]
