"""The problem of all ranks as one GPU would get it: checked, and its kernel.

What one GPU would refuse the ranks refuse, before anything travels. Pure metadata: no array is
read, and there need be no GPU.
"""

from collections.abc import Mapping
from dataclasses import replace

from numflash.calls.arguments import Request, request_of
from numflash.calls.backward import Backward
from numflash.calls.forward import selection_of
from numflash.calls.fp8_forward import fp8_request_of
from numflash.configs.features import default_gradients
from numflash.distributed.layouts import Layout
from numflash.problem.options import PACKED, AttentionOptions, GradientOptions
from numflash.runtime.views import ArrayView, fresh
from numflash.selection.choice import Purpose, split_configs

_OF_BACKWARD = ("dout", "out", "lse", "delta", "dlse")
_OF_QUERIES = ("lse", "delta", "dlse")


def request_of_whole(
    views: Mapping[str, ArrayView], layout: Layout, options: AttentionOptions
) -> Request:
    """The forward of all tokens on one GPU.

    Args:
        views: of q, k and v of one rank, (batch, tokens, heads, head_dim), and of the options
            that are arrays, by name.
        layout: who holds which tokens.
        options: of the whole problem.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    whole, options = _whole(views, layout, options)
    if options.precision == "fp8":
        return fp8_request_of(whole, options)[0]
    return request_of(whole, options)


def pinned_config(
    views: Mapping[str, ArrayView], layout: Layout, options: AttentionOptions
) -> str | None:
    """The config that gather and heads run on all ranks, if the caller names none.

    It is the one that one GPU would choose for all tokens, but that it does not split keys: with
    it `numflash.attention` on one GPU, or of several documents `attention_varlen`, gives the bits
    that the ranks give.

    Args and errors as `request_of_whole`. Returns None where there is nothing to compute.

    Example:
        >>> from numflash.distributed import Layout
        >>> from numflash.distributed.whole import pinned_config
        >>> from numflash.problem.options import AttentionOptions
        >>> from numflash.runtime.gpus import find
        >>> from numflash.runtime.views import fresh
        >>> layout, shape = Layout.zigzag(8192, ranks=4), (1, 2048, 8, 128)
        >>> views = {name: fresh(shape, "bfloat16", find("H200")) for name in "qkv"}
        >>> pinned_config(views, layout, AttentionOptions(causal=True)).startswith("sm90-")
        True
    """
    request = request_of_whole(views, layout, options)
    if request.is_empty or not request.problem.seqlen_k:
        return None
    config = selection_of(request, None, Purpose.QUESTION).forward.config
    if getattr(config, "num_splits", 1) > 1:
        config = replace(config, num_splits=1)
    return str(config)


def expect_forward(
    views: Mapping[str, ArrayView], layout: Layout, options: AttentionOptions
) -> None:
    """Check a forward of all tokens, and that a kernel runs it. Raises as `request_of_whole`."""
    request = request_of_whole(views, layout, options)
    if not request.is_empty:
        forced, _ = split_configs(options.config)
        selection_of(request, forced or None, Purpose.QUESTION)


def gradients_of_whole(
    views: Mapping[str, ArrayView],
    layout: Layout,
    options: AttentionOptions,
    asked: GradientOptions,
) -> tuple[str, ...]:
    """What a backward of all tokens has gradients of, in order.

    Args:
        views: as of `request_of_whole`, and of dout, out, lse and dlse.
        layout, options: as there; the options are those of a backward.
        asked: which gradients.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention_backward`.
    """
    whole, options = _whole(views, layout, options)
    Backward(whole, options, asked, Purpose.QUESTION)
    if asked.wrt is not None:
        return tuple(asked.wrt)
    operands = {name: x for name, x in whole.items() if name not in _OF_BACKWARD}
    return default_gradients(request_of(operands, options).problem.feature_names)


def are_together(layout: Layout, batch: int, options: AttentionOptions) -> bool:
    """Whether one call computes several documents of a rank, as packed sequences."""
    # Kernels on 8-bit floats know one length for all.
    return len(layout.lengths) > 1 and batch == 1 and options.precision != "fp8"


def _whole(
    views: Mapping[str, ArrayView], layout: Layout, options: AttentionOptions
) -> tuple[dict[str, ArrayView], AttentionOptions]:
    """The views with all tokens, and the options of a call on one GPU."""
    packed = are_together(layout, views["q"].shape[0], options)
    found = dict(views)
    for name in ("q", "k", "v", "dout", "out"):
        if name in found:
            found[name] = _with_tokens(found[name], layout.seqlen, 1, packed)
    for name in _OF_QUERIES:
        if name in found:
            shape = list(found[name].shape)
            shape[-1] = layout.seqlen
            view = fresh(tuple(shape), found[name].dtype, found[name].device)
            found[name] = _without_batch(view) if packed else view
    if packed:
        ends = fresh((len(layout.lengths) + 1,), "int32", found["q"].device)
        found |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options = options._replace(layout=PACKED)
    return found, options


def _with_tokens(view: ArrayView, tokens: int, axis: int, packed: bool) -> ArrayView:
    shape = list(view.shape)
    shape[axis] = tokens
    view = replace(view, shape=tuple(shape))
    return _without_batch(view) if packed else view


def _without_batch(view: ArrayView) -> ArrayView:
    return replace(view, shape=view.shape[1:], strides=view.strides[1:])
