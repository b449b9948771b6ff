"""Gradients of arrays that scores read: of a bias, and of arrays of `aux`; how each is made.

An array that is read once, at the places of scores themselves, has an element for each batch
entry, head, query and key, or for some of these, and scores that differ in the others share an
element. Its gradient is the sum of theirs, in float32, in a fixed order: "tiles" of queries and
keys are summed over heads in registers; of an array without an axis of keys the "rows" of each
head are summed first, of one without an axis of queries the "columns".

Any other array is read at places that are computed, or at several. The gradients of its elements
are integers while they are summed, in fixed point: "scatter". So are those of all arrays where
sequences have lengths of their own: their rows and columns are not those of the array.
"""

from collections.abc import Mapping
from typing import NamedTuple

from numflash.functions.program import Partial, Program
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import AttentionProblem
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, contiguous_strides


class ArrayGradient(NamedTuple):
    """The gradient of one array.

    Attributes:
        name: "bias", "aux0", "aux1", ...
        aux: its place in the program's `aux`.
        shape: of it and of its gradient.
        dtype: of the gradient.
        way: "tiles", "rows", "columns" or "scatter".
        reads: the numbers of its reads among the program's partials.
        strides: of its gradient, by "b", "h", "i" and "j": along axes that scores have; in the
            ways but "scatter".
        first: the offset of the element of the call's first query, key and head.
        is_larger: whether it has elements that the call does not reach.
    """

    name: str
    aux: int
    shape: tuple[int, ...]
    dtype: str
    way: str
    reads: tuple[int, ...]
    strides: Mapping[str, int]
    first: int = 0
    is_larger: bool = False

    @property
    def kernels(self) -> tuple[tuple[str, int, bool], ...]:
        """Of those that walk over scores (family, read, whether of absolute values), in order."""
        if self.way != "scatter":
            return tuple((f"backward-{self.way}", read, False) for read in self.reads)
        bounds = [("backward-rows", read, True) for read in self.reads]
        return (*bounds, *(("backward-scatter", read, False) for read in self.reads))


def array_gradients(
    problem: AttentionProblem,
    views: Mapping[str, ArrayView],
    options: AttentionOptions,
    in_float32: bool = False,
) -> dict[str, ArrayGradient | Exception]:
    """Of bias and each of aux of a call the gradient, or the error for asking for it.

    Gradients are of the array's dtype, or `in_float32`.
    """
    program = Program.parse(problem.program)
    numbers = _numbers_of_arrays(problem, program)
    names = [*(["bias"] if "bias" in views else []), *(f"aux{n}" for n in range(len(options.aux)))]
    found = {name: _gradient(name, numbers.get(name), problem, program, views) for name in names}
    if in_float32:
        for name, each in found.items():
            if isinstance(each, ArrayGradient):
                found[name] = each._replace(dtype="float32")
    return found


def _numbers_of_arrays(problem: AttentionProblem, program: Program) -> dict[str, int]:
    """The places in `program.aux` of the arrays that it reads, by name."""
    return {
        name: int(field[1:])
        for (field, kind), name in zip(program.fields, problem.given, strict=True)
        if kind.startswith("pointer")
    }


def _gradient(
    name: str, k: int | None, problem: AttentionProblem, program: Program, views: Mapping
) -> ArrayGradient | Exception:
    if name not in views:
        return TypeError(f"wrt names {name!r}, which is a number; gradients are of arrays")
    view = views[name]
    if view.dtype not in ("float16", "bfloat16", "float32"):
        return TypeError(
            f"wrt names {name!r}, an array of {view.dtype}; gradients are of arrays of float16, "
            "bfloat16 or float32"
        )
    found = [(n, each) for n, each in enumerate(program.partials) if each.aux == k]
    if not found:
        return ValueError(f"wrt names {name!r}, and no score changes with it")
    reads = tuple(n for n, _ in found)
    if any("s" in index.uses for _, each in found for index in each.load.args):
        return UnsupportedError(
            f"wrt names {name!r}, which score_mod reads at a place that depends on the score"
        )
    is_broadcast = 0 in (step for n, step in zip(view.shape, view.strides, strict=True) if n > 1)
    if problem.lengths is not None and is_broadcast:
        return UnsupportedError(
            f"wrt names {name!r}, a broadcast view, and {problem.lengths.given[0]} says that "
            "sequences have lengths of their own: then the gradient is of an array whose elements "
            "do not share memory, or that has an axis of one element"
        )
    is_by_axes = len(found) == 1 and problem.lengths is None
    axes = _axes(name, view, found[0][1]) if is_by_axes else None
    if axes is None:
        return ArrayGradient(name, k, view.shape, view.dtype, "scatter", reads, {})
    by_axis = zip(axes, contiguous_strides(view.shape), strict=True)
    strides = {letter: stride for letter, stride in by_axis if letter}
    of_tiles = "i" in strides and "j" in strides
    way = "tiles" if of_tiles else "columns" if "j" in strides else "rows"
    row, column, head = problem.origin
    begins = {"b": 0, "h": head, "i": row, "j": column}
    first = sum(stride * begins[letter] for letter, stride in strides.items())
    sizes = zip(axes, view.shape, strict=True)
    is_larger = any(by and n != _extents(problem)[by] for by, n in sizes)
    return ArrayGradient(name, k, view.shape, view.dtype, way, reads, strides, first, is_larger)


def _extents(problem: AttentionProblem) -> dict[str, int]:
    """The sizes of scores along each axis."""
    sizes = problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k
    return dict(zip("bhij", sizes, strict=True))


def _axes(name: str, view: ArrayView, partial: Partial) -> tuple[str, ...] | None:
    """What each axis goes by, "" if it has one element; None if that is not all about it."""
    axes = partial.axes
    if name == "bias":
        # The program leaves out axes of stride 0, whose elements have gradients of their own.
        axes = "bhij"[4 - len(view.shape) :]
    axes = tuple("" if n == 1 else by for by, n in zip(axes, view.shape, strict=True))
    letters = [by for by, n in zip(axes, view.shape, strict=True) if n != 1]
    return axes if set(letters) <= set("bhij") and len(set(letters)) == len(letters) else None


def given_of_sums(problem: AttentionProblem, gradient: ArrayGradient) -> tuple:
    """`problem.given` with the strides of the gradient for those of the array."""
    strides = contiguous_strides(gradient.shape)
    program, values = Program.parse(problem.program), list(problem.given)
    for number, (field, _) in enumerate(program.fields):
        array, _, axis = field.partition("_s")
        if array == f"a{gradient.aux}" and axis:
            values[number] = strides[int(axis)]
    return tuple(values)
