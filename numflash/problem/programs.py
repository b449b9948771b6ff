"""The program of a call: its bias, its masks and its functions as one, and what they read."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from numflash.functions.nodes import LEAF, PLACES, Node, apply, load, to
from numflash.functions.program import Array, Number, Program
from numflash.problem.options import AttentionOptions, kind_of
from numflash.runtime.views import ArrayView

BIAS_DTYPES = ("float16", "bfloat16", "float32")
_MAX_I32 = 2**31 - 1


class Extent(NamedTuple):
    """What a bias or a mask broadcasts to, and the device that it must lie on."""

    batch: int
    num_heads_q: int
    seqlen_q: int
    seqlen_k: int
    device: Any


@dataclass(frozen=True)
class _Read:
    """Something that a program reads: its description, and where it comes from.

    Attributes:
        kind: as the program knows it.
        name: the operand's; "" of a number.
        strides, sizes: of an array, for each of its axes.
        value: of a number.
    """

    kind: Array | Number
    name: str = ""
    strides: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    value: int | float = 0


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
    read: list[_Read] = []
    score, keep = LEAF["s"], None
    if options.bias is not None:
        score = apply("add", score, _element(read, "bias", views["bias"], extent, BIAS_DTYPES))
    if options.mask is not None:
        keep = to(_element(read, "mask", views["mask"], extent, ("bool",)), "b")
    first = len(read)
    read += [_of_aux(n, each, views, extent) for n, each in enumerate(options.aux)]
    of_aux = [each.kind for each in read[first:]]
    if options.score_mod is not None:
        from numflash.functions.trace import trace_score

        score = trace_score(options.score_mod, of_aux, score, first)
    if options.mask_mod is not None:
        from numflash.functions.trace import trace_mask

        more = trace_mask(options.mask_mod, of_aux, first)
        keep = more if keep is None else apply("and", keep, more)
    program = Program(tuple(each.kind for each in read), score, keep)
    return program.text, tuple(_values(program, read))


def _element(
    read: list[_Read], name: str, view: ArrayView, extent: Extent, dtypes: tuple[str, ...]
) -> Node:
    """The element of a bias or mask that belongs to a score; axes that it is broadcast over go."""
    if view.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {view.dtype}")
    _expect_device(name, view, extent)
    wanted = extent[:4]
    if len(view.shape) > len(wanted) or any(
        size not in (1, full)
        for size, full in zip(reversed(view.shape), reversed(wanted), strict=False)
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = {wanted}, got "
            f"shape {tuple(view.shape)}"
        )
    axes = zip(reversed(PLACES), reversed(view.shape), reversed(view.strides), strict=False)
    kept = [(place, n, step) for place, n, step in axes if n > 1 and step != 0][::-1]
    strides, sizes = tuple(step for *_, step in kept), tuple(n for _, n, _ in kept)
    array = Array(view.dtype, len(kept), unit=bool(kept) and strides[-1] == 1)
    read.append(_Read(array, name, strides, sizes))
    return load(len(read) - 1, array.type, [LEAF[place] for place, *_ in kept])


def _of_aux(n: int, given, views: Mapping[str, ArrayView], extent: Extent) -> _Read:
    """What a function gets as aux[n]."""
    name = f"aux{n}"
    if name in views:
        view = views[name]
        _expect_device(name, view, extent)
        if any(size > _MAX_I32 for size in view.shape):
            raise ValueError(f"{name} must have axes below 2**31, got shape {tuple(view.shape)}")
        unit = bool(view.shape) and view.strides[-1] == 1
        try:
            array = Array(view.dtype, len(view.shape), unit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        return _Read(array, name, tuple(view.strides), tuple(view.shape))
    if isinstance(given, Integral):
        if not -_MAX_I32 <= given <= _MAX_I32:
            raise ValueError(f"{name} must be an int32, got {given}")
        return _Read(Number("i32"), value=int(given))
    if isinstance(given, Real):
        return _Read(Number("f32"), value=float(given))
    raise TypeError(f"{name} must be an array or a real number, got {given!r} ({kind_of(given)})")


def _expect_device(name: str, view: ArrayView, extent: Extent) -> None:
    if view.device != extent.device:
        raise ValueError(
            f"{name} must lie on the device of q, {extent.device}, got device {view.device}"
        )


def _values(program: Program, read: list[_Read]):
    """The values of the program's `fields`, in order."""
    for field, kind in program.fields:
        name, _, axis = field.partition("_")
        if not name[1:].isdigit():
            yield 0  # where the caller's numbers begin
            continue
        source = read[int(name[1:])]
        if isinstance(source.kind, Number):
            yield source.value
        elif kind.startswith("pointer"):
            yield source.name
        else:
            yield (source.strides if axis[0] == "s" else source.sizes)[int(axis[1:])]
