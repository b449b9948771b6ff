"""Attention under the transforms of `torch.func`: grad, vjp, jacrev, vmap, and any order of them.

An operator's own gradient does not work there; a Function with `setup_context` and `vmap` does. A
mapped axis becomes part of the batch. Where that would change a call's meaning, as functions see
the number of their batch entry, and where tensors of options are mapped or have gradients, the
calls are made one after another.
"""

import torch
from torch import Tensor

from numflash.frontends.encoding import decode
from numflash.frontends.torch import calls, operators
from numflash.problem.options import PACKED, AttentionOptions
from numflash.runtime.errors import UnsupportedError


class Attention(torch.autograd.Function):
    """numflash::attention under transforms."""

    @staticmethod
    def forward(q, k, v, text, *arrays):
        """The operator."""
        return operators.ATTENTION(q, k, v, list(arrays), text)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep what the backward reads."""
        q, k, v, ctx.text, *arrays = inputs
        options = decode(ctx.text, arrays)
        ctx.names = tuple(options.arrays())
        calls.expect_gradients(ctx.names, tuple(ctx.needs_input_grad[4:]), options)
        ctx.save_for_backward(q, k, v, *output, *arrays)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        """The gradients, by an operator, too."""
        needed = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]
        if dout is None and dlse is None:
            return (None,) * (len(needed) + 1)
        q, k, v, out, lse, *arrays = ctx.saved_tensors
        wrt = calls.wanted(ctx.names, needed)
        operands = dout, dlse, q, k, v, out, lse
        made = _Gradients.apply(*operands, ctx.text, " ".join(wrt), *arrays)
        own, of_options = calls.dealt(wrt, made, ctx.names)
        return *own, None, *of_options

    @staticmethod
    def jvp(ctx, *_):
        """Raise UnsupportedError."""
        raise UnsupportedError(calls.FORWARD_MODE)

    @staticmethod
    def vmap(info, in_dims, q, k, v, text, *arrays):
        """One call for all, or one for each."""
        options = decode(text, arrays)
        if not _joins_batch(options, in_dims[4:]):
            return one_by_one(info, in_dims, Attention.apply, q, k, v, text, *arrays)
        size, batch = info.batch_size, batch_of(q, in_dims[0])
        axes = q.dim() - (in_dims[0] is not None)
        places = zip((q, k, v), in_dims, strict=False)
        joined = [join_batch(x, dim, size, options.layout) for x, dim in places]
        out, lse = Attention.apply(*joined, text, *arrays)
        entries = size, batch
        return (
            split_batch(out, entries, axes, options.layout),
            _split_lse(lse, entries, axes),
        ), (0, 0)


class _Gradients(torch.autograd.Function):
    """numflash::attention_backward under transforms."""

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, text, wrt, *arrays):
        given = dout, q, k, v, out, lse, dlse
        return tuple(operators.BACKWARD(*given, list(arrays), text, wrt))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        operators.no_second()

    @staticmethod
    def vmap(info, in_dims, dout, dlse, q, k, v, out, lse, text, wrt, *arrays):
        options, size = decode(text, arrays), info.batch_size
        given = dout, dlse, q, k, v, out, lse
        is_own = all(name in calls.OPERANDS for name in wrt.split())
        if not is_own or not _joins_batch(options, in_dims[9:]):
            return one_by_one(info, in_dims, _Gradients.apply, *given, text, wrt, *arrays)
        axes = q.dim() - (in_dims[2] is not None)
        joined = [
            join_batch(x, dim, size, options.layout if n not in (1, 6) else None)
            for n, (x, dim) in enumerate(zip(given, in_dims, strict=False))
        ]
        made = _Gradients.apply(*joined, text, wrt, *arrays)
        entries = size, batch_of(q, in_dims[2])
        return tuple(split_batch(x, entries, axes, options.layout) for x in made), (0,) * len(made)


def _joins_batch(options: AttentionOptions, dims_of_arrays) -> bool:
    """Whether more batch entries mean the same for each."""
    if any(dim is not None for dim in dims_of_arrays):
        return False
    if options.layout == PACKED or options.dropout_p or options.origin is not None:
        return False
    for name, x in options.arrays().items():
        if name in ("bias", "mask"):
            if x.dim() == 4 and x.shape[0] != 1:
                return False
        elif name == "alibi_slopes":
            if x.dim() != 1:
                return False
        elif name != "sinks":
            return False
    given = options.score_mod, options.mask_mod, options.block_mask
    return all(each is None for each in given)


def join_batch(x: Tensor | None, dim: int | None, size: int, layout: str | None) -> Tensor | None:
    """A tensor whose mapped axis is part of its batch; layout None is that of lse."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    full = 3 if layout is None else 4
    if x.dim() > full:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    if x.dim() < full:  # without heads
        return x.unsqueeze(2 if layout == "bshd" else 1)
    return x


def batch_of(x: Tensor, dim: int | None) -> int:
    """The batch of a tensor of four axes or more, without its mapped axis."""
    return x.shape[1 if dim == 0 else 0]


def split_batch(x: Tensor, entries: tuple[int, int], axes: int, layout: str) -> Tensor:
    """A result for arrays of `join_batch`, the mapped axis first.

    Args:
        x: the result.
        entries: (size of the mapped axis, batch of an entry).
        axes: how many the arrays had, of which there is a batch if they are four.
        layout: of the call.
    """
    if axes == 4:
        return x.reshape(*entries, *x.shape[1:])
    return x if axes == 3 else x.squeeze(2 if layout == "bshd" else 1)


def _split_lse(x: Tensor, entries: tuple[int, int], axes: int) -> Tensor:
    if axes == 4:
        return x.reshape(*entries, *x.shape[1:])
    return x if axes == 3 else x.squeeze(1)


def one_by_one(info, in_dims, function, *args) -> tuple:
    """The results of a function, a tuple, of each entry by itself, and their mapped axes.

    Raises:
        UnsupportedError: there is no entry, whose results would say what theirs are.
    """
    if not info.batch_size:
        raise UnsupportedError(
            "torch.vmap maps an axis of size 0, and this call's entries run one after another"
        )
    made = []
    for n in range(info.batch_size):
        given = (
            x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)
        )
        made.append(function(*given))
    results = tuple(map(torch.stack, zip(*made, strict=True)))
    return results, (0,) * len(results)
