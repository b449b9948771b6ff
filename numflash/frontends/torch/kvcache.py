"""Attention over a cache of keys and values on PyTorch tensors.

In eager mode nothing stands between a caller and `numflash.attention_with_kvcache`. Where
something traces, a graph holds one of two operators: `attention_with_append` writes into the
caches in place, and says so in its schema; `attention_on_cache` writes nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from numflash.api import kvcache
from numflash.calls.cache_forward import run_with_cache
from numflash.frontends.encoding import decode
from numflash.frontends.torch import traced
from numflash.frontends.torch.operators import DEVICES, LIBRARY, TAGS
from numflash.runtime.errors import UnsupportedError

_OF_CACHE = (
    "cache_seqlens",
    "page_table",
    "cache_batch_idx",
    "cache_leftpad",
    "k_descale",
    "v_descale",
    "rotary_cos",
    "rotary_sin",
)
"""Tensors of a call besides q, the caches, and what is appended."""


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    rotary_interleaved: bool = True,
    return_lse: bool = False,
    check_lengths: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`numflash.attention_with_kvcache` on tensors, which `torch.compile` and export can trace.

    k and v are written into the caches in place, by a compiled graph, too. An integer in
    cache_seqlens is a number of the graph; where PyTorch takes it for a constant, each step with
    another compiles again.

    Args:
        q, k_cache, v_cache, k, v, cache_seqlens, rotary_interleaved, return_lse, check_lengths:
            as of `numflash.attention_with_kvcache`.
        options: its others, without out and stream.

    Raises:
        TypeError, ValueError: as `numflash.attention_with_kvcache`.
        UnsupportedError: as there; or a tensor requires a gradient while gradients are recorded.

    Example:
        >>> import torch, numflash.torch
        >>> cache, new = torch.zeros(2, 1, 32, 2, 16), torch.randn(3, 1, 1, 2, 16)
        >>> q, k, v = new
        >>> out = numflash.torch.attention_with_kvcache(q, *cache, k, v, cache_seqlens=0)
        >>> torch.equal(cache[1, :, :1], v), out.shape
        (True, torch.Size([1, 1, 2, 16]))
    """
    name = "attention_with_kvcache"
    for option in ("out", "stream", *kvcache.NOT_OF_CACHES):
        if option in options:
            raise TypeError(f"numflash.torch.{name} has no {option}")
    own = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    expect_no_gradients(name, own | options)
    if not traced.is_traced(q, k_cache, v_cache):
        return kvcache.attention_with_kvcache(
            **own,
            cache_seqlens=cache_seqlens,
            rotary_interleaved=rotary_interleaved,
            return_lse=return_lse,
            check_lengths=check_lengths,
            **options,
        )
    of_cache = {each: options.pop(each, None) for each in _OF_CACHE}
    length = None
    if isinstance(cache_seqlens, Tensor):
        of_cache["cache_seqlens"] = cache_seqlens
    else:
        length = cache_seqlens
    tensors, text = traced.tensors_and_text(name, options)
    more = length, *of_cache.values(), rotary_interleaved, check_lengths, tensors, text
    if k is None and v is None:
        out, lse = _ON_CACHE(q, k_cache, v_cache, *more)
    else:
        out, lse = _WITH_APPEND(q, k_cache, v_cache, k, v, *more)
    return (out, lse) if return_lse else out


def expect_no_gradients(what: str, given: Mapping[str, Any]) -> None:
    """Raise UnsupportedError where one of these requires a gradient that would be recorded."""
    if torch.is_grad_enabled():
        for name, x in given.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise UnsupportedError(
                    f"{what} has no gradients, and {name} requires one: call it under "
                    f"torch.no_grad() or torch.inference_mode(), or give {name}.detach()"
                )


def _on_cache(q, k_cache, v_cache, *more):
    return _with_append(q, k_cache, v_cache, None, None, *more)


def _with_append(q, k_cache, v_cache, k, v, length, *more):
    *of_cache, interleaved, check_lengths, tensors, text = more
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    arrays |= zip(_OF_CACHE, of_cache, strict=True)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    options = decode(text, tensors)
    with torch.no_grad():
        return run_with_cache(arrays, options, length, interleaved, None, check_lengths)


def _fake_on_cache(q, k_cache, v_cache, *more):
    return _fake_with_append(q, k_cache, v_cache, None, None, *more)


def _fake_with_append(q, k_cache, v_cache, k, v, *more):
    *_, tensors, text = more
    if q.dim() != 4 or k_cache.dim() != 4 or v_cache.dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache))
        raise ValueError(f"q, k_cache and v_cache must have 4 axes, got {shapes}")
    out_dtype = decode(text, tensors).out_dtype
    dtype = q.dtype if out_dtype is None else getattr(torch, out_dtype)
    batch, seqlen, heads, _ = q.shape
    out = q.new_empty((batch, seqlen, heads, v_cache.shape[3]), dtype=dtype)
    return out, q.new_empty((batch, heads, seqlen), dtype=torch.float32)


def _define(name: str, caches: str, function, fake):
    of_cache = "".join(f"Tensor? {each}, " for each in _OF_CACHE)
    LIBRARY.define(
        f"{name}(Tensor q, {caches}SymInt? length, {of_cache}bool rotary_interleaved, "
        "bool check_lengths, Tensor[] arrays, str options) -> (Tensor, Tensor)",
        tags=TAGS,
    )
    for key in DEVICES:
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"numflash::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.numflash, name).default


_ON_CACHE = _define(
    "attention_on_cache", "Tensor k_cache, Tensor v_cache, ", _on_cache, _fake_on_cache
)
_WITH_APPEND = _define(
    "attention_with_append",
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, ",
    _with_append,
    _fake_with_append,
)
