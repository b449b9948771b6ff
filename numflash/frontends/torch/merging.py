"""Attention over parts of the keys put together, on PyTorch tensors, with gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from numflash.api import merge
from numflash.frontends.torch import traced
from numflash.frontends.torch.calls import expect_tensor
from numflash.problem.options import kind_of


def merge_partials(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    layout: str = "bshd",
    dtype: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`numflash.merge_partials` on tensors, through which autograd differentiates.

    Args:
        outs, lses, layout, dtype: as of `numflash.merge_partials`.

    Returns:
        out, lse: as there; both have gradients of all parts. Where PyTorch traces, and where a
            gradient is to be differentiated again, they are PyTorch's own arithmetic.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.merge_partials`.

    Example:
        >>> import torch, numflash.torch
        >>> q, k, v = torch.randn(3, 1, 32, 2, 16).unbind()
        >>> attend, halves = numflash.torch.attention, (slice(0, 16), slice(16, 32))
        >>> q = q.requires_grad_()
        >>> parts = [attend(q, k[:, s], v[:, s], return_lse=True) for s in halves]
        >>> out, lse = numflash.torch.merge_partials(*zip(*parts))
        >>> out.sum().backward()
        >>> torch.allclose(out, attend(q, k, v), atol=1e-5)
        True
    """
    tensors = []
    for name, parts in (("outs", outs), ("lses", lses)):
        if isinstance(parts, Tensor):
            tensors.append(parts)
            continue
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, or a tensor, got {kind_of(parts)}")
        for number, part in enumerate(parts):
            expect_tensor(f"{name}[{number}]", part)
            tensors.append(part)
    if any(traced.is_traced(x, x, x) for x in tensors):
        return _arithmetic(list(outs), list(lses), layout, dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Merge.apply(len(outs), layout, dtype, *outs, *lses)
    return merge.merge_partials(outs, lses, layout=layout, dtype=dtype)


class _Merge(torch.autograd.Function):
    """The kernel; the weights of parts, and what moves them, are cheap."""

    @staticmethod
    def forward(ctx, count, layout, dtype, *parts):
        out, lse = merge.merge_partials(parts[:count], parts[count:], layout=layout, dtype=dtype)
        ctx.save_for_backward(out, lse, *parts)
        ctx.count, ctx.layout, ctx.dtype = count, layout, dtype
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *parts = ctx.saved_tensors
        outs, lses = parts[: ctx.count], parts[ctx.count :]
        if torch.is_grad_enabled():
            return None, None, None, *_again(ctx, outs, lses, dout, dlse)
        douts, dlses = [], []
        for part, of_part in zip(outs, lses, strict=True):
            weight = torch.where(lse.isneginf(), 0.0, (of_part - lse).exp())
            moved = torch.zeros_like(lse) if dlse is None else dlse
            if dout is None:
                douts.append(None)
            else:
                by_row = _as_rows(weight, out, ctx.layout)
                douts.append((by_row * dout).to(part.dtype))
                difference = (dout.float() * (part.float() - out.float())).sum(-1, keepdim=True)
                moved = moved + _as_lse(difference, ctx.layout)
            dlses.append(weight * moved)
        return None, None, None, *douts, *dlses


def _again(ctx, outs, lses, dout, dlse) -> tuple:
    """Gradients that may be differentiated: those of the arithmetic."""
    results, given = [], []
    found = _arithmetic(outs, lses, ctx.layout, ctx.dtype)
    for result, gradient in zip(found, (dout, dlse), strict=True):
        if gradient is not None:
            results.append(result)
            given.append(gradient)
    parts = [x for x in (*outs, *lses) if x.requires_grad]
    made = iter(torch.autograd.grad(results, parts, given, create_graph=True, allow_unused=True))
    return tuple(next(made) if x.requires_grad else None for x in (*outs, *lses))


def _as_rows(of_lse: Tensor, out: Tensor, layout: str) -> Tensor:
    """Numbers of rows, as lse has them, along the rows of out."""
    if layout == "bshd" and out.dim() > 2:
        of_lse = of_lse.transpose(-1, -2)
    return of_lse.unsqueeze(-1)


def _as_lse(of_rows: Tensor, layout: str) -> Tensor:
    of_rows = of_rows.squeeze(-1)
    return of_rows.transpose(-1, -2) if layout == "bshd" and of_rows.dim() > 1 else of_rows


def _arithmetic(outs: list, lses: list, layout: str, dtype: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) by PyTorch's own functions, in float32."""
    stacked = torch.stack(lses)
    largest = stacked.amax(0).detach()
    largest = torch.where(largest.isneginf(), 0.0, largest)
    weights = (stacked - largest).exp()
    total = weights.sum(0)
    there = total > 0
    total = torch.where(there, total, 1.0)
    lse = torch.where(there, largest + total.log(), -torch.inf)
    rows = [
        _as_rows(w / total, part, layout) * part.float()
        for w, part in zip(weights, outs, strict=True)
    ]
    out = torch.stack(rows).sum(0)
    return out.to(outs[0].dtype if dtype is None else getattr(torch, dtype)), lse
