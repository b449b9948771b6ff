"""The program of a call: its bias, its masks and its functions as one, and what they read."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from numflash.functions.program import Program
from numflash.functions.trace import Traced, trace
from numflash.problem.block_masks import ListedBlocks, names_of_aux
from numflash.problem.options import AttentionOptions
from numflash.runtime.views import ArrayView

BIAS_DTYPES = ("float16", "bfloat16", "float32")


class Extent(NamedTuple):
    """What a bias or a mask broadcasts to, and the device that it must lie on.

    `origin` is (row, column, head) where the arrays are those of a larger problem. Of `packed`
    sequences the seqlens are what the longest has, and an array may have more.
    """

    batch: int
    num_heads_q: int
    seqlen_q: int
    seqlen_k: int
    device: Any
    origin: tuple[int, int, int] | None = None
    packed: bool = False


def most_rows(
    views: Mapping[str, ArrayView], origin: tuple[int, int, int] | None
) -> tuple[int | None, int | None]:
    """The queries and the keys that bias and mask of packed sequences have; None: any number."""
    begins, found = origin or (0, 0, 0), []
    for axis, begin in ((-2, begins[0]), (-1, begins[1])):
        shapes = (views[name].shape for name in ("bias", "mask") if name in views)
        sizes = [shape[axis] for shape in shapes if len(shape) >= -axis and shape[axis] != 1]
        found.append(max(0, min(sizes) - begin) if sizes else None)
    return found[0], found[1]


def program_of(
    views: Mapping[str, ArrayView], options: AttentionOptions, extent: Extent
) -> tuple[str, tuple]:
    """The text of a call's program, and the values of its `fields`.

    Of an array, and of a number among the options' aux, it is the name of the operand.

    Args:
        views: of the arrays among the options, by name.
        options: of the call.
        extent: of its scores.

    Raises:
        TypeError, ValueError: as `numflash.attention`.
    """
    (program, names), numbers = _of_options(views, options, extent), {}
    mask = options.block_mask
    if mask is not None and program.keep is not None:
        # Full blocks ask nobody for what is kept, so that what else hides keys is said by scores.
        program = program.with_hidden_scores()
    if mask is not None and mask.mask_mod is not None:
        (more, more_names), numbers = _of_mask(mask.mask_mod, mask.aux, views, extent)
        if mask.is_of_function:
            _expect_lists_of_all(mask, more, extent)
        program, names = program.also(more), names + more_names
    _check_shapes(program, names, views, extent)
    program = with_pairs(program, names, views, extent.origin)
    return program.text, tuple(_values(program, names, views, numbers, extent.origin))


def with_pairs(
    program: Program,
    names: tuple[str, ...],
    views: Mapping[str, ArrayView],
    origin: tuple[int, int, int] | None = None,
) -> Program:
    """The program that reads two neighbours at once where each pair of them is aligned.

    `names` are those of its aux among `views`. A ready call is found again by what `views` say of
    an address: whether it is a multiple of 16 bytes.
    """
    if origin is not None and origin[1] % 2:
        return program
    aligned = set()
    for k in {node.value for node in program.neighbours}:
        view = views[names[k]]
        steps = [view.strides[axis] for axis in program.indexed_axes(k)[:-1]]
        if view.pointer % 16 == 0 and not any(step % 2 for step in steps):
            aligned.add(k)
    return program.with_pairs(aligned)


def _expect_lists_of_all(mask: ListedBlocks, program: Program, extent: Extent) -> None:
    """Check that lists were made for all heads if their function tells these apart."""
    for letter, name, given, wanted in (
        ("b", "batch", mask.blocks.batch, extent.batch),
        ("h", "heads", mask.blocks.heads, extent.num_heads_q),
    ):
        if letter in program.uses and given != wanted:
            raise ValueError(
                f"block_mask must be made for {name} {wanted}, as q has, because its mask_mod "
                f"looks at their numbers, got {given}"
            )


def program_of_mask(
    mask_mod: Callable, aux: tuple, views: Mapping[str, ArrayView], extent: Extent
) -> tuple[str, tuple]:
    """As `program_of`, of a block mask's function and its aux (`block_masks.arrays_of_aux`).

    Raises:
        TypeError, ValueError: as `numflash.create_block_mask`.
    """
    (program, names), numbers = _of_mask(mask_mod, aux, views, extent)
    _check_shapes(program, names, views, extent)
    return program.text, tuple(_values(program, names, views, numbers, extent.origin))


def _check_shapes(
    program: Program, names: tuple[str, ...], views: Mapping[str, ArrayView], extent: Extent
) -> None:
    """Check that no read lies outside of its array. Raises ValueError."""
    row, column, head = extent.origin or (0, 0, 0)
    counts = {
        "b": extent.batch,
        "h": head + extent.num_heads_q,
        "i": row + extent.seqlen_q,
        "j": column + extent.seqlen_k,
    }
    if 0 in (extent.batch, extent.num_heads_q, extent.seqlen_q, extent.seqlen_k):
        return  # nothing is read
    shapes = [views[name].shape if name in views else () for name in names]
    program.check_shapes(names, shapes, counts)


def keeps_everything(mask_mod: Callable) -> bool:
    """Whether a function without aux hides nothing. Raises TypeError where it cannot be traced."""
    return trace(None, mask_mod, ()).program.keep is None


def _of_mask(
    mask_mod: Callable, aux: tuple, views: Mapping[str, ArrayView], extent: Extent
) -> tuple[Traced, dict[str, int | float]]:
    names = names_of_aux(aux)
    for name in names:
        if name in views:
            _expect_device(name, views[name], extent)
    given = [views.get(name, each) for name, each in zip(names, aux, strict=True)]
    traced = trace(None, mask_mod, given)
    return Traced(traced.program, tuple(names)), dict(zip(names, given, strict=True))


def _of_options(
    views: Mapping[str, ArrayView], options: AttentionOptions, extent: Extent
) -> Traced:
    """What bias, mask and functions make together."""
    if options.score_mod is None and options.mask_mod is None and options.aux:
        raise ValueError("aux goes with score_mod or mask_mod, which get it; there is neither")
    asked = (options.bias, options.mask, options.score_mod, options.mask_mod)
    if all(each is None for each in asked):
        if options.score_mod_grad is not None:
            raise ValueError("score_mod_grad is the derivative of score_mod, which is not given")
        return Traced(Program(), ())
    for n in range(len(options.aux)):
        if f"aux{n}" in views:
            _expect_device(f"aux{n}", views[f"aux{n}"], extent)
    _check_broadcast("bias", views, extent, BIAS_DTYPES)
    _check_broadcast("mask", views, extent, ("bool",))
    aux = [views.get(f"aux{n}", each) for n, each in enumerate(options.aux)]
    return trace(
        options.score_mod,
        options.mask_mod,
        aux,
        bias=views.get("bias"),
        mask=views.get("mask"),
        score_mod_grad=options.score_mod_grad,
    )


def _check_broadcast(
    name: str, views: Mapping[str, ArrayView], extent: Extent, dtypes: tuple[str, ...]
) -> None:
    """Check a bias or a mask. Raises TypeError, ValueError."""
    if name not in views:
        return
    view, wanted = views[name], extent[:4]
    if extent.packed and extent.origin is None:
        # Sequences are no longer than these axes: see `most_rows`.
        wanted = *wanted[:2], *(1, 1, *view.shape)[-2:]
    if view.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {view.dtype}")
    _expect_device(name, view, extent)
    rule = f"{name} must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = {wanted}"
    sizes, fits = zip(reversed(view.shape), reversed(wanted), strict=False), operator.eq
    if extent.origin is not None:
        row, column, head = extent.origin
        whole = extent.batch, head + wanted[1], row + wanted[2], column + wanted[3]
        rule = f"{name} must have axes of 1, or with origin of at least {whole}"
        sizes, fits = zip(reversed(view.shape), reversed(whole), strict=False), operator.ge
    if len(view.shape) > len(wanted) or not all(n == 1 or fits(n, full) for n, full in sizes):
        raise ValueError(f"{rule}, got shape {tuple(view.shape)}")


def _expect_device(name: str, view: ArrayView, extent: Extent) -> None:
    if view.device != extent.device:
        raise ValueError(
            f"{name} must lie on the device of q, {extent.device}, got device {view.device}"
        )


def _values(
    program: Program,
    names: tuple[str, ...],
    views: Mapping[str, ArrayView],
    numbers: dict,
    origin: tuple[int, int, int] | None,
):
    """The values of the program's `fields`, in order; `numbers` are those that stay."""
    begin = dict(zip(("row", "column", "first_head"), origin or (0, 0, 0), strict=True))
    for field, kind in program.fields:
        if field in begin:
            yield begin[field]
            continue
        name, _, axis = field.partition("_")
        k = int(name[1:])
        if kind.startswith("pointer"):
            yield names[k]
        elif axis:
            view = views[names[k]]
            yield (view.strides if axis[0] == "s" else view.shape)[int(axis[1:])]
        else:
            yield numbers.get(names[k], names[k])
