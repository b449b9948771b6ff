"""A tiny kernel that runs a program's functions on every score of a problem."""

from collections import namedtuple

import numpy as np

from numflash.functions.arrays import Number
from numflash.functions.program import Program
from numflash.kernels.arguments import STORAGE
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, i32, i64
from numflash.runtime.views import Pointer
from numflash.tiles.programs import make_program

SHAPE = (2, 3, 10, 13)
"""Batch entries, heads, queries and keys of `run`."""
THREADS = 32


def given_of(program: Program):
    """The class of the record `given` of a program."""
    kinds = {"f32": f32, "i32": i32, "i64": i64}
    fields = program.fields or (("row", "i32"),)
    given = namedtuple("Given", [name for name, _ in fields])
    given.__annotations__ = {
        name: kinds[kind] if kind in kinds else Pointer(STORAGE[kind.partition(":")[2]])
        for name, kind in fields
    }
    return given


def kernel_of(
    text: str, with_partials: bool = False, shape=SHAPE, by_distance: bool = False
) -> Kernel:
    """A block for each batch entry and head; a thread takes every 32nd score.

    Results are scores, slopes and whether they are kept, and for each partial its value and
    offset, each of `shape`.
    """
    program, functions = Program.parse(text), make_program(text, with_partials)
    known_of_head, score, keep, partials = functions[:4]
    far_score, far_keep = functions.score_by_distance, functions.keep_by_distance
    _, heads, rows, columns = shape
    given_type = given_of(program)

    def run(scores: Pointer(f32), slopes: Pointer(f32), kept: Pointer(i32), given: given_type):
        block = i32(cuda.blockIdx.x)
        known = known_of_head(given, i32(block // heads), i32(block % heads))
        for place in range(i32(cuda.threadIdx.x), rows * columns, THREADS):
            i, j = i32(place // columns), i32(place % columns)
            at = block * rows * columns + place
            s, slope = score(scores[at], i, j, known)
            scores[at] = s
            slopes[at] = slope
            kept[at] = i32(keep(i, j, known))

    def run_by_distance(
        scores: Pointer(f32), slopes: Pointer(f32), kept: Pointer(i32), given: given_type
    ):
        block = i32(cuda.blockIdx.x)
        known = known_of_head(given, i32(block // heads), i32(block % heads))
        for place in range(i32(cuda.threadIdx.x), rows * columns, THREADS):
            # Only their difference counts.
            i, j = f32(place // columns - 70), f32(place % columns - 70)
            at = block * rows * columns + place
            s, slope = far_score(scores[at], i, j, known)
            scores[at] = s
            slopes[at] = slope
            kept[at] = i32(far_keep(i, j, known))

    if not partials:
        return Kernel("program", run_by_distance if by_distance else run, THREADS, 0)
    partial, offset = partials[-1]

    def run_with_partial(
        scores: Pointer(f32), slopes: Pointer(f32), kept: Pointer(i64), given: given_type
    ):
        block = i32(cuda.blockIdx.x)
        known = known_of_head(given, i32(block // heads), i32(block % heads))
        for place in range(i32(cuda.threadIdx.x), rows * columns, THREADS):
            i, j = i32(place // columns), i32(place % columns)
            at = block * rows * columns + place
            slopes[at] = partial(scores[at], i, j, known)
            kept[at] = offset(scores[at], i, j, known)

    return Kernel("program", run_with_partial, THREADS, 0)


def kernel_of_many(texts: list[str], shape=SHAPE) -> Kernel:
    """As `kernel_of`, for all programs: each writes results of its own, one after the other."""
    _, heads, rows, columns = shape
    of_head, total = rows * columns, rows * columns * heads * shape[0]
    parameters = {"x": Pointer(f32), "scores": Pointer(f32), "slopes": Pointer(f32)}
    parameters["kept"] = Pointer(i32)
    scope, lines = {"cuda": cuda, "i32": i32, "f32": f32}, []
    for n, text in enumerate(texts):
        functions = make_program(text)
        for name in ("known_of_head", "score", "keep"):
            scope[f"{name}_{n}"] = getattr(functions, name)
        parameters[f"given_{n}"] = given_of(Program.parse(text))
        lines += [
            f"known_{n} = known_of_head_{n}(given_{n}, b, h)",
            f"scores[{n * total} + at], slopes[{n * total} + at] = score_{n}(s, i, j, known_{n})",
            f"kept[{n * total} + at] = i32(keep_{n}(i, j, known_{n}))",
        ]
    head = [
        f"def run({', '.join(parameters)}):",
        "    block = i32(cuda.blockIdx.x)",
        f"    b, h = i32(block // {heads}), i32(block % {heads})",
        f"    for place in range(i32(cuda.threadIdx.x), {of_head}, {THREADS}):",
        f"        i, j = i32(place // {columns}), i32(place % {columns})",
        f"        at = block * {of_head} + place",
        "        s = x[at]",
    ]
    exec("\n".join([*head, *(f"        {line}" for line in lines)]), scope)
    scope["run"].__annotations__ = parameters
    return Kernel("programs", scope["run"], THREADS, 0)


def values_of(program: Program, aux: tuple) -> dict[str, object]:
    """The values of a program's fields; of a pointer the array."""
    values = {"row": i32(0), "column": i32(0), "first_head": i32(0)}
    for k, (description, array) in enumerate(zip(program.aux, aux, strict=True)):
        if isinstance(description, Number):
            values[f"a{k}"] = (f32 if description.kind == "f32" else i32)(array)
            continue
        values[f"a{k}"] = array
        for axis in range(array.ndim):
            values[f"a{k}_s{axis}"] = i64(array.strides[axis] // array.itemsize)
            values[f"a{k}_n{axis}"] = i32(array.shape[axis])
    return {name: values[name] for name, _ in program.fields}


def run(
    program: Program, aux=(), scores=None, with_partial: bool = False, by_distance: bool = False
):
    """(scores, slopes, kept) of `SHAPE`; or with a partial (scores, partial, offset)."""
    from numflash.simulator import GlobalPointer, launch

    rng = np.random.default_rng(5)
    if scores is None:
        scores = rng.standard_normal(SHAPE) * 2
    scores = np.array(scores, np.float32)
    slopes = np.full(SHAPE, np.nan, np.float32)
    kept = np.full(SHAPE, -7, np.int64 if with_partial else np.int32)
    kernel = kernel_of(program.text, with_partial, by_distance=by_distance)
    given = given_of(program)
    values = values_of(program, aux) or {"row": i32(0)}
    for name, kind in program.fields:
        if kind.startswith("pointer:"):
            storage = np.dtype(STORAGE[kind.removeprefix("pointer:")])
            values[name] = GlobalPointer(values[name], storage, name)
    args = [GlobalPointer(x, x.dtype, "x") for x in (scores, slopes, kept)]
    record = given(**values)
    launch(kernel.function, SHAPE[0] * SHAPE[1], THREADS, [*args, record])
    return scores, slopes, kept
