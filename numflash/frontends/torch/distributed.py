"""Attention over the ranks of a communicator, on PyTorch tensors, with gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from numflash.distributed import Layout, attention, attention_backward
from numflash.distributed.agreement import Shard, agree
from numflash.frontends.torch import calls, traced
from numflash.frontends.torch.operators import no_second
from numflash.frontends.torch.untraced import untraced
from numflash.runtime.errors import UnsupportedError

_MAX_SEED = 2**62
_SHARED = ("sinks", "alibi_slopes", "bias")
"""Tensors among the options that all ranks have, and that have gradients; so have those of aux."""


@untraced
def distributed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    comm,
    method: str | tuple[str, str] = "auto",
    travels: str = "auto",
    wire=None,
    max_workspace: int | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`numflash.distributed.attention` on tensors, through which autograd differentiates.

    Each rank calls it with its own tokens, and with the same options; so it does the backward:
    every rank's loss must depend on its result, or the others wait for it.

    Args:
        q: (batch, tokens, num_heads_q, head_dim) of this rank's tokens; k: (batch, tokens,
            num_heads_kv, head_dim); v: (batch, tokens, num_heads_kv, head_dim_v): float16,
            bfloat16 or float32. Under autocast they get its dtype first.
        layout, comm, method, wire, max_workspace: as of `numflash.distributed.attention`.
        travels: of the backward, as of `numflash.distributed.attention_backward`.
        return_lse: also return the log-sum-exp, which has a gradient, too.
        options: the others of `numflash.distributed.attention`. With dropout_p and no seed, the
            first rank draws one from PyTorch's generator of its device, and sends it to the
            others in each call.

    Returns:
        out: (batch, tokens, num_heads_q, head_dim_v) of this rank's tokens. It has gradients of
            q, k and v; those of sinks, alibi_slopes, bias and aux, which all ranks have, are the
            same share on each rank: their sum over ranks is the gradient, as it is of a layer's
            weights.
        lse: with return_lse, (batch, num_heads_q, tokens) float32.

    Raises:
        TypeError, ValueError, UnsupportedError, CommunicatorError: as
            `numflash.distributed.attention`.
        UnsupportedError: a second derivative, a derivative in forward mode, another option that
            requires a gradient; where PyTorch traces. `torch.compile` breaks the graph here.

    Example:
        >>> import torch, numflash.torch
        >>> from numflash.distributed import Layout, local
        >>> q, k, v = torch.randn(3, 1, 32, 2, 16).unbind()
        >>> (comm,) = local(1)  # of_torch(group) in a process of several
        >>> layout = Layout.zigzag(32, comm.size)
        >>> out = numflash.torch.distributed_attention(
        ...     q.requires_grad_(), k, v, layout=layout, comm=comm, causal=True
        ... )
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([1, 32, 2, 16])
    """
    for name, x in zip(calls.OPERANDS, (q, k, v), strict=True):
        calls.expect_tensor(name, x)
    if traced.is_traced(q, k, v):
        raise UnsupportedError(
            "distributed_attention can be no part of a graph of PyTorch's: it takes plain "
            "tensors, outside of torch.func, make_fx and dispatch modes"
        )
    q, k, v = calls.under_autocast(q, k, v)
    if forward_ad._current_level >= 0:
        calls.expect_no_tangents(q, k, v, *options.values())
    ranks = {"layout": layout, "comm": comm, "method": method}
    ranks |= {"wire": wire, "max_workspace": max_workspace}
    if options.get("dropout_p") and options.get("seed") is None:
        operands = {name: Shard(x, x.dim() - 3) for name, x in zip("qkv", (q, k, v), strict=True)}
        asked = {"window_size": (-1, -1), **operands, **ranks, **options}
        options["seed"] = _seed_of_first_rank(asked, q.device)
    aux = _of_aux(options)
    tensors = {name: x for name, x in (options | aux).items() if isinstance(x, Tensor)}
    _expect_gradients(options)
    learned = (q, k, v, *tensors.values())
    if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
        rest = {name: x for name, x in options.items() if name not in tensors}
        if aux:
            rest["aux"] = tuple(None if isinstance(x, Tensor) else x for x in aux.values())
        made = _Distributed.apply(
            q, k, v, {**ranks, **rest}, travels, tuple(tensors), *tensors.values()
        )
        return made if return_lse else made[0]
    return attention(q, k, v, return_lse=return_lse, **ranks, **options)


def _seed_of_first_rank(asked: dict[str, Any], device: torch.device) -> Tensor | None:
    """A seed that all ranks have; None where comm is none, which the call itself refuses."""
    comm = asked.pop("comm")
    comms = tuple(comm) if isinstance(comm, tuple | list) else (comm,)
    if not all(hasattr(each, "all_gather") and hasattr(each, "agree") for each in comms):
        return None
    # A rank that asks for something else is in the round of its own call.
    asked["seed"] = "one that the first rank draws"
    agree(comms, "numflash.distributed.attention", asked, lambda: None)
    seed = torch.randint(_MAX_SEED, (1,), device=device)
    for each in comms:
        seed = each.all_gather(seed, "the seed of dropout")[0]
    return seed


def _expect_gradients(options: dict[str, Any]) -> None:
    """Check that no option requires a gradient that it cannot have. Raises UnsupportedError."""
    for name, x in options.items():
        is_learned = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        if is_learned and name not in _SHARED:
            raise UnsupportedError(
                f"{name} requires a gradient and has none over several ranks; q, k, v, "
                f"{', '.join(_SHARED)} and aux have: give it as .detach()"
            )


def _of_aux(options: dict[str, Any]) -> dict[str, Any]:
    """What functions get, by the names of gradients."""
    aux = options.get("aux")
    return {f"aux{n}": x for n, x in enumerate(aux)} if isinstance(aux, tuple | list) else {}


def _with_tensors(
    asked: dict[str, Any], names: tuple[str, ...], tensors: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Options with their tensors, those of aux among them."""
    given = dict(zip(names, tensors, strict=True))
    aux = [given.pop(name, x) for name, x in _of_aux(asked).items()]
    return asked | given | ({"aux": tuple(aux)} if aux else {})


class _Distributed(torch.autograd.Function):
    """The forward and the backward, of one rank."""

    @staticmethod
    def forward(ctx, q, k, v, asked, travels, names, *tensors):
        options = _with_tensors(asked, names, tensors)
        out, lse = attention(q, k, v, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.asked, ctx.travels, ctx.names = asked, travels, names
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needed = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]
        if dout is None and dlse is None:
            return (None,) * (len(needed) + 3)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        options = _with_tensors(ctx.asked, ctx.names, tuple(tensors))
        options.pop("out_dtype", None)
        if dout is None:
            dout = torch.zeros_like(out, dtype=q.dtype)
        dout = dout.to(q.dtype).resolve_neg()
        wrt = calls.wanted(ctx.names, needed)
        with torch.no_grad():
            made = attention_backward(
                dout, q, k, v, out, lse, travels=ctx.travels, dlse=dlse, wrt=wrt, **options
            )
        size = ctx.asked["layout"].ranks
        named = zip(wrt, made, strict=True)
        made = [x if name in calls.OPERANDS else x / size for name, x in named]
        if torch.is_grad_enabled():
            made = _Once.apply(dout, q, k, v, *made)
        own, of_options = calls.dealt(wrt, made, ctx.names)
        return *own, None, None, None, *of_options


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, dout, q, k, v, *made):
        return tuple(x.view_as(x) for x in made)

    @staticmethod
    def backward(ctx, *_):
        no_second()
