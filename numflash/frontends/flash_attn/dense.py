"""Attention of sequences of one length, as flash-attn has it."""

import torch
from torch import Tensor

from numflash.frontends.flash_attn.options import (
    CODES,
    EVERYWHERE,
    expect_tensors,
    options_of,
    parts_of,
    refuse,
    results,
    with_chunks,
)
from numflash.frontends.torch.attention import attention
from numflash.frontends.wording import says


@says(sinks="learnable_sink")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    num_splits: int | None = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    learnable_sink: Tensor | None = None,
):
    """Attention, differentiable with respect to q, k, v, alibi_slopes and learnable_sink.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), float16, bfloat16 or float32; or e4m3 codes
            (float8_e4m3fn), with k and v, which have no gradients.
        k: (batch, seqlen_k, num_heads_kv, head_dim); v: the same with head_dim_v.
        dropout_p: share of the weights that become 0. The seed comes from PyTorch's generator of
            the device of q.
        softmax_scale: factor of the scores; None is head_dim ** -0.5.
        causal: the last query sees the last key.
        window_size: (left, right), as a tuple, list or tensor; below 0 or None: no limit.
        softcap: None, 0 and numbers below are off.
        alibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q).
        deterministic, num_splits, pack_gqa, sm_margin: decide nothing: results, gradients, too,
            are always the same, and numflash chooses kernels by itself.
        return_attn_probs: return (out, softmax_lse, None).
        qv: refused where it is given.
        q_descale, k_descale, v_descale: float32, (batch, num_heads_kv), of codes, by default 1;
            without codes they decide nothing.
        attention_chunk: flash-attn 3's: a query sees the keys of its own chunk of so many
            positions alone.
        learnable_sink: (num_heads_q,): see `sinks` of `numflash.attention`.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), of the dtype of q; of codes bfloat16.
        softmax_lse: with return_attn_probs, (batch, num_heads_q, seqlen_q) float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    refuse(qv=qv)
    expect_tensors("(batch, seqlen, heads, head_dim)", q=q, k=k, v=v)
    options = options_of(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        dropout_p=dropout_p,
    )
    if attention_chunk:
        options = with_chunks(options, attention_chunk, k.shape[1] - q.shape[1])
    if q.dtype in CODES:
        one = torch.ones(q.shape[0], k.shape[2], device=q.device)
        descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        options |= {name: one if given is None else given for name, given in descales.items()}
    out, lse = attention(q, k, v, return_lse=True, **options)
    return results(out, lse, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
):
    """`flash_attn_func` of queries, keys and values in one tensor; its gradient is one, too.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), which is not copied; or with num_heads_q
            (batch, seqlen, num_heads_q + 2 * num_heads_kv, head_dim).
        num_heads_q: query heads of a qkv of four axes.
        Others: as there.

    Returns and raises as `flash_attn_func`; ValueError for a qkv of another shape.
    """
    if num_heads_q is None:
        q, k, v = parts_of(qkv, "qkv", 3, "(batch, seqlen, 3, num_heads, head_dim)")
    else:
        expect_tensors("(batch, seqlen, heads, head_dim)", qkv=qkv)
        heads_kv = (qkv.shape[2] - num_heads_q) // 2
        if heads_kv < 1 or num_heads_q + 2 * heads_kv != qkv.shape[2]:
            raise ValueError(
                "qkv must have shape (batch, seqlen, num_heads_q + 2 * num_heads_kv, head_dim) "
                f"with num_heads_q {num_heads_q}, got {tuple(qkv.shape)}"
            )
        q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` of keys and values in one tensor; its gradient is one, too.

    Args:
        q: as there.
        kv: (batch, seqlen_k, 2, num_heads_kv, head_dim), which is not copied.
        Others: as there.

    Returns and raises as `flash_attn_func`; ValueError for a kv of another shape.
    """
    k, v = parts_of(kv, "kv", 2, "(batch, seqlen_k, 2, num_heads_kv, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
