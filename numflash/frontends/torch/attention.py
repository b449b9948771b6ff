"""Attention on PyTorch tensors, as people call it; autograd differentiates through it."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from numflash.api.block_masks import with_own_block_mask
from numflash.calls.fp8_options import descales_of
from numflash.frontends.torch import calls, traced
from numflash.problem.block_masks import ListedBlocks
from numflash.problem.options import PACKED, AttentionOptions, SharedOptions
from numflash.runtime.errors import UnsupportedError


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_decision: bool = False,
    out: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    check_lengths: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """`numflash.attention` on tensors, through which autograd differentiates.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim); k: (batch, seqlen_k, num_heads_kv, head_dim);
            v: (batch, seqlen_k, num_heads_kv, head_dim_v): float16, bfloat16 or float32, on one
            CUDA device, or in the simulator on the CPU. Any strides. With layout "bhsd" the two
            middle axes are swapped. Under autocast they get its dtype first.
        return_lse: also return the log-sum-exp, which has a gradient, too.
        return_decision, out, q_descale, k_descale, v_descale: as of `numflash.attention`, where
            no gradients are recorded.
        check_lengths: as of `numflash.attention`.
        options: the others of `numflash.attention`, without stream: the call runs on PyTorch's
            current stream. With dropout_p and no seed, a seed is drawn from PyTorch's generator
            of the device, so that torch.manual_seed repeats it. A `config` that is a dictionary
            may also name kernels of the backward, as for `numflash.attention_backward`.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), contiguous, of the dtype of q or
            out_dtype. It has gradients of q, k, v, bias, sinks, alibi_slopes and of what
            score_mod reads of aux, each of the dtype of what it is of; the backward multiplies a
            gradient that arrives in out_dtype in the dtype of q.
        lse, decision: with return_lse and return_decision, as of `numflash.attention`.

    Raises:
        TypeError: as `numflash.attention`: a float64 tensor, one on another device, ...
        ValueError: as `numflash.attention`; tensors on several devices.
        UnsupportedError: as `numflash.attention`; a second derivative, a derivative in forward
            mode; `out`, 8-bit floats, or tensors that have no gradients, where gradients are
            recorded; `out`, return_decision, check_lengths or descales where PyTorch traces.

    Under `torch.compile`, `torch.export`, `make_fx` and `torch.func` the call is an operator,
    `torch.ops.numflash.attention`. score_mod and mask_mod then are texts in the graph: the numbers
    that they close over are guarded. Meta tensors give meta tensors. docs/frontends.md has more.

    Example:
        >>> import torch, numflash.torch
        >>> q, k, v = torch.randn(3, 1, 32, 2, 16, dtype=torch.bfloat16)
        >>> out = numflash.torch.attention(q.requires_grad_(), k, v, causal=True)
        >>> out.sum().backward()
        >>> out.shape, q.grad.dtype
        (torch.Size([1, 32, 2, 16]), torch.bfloat16)
    """
    descales = descales_of(q_descale, k_descale, v_descale)
    result, lse, decision = _attended(
        "attention", q, k, v, options, out, descales, return_decision, check_lengths
    )
    if not (return_lse or return_decision):
        return result
    return (result, *([lse] * return_lse), *([decision] * return_decision))


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    schedule=None,
    *,
    return_lse: bool = False,
    out: Tensor | None = None,
    check_lengths: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`numflash.attention_varlen` on tensors, through which autograd differentiates.

    Args:
        q: (tokens_q, num_heads_q, head_dim); k: (tokens_k, num_heads_kv, head_dim);
            v: (tokens_k, num_heads_kv, head_dim_v): the tokens of all sequences.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 on the device of q.
        max_seqlen_q, max_seqlen_k, schedule: as of `numflash.attention_varlen`. Where PyTorch
            traces a schedule is not kept: each call lists its tiles.
        return_lse: also return the log-sum-exp, which has a gradient, too.
        out: as of `numflash.attention_varlen`, where no gradients are recorded.
        check_lengths: as of `numflash.attention_varlen`.
        options: the others of `numflash.attention_varlen`, without stream; dropout, autocast and
            config as in `attention`.

    Returns:
        out: (tokens_q, num_heads_q, head_dim_v); rows that no sequence has are 0, and so are the
            gradients of rows that no sequence has.
        lse: with return_lse, (num_heads_q, tokens_q) float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention_varlen` and `attention`.

    Example:
        >>> import torch, numflash.torch
        >>> q, k, v = torch.randn(3, 30, 2, 16).unbind()
        >>> ends = torch.tensor([0, 12, 30], dtype=torch.int32)
        >>> out = numflash.torch.attention_varlen(q.requires_grad_(), k, v, ends, ends)
        >>> out.square().sum().backward()
        >>> q.grad.shape
        torch.Size([30, 2, 16])
    """
    refused = [name for name in _NOT_OF_VARLEN if name in options]
    if refused:
        raise TypeError(f"attention_varlen does not take {', '.join(refused)}")
    options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "layout": PACKED}
    if schedule is not None:
        options["schedule"] = schedule
    result, lse, _ = _attended(
        "attention_varlen", q, k, v, options, out, None, False, check_lengths
    )
    return (result, lse) if return_lse else result


