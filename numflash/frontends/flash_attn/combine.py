"""Parts of attention joined, as flash-attn 3 has it."""

import torch
from torch import Tensor

from numflash.api.merge import merge_partials


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over disjoint parts of them.

    Args:
        out_partial: (parts, batch, seqlen, num_heads, head_dim), or without batch, float32;
            float16 and bfloat16, too.
        lse_partial: (parts, batch, seqlen, num_heads), or without batch, float32.
        out: a tensor to write the result to.
        out_dtype: of the result; None is that of out, or of out_partial.

    Returns:
        out: (batch, seqlen, num_heads, head_dim).
        lse: (batch, seqlen, num_heads) float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.merge_partials`; ValueError for an
            `out` of another shape or dtype.
    """
    if out_dtype is None and out is not None:
        out_dtype = out.dtype
    dtype = None if out_dtype is None else str(out_dtype).removeprefix("torch.")
    joined, lse = merge_partials(out_partial, lse_partial.transpose(-1, -2), dtype=dtype)
    if out is not None:
        if out.shape != joined.shape or out.dtype != joined.dtype:
            raise ValueError(
                f"out must be {joined.dtype} of shape {tuple(joined.shape)}, got {out.dtype} of "
                f"{tuple(out.shape)}"
            )
        joined = out.copy_(joined)
    return joined, lse.transpose(-1, -2)
