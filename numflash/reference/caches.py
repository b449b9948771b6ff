"""Attention over a cache of keys and values, in float64."""

import numpy as np

from numflash.reference.attention import naive
from numflash.reference.rotary import apply_rotary
from numflash.reference.varlen import each_alone


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
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved: bool = True,
    precision: str = "float64",
    **options,
):
    """Attention over a cache in float64, and the cache with the new rows.

    Args:
        q, k_cache, v_cache, k, v, cache_seqlens, page_table, cache_batch_idx, cache_leftpad,
            rotary_cos, rotary_sin, rotary_interleaved, options: as for
            `numflash.attention_with_kvcache`.
        precision: of attention, as for `naive`.

    Returns:
        (out, lse, k_cache, v_cache), the caches as copies with the new rows. Rotated rows are
        rounded to the dtypes of q and of the caches.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> cache, new = np.zeros((1, 4, 1, 2)), np.ones((1, 1, 1, 2))
        >>> out, _, k_cache, _ = reference.attention_with_kvcache(
        ...     new, cache, cache, new, new, cache_seqlens=1
        ... )
        >>> k_cache[0, :, 0, 0].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    entries, seqlen_q = q.shape[:2]
    lengths = np.broadcast_to(np.asarray(cache_seqlens, np.int64), entries)
    k_cache, v_cache, new = k_cache.copy(), v_cache.copy(), 0 if k is None else k.shape[1]
    if rotary_cos is not None:
        turn = {"interleaved": rotary_interleaved, "offsets": lengths}
        tables = rotary_cos, rotary_sin
        k = apply_rotary(k, *tables, **turn)
        window = options.get("window_size", (-1, -1))
        if options.get("causal") or any(side not in (-1, None) for side in window):
            q = apply_rotary(q, *tables, **turn).astype(q.dtype)
        else:
            # Each query is a head of one token.
            one = q.reshape(entries, 1, -1, q.shape[3])
            q = apply_rotary(one, *tables, **turn).astype(q.dtype).reshape(q.shape)
    if page_table is None:
        numbers = np.arange(entries) if cache_batch_idx is None else np.asarray(cache_batch_idx)
        page_table = numbers[:, None]
    size = k_cache.shape[1]
    rows = page_table.shape[1] * size
    pages = np.repeat(np.asarray(page_table, np.int64), size, 1)  # of each row of an entry
    within = np.tile(np.arange(size), page_table.shape[1])
    exists = (pages >= 0) & (pages < len(k_cache))
    for entry in range(entries):
        for i in range(new):
            row = lengths[entry] + i
            if 0 <= row < rows and exists[entry, row]:
                k_cache[pages[entry, row], within[row]] = k[entry, i]
                v_cache[pages[entry, row], within[row]] = v[entry, i]

    gathered = []
    for cache in (k_cache, v_cache):
        of_entries = np.zeros((entries, rows, *cache.shape[2:]), cache.dtype)
        entry, row = np.nonzero(exists)
        of_entries[entry, row] = cache[pages[entry, row], within[row]]
        gathered.append(of_entries)
    start = np.zeros(entries, np.int64)
    if cache_leftpad is not None:
        start = np.asarray(cache_leftpad, np.int64).clip(0, rows)
    given = {"seqlens_k": lengths + new - start, "starts_k": start}
    out = np.zeros((entries, seqlen_q, q.shape[2], v_cache.shape[3]))
    lse = np.full((entries, q.shape[2], seqlen_q), -np.inf)
    for alone in each_alone(q, gathered[0], options | given):
        at = alone.rows
        arrays = q[at["q"]], gathered[0][at["k"]], gathered[1][at["v"]]
        out[at["out"]], lse[at["lse"]] = naive(*arrays, precision=precision, **alone.options)
    return out, lse, k_cache, v_cache
