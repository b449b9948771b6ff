"""Rotary embeddings on PyTorch tensors: the gradient is the rotation by the negative angles."""

import torch
from torch import Tensor

from numflash.api import rotary
from numflash.frontends.torch import mapped, traced
from numflash.frontends.torch.calls import expect_tensor
from numflash.frontends.torch.operators import DEVICES, LIBRARY, TAGS
from numflash.runtime.errors import UnsupportedError


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    layout: str = "bshd",
    out: Tensor | None = None,
) -> Tensor:
    """`numflash.apply_rotary` on tensors, through which autograd differentiates by x.

    Args:
        x, cos, sin, interleaved, conjugate, offsets, cu_seqlens, layout: as of
            `numflash.apply_rotary`; cos and sin have no gradients.
        out: as there. Where gradients are recorded it may only be x itself, which then is changed
            in place as by PyTorch's own functions; where PyTorch traces there is none.

    Returns:
        A tensor like x, or out. It may be differentiated any number of times.

    Raises:
        TypeError, ValueError: as `numflash.apply_rotary`.
        UnsupportedError: as there; a gradient of cos or sin; an `out` that cannot be.

    Example:
        >>> import torch, numflash, numflash.torch
        >>> q = torch.randn(1, 16, 2, 32, requires_grad=True)
        >>> cos, sin = numflash.rotary_tables(16, 32, like=q)
        >>> numflash.torch.apply_rotary(q, cos, sin).square().sum().backward()
        >>> torch.allclose(q.grad, 2 * q, atol=1e-5)  # a rotation keeps lengths
        True
    """
    for name, given in (("x", x), ("cos", cos), ("sin", sin)):
        expect_tensor(name, given)
    is_recorded = torch.is_grad_enabled()
    for name, table in (("cos", cos), ("sin", sin)):
        if is_recorded and table.requires_grad:
            raise UnsupportedError(
                f"{name} requires a gradient and has none: give it as .detach()"
            )
    options = interleaved, conjugate, layout
    if traced.is_traced(x, cos, sin):
        if out is not None:
            raise UnsupportedError("out cannot be given where PyTorch traces")
        offset, of_each = (0, offsets) if isinstance(offsets, Tensor) else (offsets, None)
        return _in_graph(x, cos, sin, of_each, cu_seqlens, offset, *options)
    if not is_recorded or not x.requires_grad:
        return _rotated(x, cos, sin, offsets, cu_seqlens, *options, out)
    if out is not None and out is not x:
        raise UnsupportedError("out must be x, or None, where gradients are recorded")
    return _Rotation.apply(x, cos, sin, offsets, cu_seqlens, *options, out is x)


def _rotated(x, cos, sin, offsets, cu_seqlens, interleaved, conjugate, layout, out=None):
    return rotary.apply_rotary(
        x,
        cos,
        sin,
        interleaved=interleaved,
        conjugate=conjugate,
        offsets=offsets,
        cu_seqlens=cu_seqlens,
        layout=layout,
        out=out,
    )


class _Rotation(torch.autograd.Function):
    """Rotation in eager mode."""

    @staticmethod
    def forward(ctx, x, cos, sin, offsets, cu_seqlens, interleaved, conjugate, layout, in_place):
        of_each = offsets if isinstance(offsets, Tensor) else None
        ctx.save_for_backward(cos, sin, of_each, cu_seqlens)
        ctx.offset = None if of_each is offsets else offsets
        ctx.options = {"interleaved": interleaved, "conjugate": not conjugate, "layout": layout}
        if in_place:
            ctx.mark_dirty(x)
        options = interleaved, conjugate, layout, x if in_place else None
        return _rotated(x, cos, sin, offsets, cu_seqlens, *options)

    @staticmethod
    def backward(ctx, dout):
        cos, sin, of_each, cu_seqlens = ctx.saved_tensors
        offsets = ctx.offset if of_each is None else of_each
        of_rows = {"offsets": offsets, "cu_seqlens": cu_seqlens}
        return apply_rotary(dout, cos, sin, **of_rows, **ctx.options), *[None] * 8


def _in_graph(x, *given):
    if traced.under_transforms():
        if torch.compiler.is_compiling():
            _allow_mapped()
        return _mapped(x, *given)
    return ROTARY(x, *given)


@traced.constant
def _allow_mapped() -> None:
    """Tell Dynamo, which is tracing, that a graph may hold `_mapped` as it is."""
    torch._dynamo.allow_in_graph(_mapped)


def _mapped(x, *given):
    return _Mapped.apply(x, *given)


class _Mapped(torch.autograd.Function):
    """numflash::apply_rotary under the transforms of torch.func."""

    @staticmethod
    def forward(*given):
        return ROTARY(*given)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, offset, interleaved, conjugate, layout = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = offset, interleaved, not conjugate, layout

    @staticmethod
    def backward(ctx, dout):
        return _Mapped.apply(dout, *ctx.saved_tensors, *ctx.options), *[None] * 8

    @staticmethod
    def vmap(info, in_dims, x, *given):
        layout, size = given[-1], info.batch_size
        of_sequences = given[2:4]
        if any(d is not None for d in in_dims[1:]) or any(y is not None for y in of_sequences):
            (rotated,), _ = mapped.one_by_one(info, in_dims, _alone, x, *given)
            return rotated, 0
        axes = x.dim() - 1
        rotated = _Mapped.apply(mapped.join_batch(x, in_dims[0], size, layout), *given)
        entries = size, mapped.batch_of(x, in_dims[0])
        return mapped.split_batch(rotated, entries, axes, layout), 0


def _alone(*given) -> tuple[Tensor]:
    return (_Mapped.apply(*given),)


def _kernel(x, cos, sin, of_each, cu_seqlens, offset, interleaved, conjugate, layout):
    with torch.no_grad():
        offsets = offset if of_each is None else of_each
        return _rotated(x, cos, sin, offsets, cu_seqlens, interleaved, conjugate, layout)


def _setup(ctx, inputs, output):
    _Mapped.setup_context(ctx, inputs, output)


def _gradient(ctx, dout):
    return ROTARY(dout, *ctx.saved_tensors, *ctx.options), *[None] * 8


LIBRARY.define(
    "apply_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? offsets, Tensor? cu_seqlens, "
    "SymInt offset, bool interleaved, bool conjugate, str layout) -> Tensor",
    tags=TAGS,
)
ROTARY = torch.ops.numflash.apply_rotary.default
for _key in DEVICES:
    LIBRARY.impl("apply_rotary", _kernel, _key)
torch.library.register_fake(
    "numflash::apply_rotary", lambda x, *_: x.new_empty(x.shape), lib=LIBRARY
)
torch.library.register_autograd(
    "numflash::apply_rotary", _gradient, setup_context=_setup, lib=LIBRARY
)
