"""Attention of sequences that lie one after another, as flash-attn has it."""

from torch import Tensor

from numflash.frontends.flash_attn.options import (
    EVERYWHERE,
    expect_tensors,
    options_of,
    parts_of,
    refuse,
    results,
    with_chunks,
)
from numflash.frontends.torch.attention import attention_varlen
from numflash.frontends.torch.kvcache import expect_no_gradients
from numflash.frontends.wording import says


@says(sinks="learnable_sink", seqlens_q="seqused_q", seqlens_k="seqused_k")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    num_splits: int | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
):
    """Attention of packed sequences, differentiable with respect to q, k and v.

    Args:
        q: (tokens_q, num_heads_q, head_dim), float16, bfloat16 or float32.
        k: (tokens_k, num_heads_kv, head_dim); v: the same with head_dim_v. With block_table
            (pages, page_size, num_heads_kv, head_dim), without gradients.
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,): sequence s has the rows cu_seqlens[s]
            up to cu_seqlens[s + 1]. With block_table their differences are the lengths of the
            keys; cu_seqlens_k then may be None, with seqused_k.
        max_seqlen_q, max_seqlen_k: decide nothing.
        block_table, page_table: two names of one: int32 (sequences, pages of a sequence).
        seqused_q, seqused_k: int32 (sequences,): how many of its rows a sequence really has.
        num_splits: into how many parts the keys of a sequence are split at most; None or 0: as
            many as fill the GPU.
        q_descale, k_descale, v_descale: decide nothing, since codes are refused here.
        Others: as of `flash_attn_func`.

    Returns:
        out: (tokens_q, num_heads_q, head_dim_v); rows that no sequence has are 0.
        softmax_lse: with return_attn_probs, (num_heads_q, tokens_q) float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention_varlen`.
    """
    refuse(qv=qv)
    table = table_of(block_table, page_table)
    expect_tensors("(tokens, heads, head_dim)", q=q)
    axes = "(tokens, heads, head_dim)" if table is None else "(pages, rows, heads, head_dim)"
    expect_tensors(axes, k=k, v=v)
    options = options_of(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        dropout_p=dropout_p,
    )
    lengths = {"seqlens_q": seqused_q, "seqlens_k": seqused_k, "num_splits": num_splits or None}
    options |= {name: given for name, given in lengths.items() if given is not None}
    if attention_chunk:
        length_q = _lengths("q", cu_seqlens_q, seqused_q)
        first = _lengths("k", cu_seqlens_k, seqused_k) - length_q
        options = with_chunks(options, attention_chunk, first)
    if table is not None:
        expect_no_gradients("a call with block_table", {"q": q, "k": k, "v": v})
        options["page_table"] = table
        options["seqlens_k"] = _lengths("k", cu_seqlens_k, seqused_k)
        cu_seqlens_k = None
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)
    return results(out, lse, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` of queries, keys and values in one tensor; so is its gradient.

    Args:
        qkv: (tokens, 3, num_heads, head_dim), which is not copied.
        cu_seqlens, max_seqlen: of both queries and keys.
        Others: as there.

    Returns and raises as `flash_attn_varlen_func`; ValueError for a qkv of another shape.
    """
    q, k, v = parts_of(qkv, "qkv", 3, "(tokens, 3, num_heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` of keys and values in one tensor; its gradient is one, too.

    Args:
        kv: (tokens_k, 2, num_heads_kv, head_dim), which is not copied.
        Others: as there.

    Returns and raises as `flash_attn_varlen_func`; ValueError for a kv of another shape.
    """
    k, v = parts_of(kv, "kv", 2, "(tokens_k, 2, num_heads_kv, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def table_of(block_table: Tensor | None, page_table: Tensor | None) -> Tensor | None:
    """The table of pages, which has two names. Raises ValueError for both."""
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table are two names of one, got both")
    return page_table if block_table is None else block_table


def _lengths(side: str, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor:
    """int32 (sequences,): how many rows each sequence has. Raises ValueError."""
    if seqused is not None:
        return seqused
    if cu_seqlens is None:
        raise ValueError(f"cu_seqlens_{side} or seqused_{side} must be given, got neither")
    return cu_seqlens[1:] - cu_seqlens[:-1]
