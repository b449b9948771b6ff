"""The program of a call: its bias, its masks and its functions as one, and what they read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from numflash.functions.trace import Traced, trace
from numflash.problem.options import AttentionOptions
from numflash.runtime.views import ArrayView

BIAS_DTYPES = ("float16", "bfloat16", "float32")


class Extent(NamedTuple):
    """What a bias or a mask broadcasts to, and the device that it must lie on."""

    batch: int
    num_heads_q: int
    seqlen_q: int
    seqlen_k: int
    device: Any


def program_of(
    views: Mapping[str, ArrayView], options: AttentionOptions, extent: Extent
) -> tuple[str, tuple]:
    """The text of a call's program, and the values of its `fields`; of a pointer the operand.

    Args:
        views: of the arrays among the options, by name.
        options: of the call.
        extent: of its scores.

    Raises:
        TypeError, ValueError: as `numflash.attention`.
    """
    asked = (options.bias, options.mask, options.score_mod, options.mask_mod)
    if all(each is None for each in asked):
        if options.aux:
            raise ValueError("aux goes with score_mod or mask_mod, which get it; there is neither")
        return "", ()
    for n in range(len(options.aux)):
        if f"aux{n}" in views:
            _expect_device(f"aux{n}", views[f"aux{n}"], extent)
    _check_broadcast("bias", views, extent, BIAS_DTYPES)
    _check_broadcast("mask", views, extent, ("bool",))
    aux = [views.get(f"aux{n}", each) for n, each in enumerate(options.aux)]
    traced = trace(
        options.score_mod,
        options.mask_mod,
        aux,
        bias=views.get("bias"),
        mask=views.get("mask"),
    )
    return traced.program.text, tuple(_values(traced, views, aux))


def _check_broadcast(
    name: str, views: Mapping[str, ArrayView], extent: Extent, dtypes: tuple[str, ...]
) -> None:
    """Check a bias or a mask. Raises TypeError, ValueError."""
    if name not in views:
        return
    view, wanted = views[name], extent[:4]
    if view.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {view.dtype}")
    _expect_device(name, view, extent)
    sizes = zip(reversed(view.shape), reversed(wanted), strict=False)
    if len(view.shape) > len(wanted) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"{name} must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = {wanted}, got "
            f"shape {tuple(view.shape)}"
        )


def _expect_device(name: str, view: ArrayView, extent: Extent) -> None:
    if view.device != extent.device:
        raise ValueError(
            f"{name} must lie on the device of q, {extent.device}, got device {view.device}"
        )


def _values(traced: Traced, views: Mapping[str, ArrayView], aux: list):
    """The values of the program's `fields`, in order."""
    first = len(traced.names) - len(aux)
    for field, kind in traced.program.fields:
        name, _, axis = field.partition("_")
        if not name[1:].isdigit():
            yield 0  # where the caller's numbers begin
            continue
        k = int(name[1:])
        if kind.startswith("pointer"):
            yield traced.names[k]
        elif axis:
            view = views[traced.names[k]]
            yield (view.strides if axis[0] == "s" else view.shape)[int(axis[1:])]
        else:
            yield aux[k - first]
