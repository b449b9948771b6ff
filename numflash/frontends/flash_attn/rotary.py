"""`flash_attn.layers.rotary`: rotary embeddings, differentiable by what is rotated."""

import torch
from torch import Tensor

from numflash.frontends.torch import traced
from numflash.frontends.torch.rotary import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rows of x rotated by the angles of their positions: see `numflash.apply_rotary`.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens (tokens, heads, head_dim).
        cos, sin: (positions, rotary_dim / 2), float32 or the dtype of x; without gradients.
        interleaved: whether a pair of columns is 2 c and 2 c + 1, or c and c + rotary_dim / 2.
        inplace: write the result to x, and return x.
        seqlen_offsets: the position of a sequence's first token: an integer, or (batch,).
        cu_seqlens: int32 (sequences + 1,).
        max_seqlen: decides nothing.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.apply_rotary`.
    """
    cos, sin = cos.detach(), sin.detach()
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.to(torch.int32)
    options = {"interleaved": interleaved, "offsets": seqlen_offsets, "cu_seqlens": cu_seqlens}
    if inplace and traced.is_traced(x, cos, sin):
        return x.copy_(apply_rotary(x, cos, sin, **options))
    return apply_rotary(x, cos, sin, out=x if inplace else None, **options)


apply_rotary_emb_func = apply_rotary_emb
