"""flash-attn 3's `flash_attn_interface`: its positions of arguments, and its pairs of results.

The functions are those of `numflash.flash_attn`, which see, and take all that these take.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature

from numflash.frontends.flash_attn import dense, kvcache, varlen
from numflash.frontends.flash_attn.combine import flash_attn_combine
from numflash.frontends.flash_attn.kvcache import get_scheduler_metadata

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_DESCALES = "q_descale", "k_descale", "v_descale"
_WINDOW = "window_size", "attention_chunk", "softcap"
_TAIL = *_WINDOW, "num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"
_OF_CACHE = "cache_seqlens", "cache_batch_idx", "cache_leftpad", "page_table"
_PACKED = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k"


def _in_order(function: Callable, *names: str) -> Callable:
    """A function whose first arguments are these, in this order; of three results it has two."""
    parameters = signature(function).parameters
    first = [parameters[name].replace(kind=1) for name in names]
    others = [each.replace(kind=3) for name, each in parameters.items() if name not in names]

    @wraps(function)
    def in_order(*arguments, **named):
        if len(arguments) > len(names):
            raise TypeError(
                f"{function.__name__} takes {len(names)} arguments by position, got "
                f"{len(arguments)}"
            )
        given = dict(zip(names, arguments, strict=False))
        found = function(**given, **named)
        return found[:2] if isinstance(found, tuple) else found

    in_order.__signature__ = signature(function).replace(parameters=[*first, *others])
    return in_order


flash_attn_func = _in_order(
    dense.flash_attn_func, "q", "k", "v", "softmax_scale", "causal", "qv", *_DESCALES, *_TAIL
)
flash_attn_qkvpacked_func = _in_order(
    dense.flash_attn_qkvpacked_func,
    "qkv",
    "softmax_scale",
    "causal",
    *_DESCALES,
    *_WINDOW,
    "deterministic",
    "num_heads_q",
    "sm_margin",
    "return_attn_probs",
)
flash_attn_varlen_func = _in_order(
    varlen.flash_attn_varlen_func,
    "q",
    "k",
    "v",
    *_PACKED,
    "softmax_scale",
    "causal",
    "qv",
    *_DESCALES,
    *_TAIL,
)
flash_attn_with_kvcache = _in_order(
    kvcache.flash_attn_with_kvcache,
    "q",
    "k_cache",
    "v_cache",
    "k",
    "v",
    "qv",
    "rotary_cos",
    "rotary_sin",
    *_OF_CACHE,
    "cu_seqlens_q",
    "cu_seqlens_k_new",
    "max_seqlen_q",
    "rotary_seqlens",
    *_DESCALES,
    "softmax_scale",
    "causal",
    *_WINDOW,
    "rotary_interleaved",
    "scheduler_metadata",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "return_softmax_lse",
)
