"""FLOP, bytes and memory of the call, of attention that stores its scores, and the least possible.

Standard attention computes all scores, masked ones too, and stores S and P in the dtype of Q. Its
forward writes and reads both. Its backward reads P twice, writes and reads dP, and writes dS and
reads it twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from numflash.problem.classes import ProblemClass
from numflash.problem.fp8 import Fp8Array, Fp8Recipe

from ...lengths import sequences_of
from ...model.grid import (
    io_bytes,
    lay,
    memory_bytes,
    part_bytes,
    quantised_bytes,
    rows_of,
    visible_scores,
)
from ...model.prediction import multiply_adds
from ...space.machines import Machine
from ..asked import Asked, Kernel, NotShownError
from ..numbers import Number

_FORWARD_MATRICES, _BACKWARD_MATRICES = 4, 7
_BACKWARD_PRODUCTS = 4
_FLOAT_BYTES = 4
# Tokens that share a scale, of which a block finds the maximum by itself: `kernels.quantize`.
_ONE_PASS_TOKENS = 256
_SEQLENS = 2 ** np.arange(8, 25)


@dataclass(frozen=True)
class Cost:
    """What a way to compute attention takes.

    Attributes:
        flop: of matrix products.
        bytes: from and to device memory.
        memory: bytes of all arrays that exist at once: those of the call, and what lies between.
    """

    flop: Number
    bytes: Number
    memory: Number


@dataclass(frozen=True)
class Growth:
    """Memory over the length of a sequence.

    Attributes:
        of: what grows: "queries and keys", or "keys".
        seqlens: lengths.
        ours, standard: bytes at these lengths, everything else as in the call.
        slopes: of both on logarithmic axes, at the longest.
        available: bytes of this GPU; None where nobody said.
        ours_fits, standard_fits: the longest sequence whose arrays fit it; None likewise.
        here: the call's own length.
    """

    of: str
    seqlens: np.ndarray
    ours: Number
    standard: Number
    slopes: tuple[Number, Number]
    available: Number | None
    ours_fits: Number | None
    standard_fits: Number | None
    here: Number


@dataclass(frozen=True)
class Backward:
    """The backward with P computed again, and with P kept.

    Attributes:
        again: with recomputation: its `memory` is what the forward keeps for it.
        kept: likewise of a backward that finds P stored.
        products: matrix products of the size of Q K^T of both.
    """

    again: Cost
    kept: Cost
    products: tuple[Number, Number]


@dataclass(frozen=True)
class BytesFacts:
    """FLOP, bytes and memory of a call.

    Attributes:
        ways: by name, "this call", "standard" and "least".
        growth: memory over seqlen.
        backward: None where there is none.
    """

    ways: Mapping[str, Cost]
    growth: Growth
    backward: Backward | None


def find(asked: Asked) -> BytesFacts:
    """The facts of a call.

    Raises:
        NotShownError: it has no scores, or the model knows no such kernel.
    """
    kernel, machine = asked.forward, asked.machine
    problem = kernel.problem
    if not score_bytes(problem):
        raise NotShownError("there are no scores, so there is nothing to move or to keep")
    if kernel.prediction is None:
        raise NotShownError("the model counts no bytes of such kernels")
    laid = lay(problem, kernel.config, asked.kept)
    moved, parts = _moved(kernel, asked) + _quantised(asked), part_bytes(problem, laid)
    each = 2 * (problem.traits.head_dim + problem.traits.head_dim_v)
    tile = rows_of(kernel.config) * kernel.config.column_tile
    needed = arrays_bytes(problem)
    ways = {
        "this call": _cost(laid.walks.total * laid.heads * tile * each, moved, needed + parts),
        "standard": _cost(
            each * _scores(problem), standard_bytes(problem), needed + 2 * score_bytes(problem)
        ),
        "least": _cost(
            each * visible_scores(problem, asked.kept), io_bytes(problem), needed, "counted"
        ),
    }
    return BytesFacts(ways, _growth(asked, problem, machine), _backward(asked, problem))


def _cost(flop: float, moved: float, memory: float, origin: str = "counted") -> Cost:
    moved_origin = "model" if isinstance(moved, float) else origin
    return Cost(
        Number(int(flop), origin, "FLOP"),
        Number(int(moved), moved_origin, "bytes"),
        Number(int(memory), origin, "bytes"),
    )


def _moved(kernel: Kernel, asked: Asked) -> float:
    """Bytes that a kernel of tiles moves, by the model."""
    problem, config, machine = kernel.problem, kernel.config, asked.machine
    laid = lay(problem, config, asked.kept)
    slots = machine.num_sms * kernel.prediction.blocks_per_sm
    return memory_bytes(problem, config, laid, slots, machine.l2_bytes) + part_bytes(problem, laid)


def _quantised(asked: Asked) -> int:
    """Bytes of the kernels that make codes of the call's arrays, where it makes them of all."""
    arrays = asked.question.arrays.values()
    if not asked.forward.traits.fp8 or any(isinstance(x, Fp8Array) for x in arrays):
        return 0
    if any(x.dtype.itemsize == 1 for x in arrays):
        return 0
    recipe = asked.question.options.get("fp8") or Fp8Recipe()
    in_one_pass = recipe.granularity == "token" or (
        recipe.granularity == "block" and recipe.block <= _ONE_PASS_TOKENS
    )
    return quantised_bytes(asked.forward.problem, 1 if in_one_pass else 2)


