"""Attention for JAX, with gradients: see `numflash.frontends.jax`."""

from numflash.frontends.jax.attention import attention, dot_product_attention

__all__ = ["attention", "dot_product_attention"]
