"""Attention over a cache that grows, as flash-attn has it."""

import torch
from torch import Tensor

from numflash.frontends.flash_attn.options import (
    CODES,
    EVERYWHERE,
    expect_tensors,
    options_of,
    refuse,
    with_chunks,
)
from numflash.frontends.flash_attn.varlen import table_of
from numflash.frontends.torch.attention import attention_varlen
from numflash.frontends.torch.kvcache import attention_with_kvcache, expect_no_gradients
from numflash.frontends.wording import says
from numflash.runtime.errors import UnsupportedError


@says(sinks="learnable_sink", seqlens_k="cache_seqlens", starts_k="cache_leftpad")
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=EVERYWHERE,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
    *,
    qv: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    scheduler_metadata: Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    learnable_sink: Tensor | None = None,
):
    """Attention of new queries over a cache, to which new keys and values are appended in place.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim); with cu_seqlens_q (tokens_q, num_heads_q,
            head_dim).
        k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad,
            rotary_interleaved: as of `numflash.attention_with_kvcache`, whose contract is
            flash-attn's. Pages may have any size.
        cache_seqlens: int32 (batch,), or an integer; None: all rows of the cache.
        block_table, page_table: two names of one: int32 (batch, pages of a sequence).
        num_splits: into how many parts the keys of a sequence are split at most; 0 or None: as
            many as fill the GPU.
        return_softmax_lse: return (out, softmax_lse).
        cu_seqlens_q: int32 (batch + 1,): sequence s has the queries cu_seqlens_q[s] up to
            cu_seqlens_q[s + 1]. Without k, v and codes.
        k_descale, v_descale: float32, (batch, num_heads_kv), of a cache of e4m3 codes; without
            codes they decide nothing.
        qv, cu_seqlens_k_new, rotary_seqlens: refused where they are given.
        max_seqlen_q, q_descale, scheduler_metadata, pack_gqa, sm_margin: decide nothing.
        Others: as of `flash_attn_func`.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), or (tokens_q, num_heads_q, head_dim_v).
        softmax_lse: with return_softmax_lse, (batch, num_heads_q, seqlen_q), or
            (num_heads_q, tokens_q), float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention_with_kvcache`;
            UnsupportedError where a tensor requires a gradient while gradients are recorded.
    """
    refuse(qv=qv, cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens)
    expect_tensors("(entries or pages, rows, heads, head_dim)", k_cache=k_cache, v_cache=v_cache)
    is_packed = cu_seqlens_q is not None
    expect_tensors(
        "(tokens, heads, head_dim)" if is_packed else "(batch, seqlen, heads, head_dim)", q=q
    )
    table = table_of(block_table, page_table)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must say where k and v are appended, got None")
        pages = 1 if table is None else table.shape[1]
        cache_seqlens = pages * k_cache.shape[1]
    options = options_of(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
    )
    splits = num_splits or None
    if is_packed:
        given = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        _expect_none_with_packed_queries(given)
        found = _of_packed_queries(
            (q, k_cache, v_cache),
            cu_seqlens_q,
            cache_seqlens,
            (table, cache_batch_idx, cache_leftpad),
            options | {"num_splits": splits},
            attention_chunk,
        )
        return found if return_softmax_lse else found[0]

    if attention_chunk:
        new = 0 if k is None else k.shape[1]
        first = cache_seqlens + (new - q.shape[1])
        if cache_leftpad is not None:
            first = first - cache_leftpad
        options = with_chunks(options, attention_chunk, first)
    if k_cache.dtype in CODES:
        options |= {"k_descale": k_descale, "v_descale": v_descale}
    return attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        page_table=table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        num_splits=splits,
        return_lse=return_softmax_lse,
        **options,
    )


def _expect_none_with_packed_queries(given: dict) -> None:
    for name in (name for name, value in given.items() if value is not None):
        raise UnsupportedError(
            f"{name} does not go with cu_seqlens_q: keys are appended to sequences that all have "
            "as many queries; write them into the cache first"
        )


def _of_packed_queries(
    arrays: tuple[Tensor, Tensor, Tensor],
    cu_seqlens_q: Tensor,
    cache_seqlens: int | Tensor,
    places: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: dict,
    attention_chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that lie one after another: an entry of a cache is one page.

    `places` are the table, cache_batch_idx and cache_leftpad.
    """
    q, k_cache, v_cache = arrays
    table, batch_idx, leftpad = places
    own = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    expect_no_gradients("flash_attn_with_kvcache", own | options)
    sequences = cu_seqlens_q.shape[0] - 1
    of_list = {"dtype": torch.int32, "device": q.device}
    if table is not None and batch_idx is not None:
        raise ValueError("block_table and cache_batch_idx cannot be given together")
    if table is None:
        entries = torch.arange(sequences, **of_list) if batch_idx is None else batch_idx
        table = entries[:, None]
    lengths = cache_seqlens
    if not isinstance(lengths, Tensor):
        lengths = torch.full((sequences,), cache_seqlens, **of_list)
    if leftpad is not None:
        lengths = lengths - leftpad
        options = options | {"starts_k": leftpad}
    if attention_chunk:
        rows = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
        options = with_chunks(options, attention_chunk, lengths - rows)
    paged = {"page_table": table, "seqlens_k": lengths, "return_lse": True}
    return attention_varlen(q, k_cache, v_cache, cu_seqlens_q, **options, **paged)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size=EVERYWHERE,
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An empty int32 tensor: numflash makes its schedule on the device, in each call."""
    return cache_seqlens.new_empty(0, dtype=torch.int32)
