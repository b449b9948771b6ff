"""The kernels for the gradient of an array that scores read, with their arguments.

`problem.array_gradients` says how gradients are made.
"""

import math
from typing import Any, NamedTuple

from numflash.calls.arguments import mask_record
from numflash.configs import ClearSumsConfig, RoundSumsConfig
from numflash.kernels.arguments import Axes, Reduced, given_of
from numflash.problem.array_gradients import ArrayGradient, given_of_sums
from numflash.problem.problem import AttentionProblem, num_blocks
from numflash.selection.choice import array_sums, fixed_point
from numflash.selection.geometry import blocks_of
from numflash.selection.rules import Choice


class ArrayKernels(NamedTuple):
    """What makes the gradient of an array.

    Attributes:
        workspaces: (shape, dtype) by name.
        parts: of workspaces those that kernels get: (workspace, from, to).
        cleared: workspaces that must be 0 where kernels do not write: rows that no sequence has.
        launches: (kernel, blocks, arguments besides those of all kernels), in order.
    """

    workspaces: dict[str, tuple[tuple[int, ...], str]]
    parts: dict[str, tuple[str, int, int]]
    launches: list[tuple[Choice, int, dict[str, Any]]]
    cleared: tuple[str, ...] = ()


def kernels_of_array(
    problem: AttentionProblem,
    gradient: ArrayGradient,
    choices: tuple[Choice, ...],
) -> ArrayKernels:
    """The kernels for the gradient of an array, which has elements.

    Args:
        problem: the call's.
        gradient: of which array, and how it is made.
        choices: of `gradient.kernels`.
    """
    if gradient.way == "scatter":
        return _scattered(problem, gradient, choices)
    (choice,) = choices
    if gradient.way == "tiles":
        reduced = _reduced(problem, gradient, "i")
        tiles = -(-problem.seqlen_k // choice.config.tile_n)
        heads = reduced.kept.batch * reduced.kept.heads * tiles
        what = f"the gradient of {gradient.name}"
        blocks = num_blocks(what, problem.seqlen_q, heads, choice.config.tile_m)
        more = {"array_gradient": f"d{gradient.name}", "reduced": reduced}
        return ArrayKernels({}, {}, [*_cleared(gradient), (choice, blocks, more)])
    of_queries = gradient.way == "rows"
    length = problem.seqlen_q if of_queries else problem.seqlen_k
    shares = f"shares of {gradient.name}"
    workspaces = {shares: ((problem.batch * problem.num_heads_q * length,), "float32")}
    blocks = problem.num_blocks(length, problem.num_heads_q, choice.config.block_rows)
    parameter = "row_gradients" if of_queries else "column_gradients"
    reduced = _reduced(problem, gradient, "i" if of_queries else "j")
    of_shares = {parameter: shares}
    if not of_queries:
        of_shares["mask"] = mask_record(problem, by_keys=True)
    launches = [
        *_cleared(gradient),
        (choice, blocks, of_shares),
        _sums(shares, f"d{gradient.name}", reduced, gradient.dtype),
    ]
    return ArrayKernels(workspaces, {}, launches)


def sums_of_heads(
    problem: AttentionProblem, name: str, shape: tuple[int, ...]
) -> list[tuple[Choice, int, dict[str, Any]]]:
    """The launches that add up shares of rows to the gradient of an array of heads.

    Args:
        problem: the call's.
        name: of the array; its shares are the workspace "row_gradients of NAME".
        shape: of the array, ([batch,] heads), of the larger problem's heads if there is one.
    """
    heads, shares, result = problem.num_heads_q, f"row_gradients of {name}", f"d{name}"
    batch = problem.batch if len(shape) == 2 else 1
    summed = Axes(1 if len(shape) == 2 else problem.batch, 1, problem.seqlen_q)
    strides = (shape[-1] if len(shape) == 2 else 0), 1, 0, 0
    reduced = Reduced(Axes(batch, heads, 1), summed, problem.origin.head, *strides)
    launches = [_sums(shares, result, reduced, "float32")]
    if shape[-1] > heads:
        elements = math.prod(shape)
        launches.insert(0, _clearing(f"the gradient of {name}", result, elements, "float32"))
    return launches


def _sums(shares: str, result: str, reduced: Reduced, dtype: str):
    """The launch that adds up shares to elements of a result."""
    of_sums = {"shares": shares, "array_gradient": result, "reduced": reduced}
    return array_sums(dtype, math.prod(reduced.summed)), math.prod(reduced.kept), of_sums


def _cleared(gradient: ArrayGradient) -> list[tuple[Choice, int, dict[str, Any]]]:
    """The launch that writes zeros where the call does not reach; none where it reaches all."""
    if not gradient.is_larger:
        return []
    name, elements = f"d{gradient.name}", math.prod(gradient.shape)
    return [_clearing(f"the gradient of {gradient.name}", name, elements, gradient.dtype)]


def _clearing(what: str, name: str, elements: int, dtype: str):
    clear = ClearSumsConfig()
    blocks = num_blocks(what, elements, 1, clear.block_rows)
    arguments = {"array_gradient": name, "elements": elements}
    return fixed_point(clear, dtype), blocks, arguments


def _reduced(problem: AttentionProblem, gradient: ArrayGradient, along: str) -> Reduced:
    """The record of an array whose places are those of queries, "i", or of keys, "j"."""
    strides = gradient.strides
    sizes = {"b": problem.batch, "h": problem.num_heads_q}
    sizes[along] = problem.seqlen_q if along == "i" else problem.seqlen_k
    return Reduced(
        Axes(*(n if by in strides else 1 for by, n in sizes.items())),
        Axes(*(1 if by in strides else n for by, n in sizes.items())),
        gradient.first,
        strides.get("b", 0),
        strides.get("h", 0),
        strides.get(along, 0),
        strides.get("j", 0),
    )


def _scattered(
    problem: AttentionProblem,
    gradient: ArrayGradient,
    choices: tuple[Choice, ...],
) -> ArrayKernels:
    """Absolute sums by rows, all of them together, the sums in fixed point, and as floats."""
    name, elements = gradient.name, math.prod(gradient.shape)
    heads = problem.batch * problem.num_heads_q
    rows, of_reads = heads * problem.seqlen_q, len(gradient.reads) * heads
    bounds, by_head, total, fixed = (
        f"{what} of {name}"
        for what in ("absolute rows", "absolute heads", "absolute sum", "fixed sums")
    )
    workspaces = {
        bounds: ((len(gradient.reads) * rows,), "float32"),
        fixed: ((elements,), "int64"),
        by_head: ((of_reads,), "float32"),
        total: ((1,), "float32"),
    }
    parts, launches = {}, []
    more = {
        "fixed_sums": fixed,
        "absolute_sum": total,
        "elements": elements,
        "array_gradient": f"d{name}",
        "of_sums": given_of(problem.program)(*given_of_sums(problem, gradient)),
    }
    for number, choice in enumerate(choices[: len(gradient.reads)]):
        part = f"{bounds}, {number}"
        parts[part] = bounds, number * rows, (number + 1) * rows
        blocks = _blocks(problem, choice)
        launches.append((choice, blocks, {"row_gradients": part}))
    # The sum of all rows: by one block for each head, then by one for all.
    of_rows = Reduced(Axes(1, of_reads, 1), Axes(1, 1, problem.seqlen_q), 0, 0, 1, 0, 0)
    of_heads = Reduced(Axes(1, 1, 1), Axes(1, of_reads, 1), 0, 0, 0, 0, 0)
    launches.append(_sums(bounds, by_head, of_rows, "float32"))
    launches.append(_sums(by_head, total, of_heads, "float32"))
    # Zeros of 64 bits are two of 32.
    launches.append(_clearing(f"the gradient of {name}", fixed, 2 * elements, "float32"))
    for choice in choices[len(gradient.reads) :]:
        launches.append((choice, _blocks(problem, choice), more))
    rounded = RoundSumsConfig()
    blocks = num_blocks(f"the gradient of {name}", elements, 1, rounded.block_rows)
    launches.append((fixed_point(rounded, gradient.dtype), blocks, more))
    return ArrayKernels(workspaces, parts, launches, (bounds,))


def _blocks(problem: AttentionProblem, choice: Choice) -> int:
    """The grid of a kernel that owns rows of queries."""
    return blocks_of(problem, choice.config, problem.num_heads_q)
