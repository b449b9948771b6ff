"""A forward and a backward call on tensors, and the options of a call apart from its tensors.

Eager mode and the operators make the same two calls.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from numflash.calls.ready import bind_backward, bind_forward
from numflash.problem.fp8 import Fp8Array
from numflash.problem.options import AttentionOptions, GradientOptions, kind_of
from numflash.runtime.errors import UnsupportedError
from numflash.selection.choice import split_configs

OPERANDS = ("q", "k", "v")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_AUTOCAST = ("cpu", "cuda")
_is_any_autocast = torch._C._is_any_autocast_enabled
# Of tensors among the options, those that have gradients; and all of aux.
_LEARNED = ("bias", "sinks", "alibi_slopes")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    out: Tensor | None = None,
    descales: tuple | None = None,
    check_lengths: bool = False,
) -> tuple:
    """(out, lse, decision or None) of a call."""
    if type(options.config) is dict:
        of_forward, _ = split_configs(options.config)
        options = options._replace(config=of_forward or None)
    bound = bind_forward(q, k, v, out, options, None, descales, check_lengths)
    return bound.launch(bound.stream)


def backward(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: AttentionOptions,
    wrt: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """The gradients of a call with respect to what `wrt` names, in this order."""
    if dout is None:
        dout = torch.zeros_like(out, dtype=q.dtype)
    elif dout.dtype != q.dtype:
        dout = dout.to(q.dtype)  # with out_dtype
    elif dout.is_neg():
        dout = dout.resolve_neg()  # as autograd makes of complex numbers
    of_backward = None
    if type(options.config) is dict:
        _, of_backward = split_configs(options.config)
    options = options.of_backward(of_backward or None)
    asked = GradientOptions(dlse, None, wrt)
    bound = bind_backward(dout, q, k, v, out, lse, options, asked, None)
    return bound.launch(bound.stream)


def device_of(operand) -> torch.device:
    """Of a tensor, or of an array in 8 bits. Raises TypeError."""
    expect_operands(operand)
    return operand.device if isinstance(operand, Tensor) else operand.data.device


def under_autocast(*operands, cast: Callable = Tensor.to) -> tuple:
    """q, k, v and further operands as autocast, if it is enabled, gives them to attention.

    Args:
        operands: tensors, arrays in 8 bits, or None.
        cast: (tensor, dtype) -> the tensor in another dtype.
    """
    if not _is_any_autocast():
        return operands
    kind = device_of(operands[0]).type
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple([x if x is None else as_autocast(x, dtype, cast) for x in operands])


def as_autocast(x, dtype: torch.dtype, cast: Callable = Tensor.to):
    """An operand in a dtype; float64, integers and codes of 8 bits stay what they are."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.dtype == dtype:
        return x
    return cast(x, dtype)


def expect_operands(*operands) -> None:
    """Check that q, or q, k and v, are tensors or arrays in 8 bits. Raises TypeError."""
    for name, x in zip(OPERANDS, operands, strict=False):
        if not isinstance(x, Fp8Array):
            expect_tensor(name, x)


def expect_tensor(name: str, x) -> None:
    """Check that an operand is a tensor. Raises TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind_of(x)}")


def expect_no_tangents(*given) -> None:
    """Check that operands and options carry no derivatives in forward mode.

    Raises:
        UnsupportedError: one does; the result would not.
    """
    for x in given:
        if isinstance(x, (tuple, list)):
            expect_no_tangents(*x)
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError(FORWARD_MODE)


FORWARD_MODE = (
    "numflash has derivatives in reverse mode only: torch.func.grad, vjp and jacrev, not jvp, "
    "jacfwd and hessian, nor torch.autograd.forward_ad"
)


class Apart(NamedTuple):
    """Options apart from their tensors.

    Attributes:
        options: without them.
        names: of the tensors, as `AttentionOptions.arrays` has them.
        tensors: in this order.
    """

    options: AttentionOptions
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


def apart(options: AttentionOptions) -> Apart:
    """Options and their tensors, of which autograd is to know each."""
    arrays = options.arrays()
    if not arrays:
        return Apart(options, (), ())
    left = options.with_arrays(dict.fromkeys(arrays))
    return Apart(left, tuple(arrays), tuple(arrays.values()))


def together(options: AttentionOptions, names: tuple[str, ...], tensors) -> AttentionOptions:
    """The options that `apart` has taken apart."""
    return options.with_arrays(dict(zip(names, tensors, strict=True))) if names else options


def expect_tensors(names, arrays) -> None:
    """Check that autograd, or a graph, can keep arrays. Raises TypeError."""
    for name, x in zip(names, arrays, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(x).__module__}.{type(x).__name__}"
            )


def expect_gradients(
    names: tuple[str, ...], learned: tuple[bool, ...], options: AttentionOptions
) -> None:
    """Check that what requires a gradient can have one.

    Args:
        names: of tensors among the options.
        learned: which of them require a gradient.
        options: of the call.

    Raises:
        UnsupportedError: something has none.
    """
    if options.precision in ("fp8", "auto") or options.fp8 is not None:
        raise UnsupportedError(
            f"8-bit floats have no gradients, got precision={options.precision!r} and a tensor "
            "that requires one: disable gradients (torch.no_grad()), or compute in 16 bits"
        )
    for name, is_learned in zip(names, learned, strict=True):
        if is_learned and name not in _LEARNED and not name.startswith("aux"):
            raise UnsupportedError(
                f"{name} requires a gradient and has none; q, k, v, {', '.join(_LEARNED)} and "
                "what score_mod reads of aux have: give it as .detach()"
            )


def wanted(names: tuple[str, ...], needed: tuple[bool, ...]) -> tuple[str, ...]:
    """The names of q, k, v and these tensors that need a gradient."""
    return tuple(n for n, is_needed in zip((*OPERANDS, *names), needed, strict=True) if is_needed)


def dealt(wrt: tuple[str, ...], made, names: tuple[str, ...]) -> tuple[list, list]:
    """Gradients in the order of operands: those of q, k and v, and those of `names`; else None.

    Args:
        wrt: what the gradients in `made` are of, as `wanted` says it.
        made: the gradients.
        names: of tensors among the options.
    """
    found = dict(zip(wrt, made, strict=True))
    return [found.get(name) for name in OPERANDS], [found.get(name) for name in names]