def _scores(problem: ProblemClass) -> int:
    """All scores of all heads, masked ones too; sequences have matrices of their own."""
    if not problem.traits.ragged:
        return problem.seqlen_q * problem.seqlen_k * problem.batch_heads
    entries = sequences_of(problem)
    heads = problem.batch_heads // len(entries.seqlens_q)
    return heads * sum(q * k for q, k in zip(*entries, strict=True))


def score_bytes(problem: ProblemClass) -> int:
    """Bytes of one matrix of scores, of all heads, in the dtype of Q."""
    return _scores(problem) * problem.traits.dtype_bytes


def standard_bytes(problem: ProblemClass) -> int:
    """Bytes that standard attention moves: inputs, results, and its matrices."""
    times = _FORWARD_MATRICES if problem.family == "forward" else _BACKWARD_MATRICES
    return times * score_bytes(problem) + io_bytes(problem)


def arrays_bytes(problem: ProblemClass) -> int:
    """Bytes of Q, K, V, O and lse."""
    return io_bytes(replace(problem, family="forward"))


def _growth(asked: Asked, problem: ProblemClass, machine: Machine) -> Growth:
    """By formula: the arrays of a call grow with its tokens, scores with their product."""
    both = problem.seqlen_q == problem.seqlen_k and not problem.page_size
    here = problem.seqlen_k

    def at(n: int) -> tuple[int, int]:
        longer = replace(problem, seqlen_k=n, seqlen_q=n if both else problem.seqlen_q)
        ours = arrays_bytes(longer)
        # Of sequences with lengths of their own, those of the class's shape grow alike.
        matrix = score_bytes(problem) * (n / here) ** (2 if both else 1)
        return ours, int(ours + 2 * matrix)

    ours, standard = (np.array(x, float) for x in zip(*map(at, _SEQLENS.tolist()), strict=True))
    available = machine.memory_bytes
    slopes = (float(np.log2(x[-1] / x[-2])) for x in (ours, standard))
    fits = [_longest(lambda n, i=i: at(n)[i], available) if available else None for i in (0, 1)]
    ours_fits, standard_fits = (None if n is None else Number(n, "counted") for n in fits)
    return Growth(
        of="queries and keys" if both else "keys",
        seqlens=_SEQLENS,
        ours=Number(ours, "counted", "bytes"),
        standard=Number(standard, "counted", "bytes"),
        slopes=tuple(Number(x, "counted") for x in slopes),
        available=Number(available, "assumed", "bytes") if available else None,
        ours_fits=ours_fits,
        standard_fits=standard_fits,
        here=Number(here, "chosen"),
    )


def _longest(size_of, available: int) -> int:
    """The largest n whose size is available, by halving."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) <= available else (low, middle)
    return low


def _backward(asked: Asked, problem: ProblemClass) -> Backward | None:
    """Of all kernels of the backward that multiply."""
    kernels = [each for each in asked.kernels.values() if each.is_tiled][1:]
    known: Sequence[Kernel] = [each for each in kernels if each.prediction is not None]
    if not known or len(known) < len(kernels):
        return None
    columns = problem.traits.head_dim + problem.traits.head_dim_v
    visible = visible_scores(problem, asked.kept)
    product = visible * columns / 2
    rows = problem.seqlen_q * problem.batch_heads
    terms = sum(multiply_adds(each.problem, asked.kept) for each in known)
    of_rows = rows * (problem.traits.head_dim_v * problem.traits.dtype_bytes + _FLOAT_BYTES)
    inputs = io_bytes(replace(problem, family="backward"))
    matrix = score_bytes(problem)
    return Backward(
        again=_cost(2 * terms, sum(_moved(each, asked) for each in known), of_rows),
        kept=_cost(
            2 * _BACKWARD_PRODUCTS * _scores(problem) * columns / 2,
            inputs + _BACKWARD_MATRICES * matrix,
            matrix,
        ),
        products=(
            Number(round(terms / product), "counted"),
            Number(_BACKWARD_PRODUCTS, "counted"),
        ),
    )
