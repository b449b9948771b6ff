"""Attention for JAX, with gradients: see `numflash.frontends.jax`."""

from numflash.frontends.jax.attention import attention, dot_product_attention
from numflash.frontends.jax.ring import from_zigzag, ring_attention, to_zigzag

__all__ = ["attention", "dot_product_attention", "from_zigzag", "ring_attention", "to_zigzag"]
