"""Attention over a cache of keys and values that grows: decoding, and prefill in chunks."""

from numbers import Integral

from numflash.calls.cache_forward import run_with_cache
from numflash.problem.options import AttentionOptions, kind_of

NOT_OF_CACHES = (
    "layout",
    "block_mask",
    "schedule",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqlens_q",
    "seqlens_k",
    "starts_q",
    "starts_k",
    "appended",
    "cached",
    "fp8",
    "max_rel_error",
    "score_mod_grad",
)
"""Of attention's options those that say what the cache says."""


def attention_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    *,
    cache_seqlens,
    page_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    k_descale=None,
    v_descale=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved: bool = True,
    num_splits: int | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    check_lengths: bool = False,
    out=None,
    stream=None,
    **options,
):
    """Attention of new queries over a cache, to which new keys and values are appended first.

    Keys lie in rows 0, 1, ... of a sequence, and the last query stands at the last key. With
    causal=True each of several new tokens sees the cache and those before it.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), not rotated.
        k_cache: (entries, rows, num_heads_kv, head_dim), an entry for each sequence or more; with
            page_table (pages, page_size, num_heads_kv, head_dim), of any page_size.
        v_cache: the same with head_dim_v. Both may be e4m3 codes, uint8 or float8_e4m3fn, with q
            of float16 or bfloat16.
        k, v: (batch, seqlen_new, num_heads_kv, head_dim or head_dim_v), or both None: new rows,
            written in place behind the cache_seqlens[b] that are there; to a cache of codes as
            the code nearest to x * (1 / descale), which saturates, of rotated x in float32.
        cache_seqlens: int32 (batch,) on the device: rows of each sequence that are there, from
            row 0 on; or an integer for all.
        page_table: int32 (batch, pages of a sequence) on the device: row r of sequence b is row
            r % page_size of page page_table[b, r // page_size]. Pages may lie in any order, and
            sequences may share those that none appends to.
        cache_batch_idx: int32 (batch,) on the device: the cache's entry of each sequence, without
            page_table. None: entry b.
        cache_leftpad: int32 (batch,) on the device: the first row that belongs to a sequence.
        k_descale, v_descale: float32 (batch, num_heads_kv) on the device, above 0, with a cache of
            codes: what a sequence's codes in a head are multiplied by. None: 1.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), as for `apply_rotary`, with k and v.
            New key i is rotated at position cache_seqlens[b] + i. So is query i with causal or a
            window; without both all queries are rotated at cache_seqlens[b].
        rotary_interleaved: which columns are a pair, as `interleaved` of `apply_rotary`; here True
            by default, as in flash-attn.
        num_splits: into how many parts the keys of a sequence are split at most; None or 0: as
            many as fill the GPU.
        batch_invariant: as in `attention`; not with num_splits.
        return_lse: also return the log-sum-exp.
        check_lengths: read lengths and pages back, which waits for the device, and raise
            ValueError where a sequence leaves the cache, a page does not exist, or two sequences
            append to one page.
        out: an array to write the result to.
        stream: as in `attention`.
        options: of `attention`: softmax_scale, causal, causal_align, shift, window_size, softcap,
            alibi_slopes, sinks, bias, mask, score_mod, mask_mod, aux, precision, config,
            out_dtype. Keys are counted from a sequence's first row on.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v).
        lse: with return_lse, (batch, num_heads_q, seqlen_q) float32.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: shapes that do not fit, k without v, rotary without k, a cache that cannot be
            written in place, an integer that leaves the cache.
        UnsupportedError: as `attention`; a cache of codes without tensor cores for q's dtype.

    Numbers in cache_seqlens, cache_leftpad, cache_batch_idx and page_table are read on the device
    alone: a captured CUDA graph may be launched again with others. Where they lead out of the
    cache nothing is read or written: rows of a page that does not exist count as zeros, and a new
    row without a place is not appended. A row that no sequence has may hold anything, also NaN. If
    two sequences append to one row, it holds the row of either.

    Memory: a copy of q if it is rotated, and lists and parts as those of `attention_varlen`.

    Source: the contract is that of flash-attn's `flash_attn_with_kvcache`.

    Example:
        >>> import numpy as np, numflash
        >>> rng = np.random.default_rng(0)
        >>> cache = np.zeros((2, 1, 40, 1, 16), "float16")      # of k and of v
        >>> token = rng.standard_normal((3, 1, 1, 1, 16)).astype("float16")
        >>> for n in range(3):
        ...     out = numflash.attention_with_kvcache(
        ...         token[0], *cache, *token[1:], cache_seqlens=n, causal=True
        ...     )
        >>> bool(np.array_equal(cache[0, 0, 2], token[1, 0, 0])), out.shape
        (True, (1, 1, 1, 16))
    """
    for name in NOT_OF_CACHES:
        if name in options:
            raise TypeError(f"attention_with_kvcache has no {name}")
    name, chosen = "attention_with_kvcache", {"batch_invariant": batch_invariant}
    asked = AttentionOptions.of(name, options | chosen | {"num_splits": num_splits})
    arrays, number = {"q": q, "k_cache": k_cache, "v_cache": v_cache}, None
    if isinstance(cache_seqlens, Integral) and not isinstance(cache_seqlens, bool):
        number = int(cache_seqlens)
    elif cache_seqlens is None or isinstance(cache_seqlens, bool):
        raise TypeError(
            f"cache_seqlens must be an integer or an int32 array, got {cache_seqlens!r} "
            f"({kind_of(cache_seqlens)})"
        )
    else:
        arrays["cache_seqlens"] = cache_seqlens
    more = {
        "k": k,
        "v": v,
        "page_table": page_table,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "out": out,
    }
    arrays |= {name: array for name, array in more.items() if array is not None}
    result, lse = run_with_cache(arrays, asked, number, rotary_interleaved, stream, check_lengths)
    return (result, lse) if return_lse else result