_NOT_OF_VARLEN = ("layout", "block_mask", "appended", "cached")


def _attended(function, q, k, v, options, out, descales, return_decision, check_lengths) -> tuple:
    """(out, lse, decision or None), recorded where a gradient is wanted."""
    if options.get("dropout_p") and options.get("seed") is None:
        # A tensor, as any random number of PyTorch's: graphs draw a new one each time.
        options["seed"] = torch.randint(_MAX_SEED, (), device=calls.device_of(q))
    if return_decision and options.get("precision") != "auto":
        given = options.get("precision")
        raise ValueError(f'return_decision goes with precision="auto", got {given!r}')
    if traced.is_traced(q, k, v):
        _expect_in_graph(out, descales, return_decision, check_lengths)
        return *traced.call(function, q, k, v, options), None
    kinds = tuple(map(type, options.values()))
    are_scalars = _SCALARS.issuperset(kinds)
    if are_scalars:
        asked = _shared(function, tuple(options.items()), kinds)
    else:
        try:
            asked = AttentionOptions(**options)
        except TypeError:
            asked = AttentionOptions.of(function, options, _OTHERS)
        asked = with_own_block_mask(asked)
    q, k, v = calls.under_autocast(q, k, v)
    if forward_ad._current_level >= 0:
        calls.expect_no_tangents(q, k, v, *options.values())
    if not torch.is_grad_enabled() or not _is_learned(q, k, v, None if are_scalars else options):
        return calls.forward(q, k, v, asked, out, descales, check_lengths)
    if out is not None:
        raise UnsupportedError(
            "out cannot be given where gradients are recorded: autograd needs a result of "
            "its own. Disable gradients (torch.no_grad()), or leave out= away"
        )
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        calls.expect_operands(q, k, v)
        asked = asked._replace(precision="fp8")
    elif descales is not None:
        asked = asked._replace(precision="fp8")
    if are_scalars and asked.precision is None:
        return *_record(q, k, v, asked, (), check_lengths), None
    rest, names, tensors = calls.apart(asked)
    calls.expect_tensors(names, tensors)
    learned = tuple([x.requires_grad for x in tensors])
    calls.expect_gradients(names, learned, asked)
    return *_record(q, k, v, rest, names, check_lengths, *tensors), None


_MAX_SEED = 2**62
_SCALARS = {bool, int, float, str, type(None)}
_OTHERS = ("return_lse", "return_decision", "out", "q_descale", "k_descale", "v_descale")


@lru_cache(1024)
def _shared(function: str, given: tuple, kinds: tuple[type, ...]) -> SharedOptions:
    """The options of all calls that give these numbers and words.

    Args:
        function: that was called, for messages.
        given: (name, value) of each.
        kinds: of the values: 1 is equal to True, and another value.
    """
    return SharedOptions.of(function, dict(given), _OTHERS)


def _is_learned(q, k, v, options: dict | None) -> bool:
    """Whether an operand, or one of the options, if they are given, requires a gradient."""
    try:
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return True
    except AttributeError:  # an array in 8 bits
        if _any_learned((q, k, v)):
            return True
    return options is not None and _any_learned(options.values())


def _any_learned(values) -> bool:
    """Whether one of some operands or options, or one of aux, requires a gradient."""
    for x in values:
        if isinstance(x, Tensor):
            if x.requires_grad:
                return True
        elif isinstance(x, (tuple, list)):
            if _any_learned(x):
                return True
        elif isinstance(x, ListedBlocks) and _any_learned(x.aux):
            return True
    return False


def _expect_in_graph(out, descales, return_decision, check_lengths) -> None:
    """Check that a call can be part of a graph. Raises UnsupportedError."""
    given = {
        "out": out is not None,
        "return_decision": return_decision,
        "check_lengths": check_lengths,
        "q_descale, k_descale or v_descale": descales is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise UnsupportedError(f"{name} cannot be given where PyTorch traces")


class _Attention(torch.autograd.Function):
    """Attention and its gradients in eager mode."""

    @staticmethod
    def forward(ctx, q, k, v, rest, names, check_lengths, *tensors):
        options = calls.together(rest, names, tensors) if names else rest
        out, lse, _ = calls.forward(q, k, v, options, None, None, check_lengths)
        # Not as attributes: a change in place before the backward is an error.
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.rest, ctx.names = rest, names
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needed = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]
        if dout is None and dlse is None:
            return (None,) * (len(needed) + 3)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        options = calls.together(ctx.rest, ctx.names, tensors)
        wrt = calls.wanted(ctx.names, needed)
        if torch.is_grad_enabled() or traced.is_traced(q, k, v):
            made = traced.gradients(dout, q, k, v, out, lse, dlse, options, wrt)
        else:
            made = calls.backward(dout, q, k, v, out, lse, dlse, options, wrt)
        if len(wrt) == 3 and not ctx.names:
            return *made, None, None, None
        own, of_options = calls.dealt(wrt, made, ctx.names)
        return *own, None, None, None, *of_options


# As `_Attention.apply`, without a search for dead wrappers of functorch: 2 microseconds.
_record = super(torch.autograd.Function, _Attention).apply
