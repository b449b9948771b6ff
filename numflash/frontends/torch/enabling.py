"""numflash in the place of torch's `scaled_dot_product_attention`: in the process, or in a block.

In the process: torch's operator gets another kernel, as `CompositeImplicitAutograd`, above which
torch has nothing but autocast. Eager code, compiled code and modules reach it, by whatever name.
In a block: a mode of torch that sees the function's calls by its thread.
"""

import sys
import threading
import warnings

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from numflash.frontends.torch.sdpa import Reason, attended, by, scaled_dot_product_attention

_NAME = "scaled_dot_product_attention"
# The second is above all transforms of torch.func, which start again with what is called there.
_KEYS = "CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"
# Part of the keys of what torch's compiler keeps on disk: graphs do not say whose kernel it was.
_TAG = "numflash-sdpa"
_lock = threading.Lock()
_library: torch.library.Library | None = None


def enable() -> None:
    """Put numflash in the place of torch's `scaled_dot_product_attention`, in this process.

    All that reaches torch's operator comes to `numflash.torch.scaled_dot_product_attention`, on
    all threads: `torch.nn.functional`'s function, also under names imported before,
    `MultiheadAttention`, and code compiled from here on. What was compiled before is dropped.
    Where numflash cannot, torch's own runs. Enabling twice is enabling once.

    `MultiheadAttention.eval()` without gradients takes torch's fused path in C++, which has
    another operator; `torch.backends.mha.set_fastpath_enabled(False)` turns that off.

    Example:
        >>> import torch, numflash.torch
        >>> numflash.torch.enable()
        >>> q = torch.randn(1, 2, 16, 8)
        >>> torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 2, 16, 8])
        >>> numflash.torch.disable()
    """
    global _library
    with _lock:
        if _library is not None:
            return
        # Fetched before it is overridden: what torch runs where numflash cannot. It is the same
        # function for all devices.
        torchs = torch.library.get_kernel(f"aten::{_NAME}", "CPU")

        def attention(
            keyset,
            query,
            key,
            value,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            *,
            scale=None,
            enable_gqa=False,
        ):
            call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            out = attended(*call)
            if not isinstance(out, Reason):
                return out
            with by(out):
                return torchs.call_boxed(keyset, *call[:6], scale=scale, enable_gqa=enable_gqa)

        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # That an operator is overridden, which is what was asked for.
            warnings.simplefilter("ignore")
            for key in _KEYS:
                library.impl(_NAME, attention, key, with_keyset=True)
        _library = library
        _forget_compiled(torch.compiler.config.cache_key_tag + _TAG)


def disable() -> None:
    """Undo `enable`: torch's attention is torch's again. Disabling twice is disabling once.

    Example:
        >>> import numflash.torch
        >>> numflash.torch.disable()
        >>> numflash.torch.is_enabled()
        False
    """
    global _library
    with _lock:
        if _library is None:
            return
        _library._destroy()
        _library = None
        _forget_compiled(torch.compiler.config.cache_key_tag.replace(_TAG, ""))


def is_enabled() -> bool:
    """Whether numflash is in the place of torch's attention in this process.

    Example:
        >>> import numflash.torch
        >>> numflash.torch.is_enabled()
        False
    """
    return _library is not None


def replacing_sdpa() -> TorchFunctionMode:
    """A context, for `with`: in it this thread's `scaled_dot_product_attention` is numflash's.

    For code compiled inside, too; it is compiled again outside. Not for `MultiheadAttention`,
    within which torch turns modes off: `enable` reaches it. While the context is open each
    function of torch costs a microsecond more.

    Example:
        >>> import torch, numflash.torch
        >>> q = torch.randn(1, 2, 16, 8)
        >>> with numflash.torch.replacing_sdpa():
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    """
    return _Replacing()


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _forget_compiled(tag: str) -> None:
    """Drop the graphs in which torch's operator was another; those on disk have another tag."""
    torch.compiler.config.cache_key_tag = tag
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
