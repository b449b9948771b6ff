"""Errors of a slice of the call against their budget, and the online softmax of one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import numflash
from numflash.api.comparison import Error
from numflash.configs import implementation_of
from numflash.runtime.arrays import library_of, to_numpy
from numflash.runtime.mode import SIMULATED

from ..asked import Asked, Kernel, NotShownError
from ..elements import Elements, Part, elements_of
from ..numbers import Number
from ..simulated import NotSimulatedError, simulate
from .laid import laid

MOST_QUERIES, MOST_KEYS, MOST_HEADS = 256, 512, 2
# Multiply-adds that the simulator does in about a second, by implementation; of a tile all rows
# and columns count. On two cores of 2.x GHz.
_SIMULATED = {"sm90": 64 * 1024 * 128, "portable": 2 * 1024 * 128}
_SIMULATED_ELSE = 16 * 1024 * 128
MOST_ROW_KEYS = 2**16
"""Keys of the row that are read."""
_MOST_SCORES = 2**38
LAG = 8.0
"""As `tiles.mma.softmax` has it, which is not imported: it would import Numba."""
_WARP_ROWS, _CHOSEN = 16, 0.6
_LOG2_E = np.float32(np.log2(np.e))
# Options of `attention` that a slice takes as they are, and those with a number for each head.
_TAKEN = (
    *("softmax_scale", "causal", "window_size", "softcap", "dropout_p", "seed"),
    *("precision", "fp8", "max_rel_error", "out_dtype", "batch_invariant"),
)
_OF_HEADS = ("alibi_slopes", "sinks")
_ANSWERED = (
    *("causal_align", "shift", "layout", "config", "num_splits", "schedule"),
    *("dlse", "delta", "wrt", "grad_dtype"),
)
"""Options that say how the call is laid out, and those of its backward."""
_OF_SCORES = ("alibi_slopes", "sinks", "bias", "mask", "score_mod", "mask_mod", "dropout_p")


class Slice(NamedTuple):
    """A part of the call's scores: those of some queries and keys, and of some query heads."""

    first_query: int
    queries: int
    first_key: int
    keys: int
    heads: int


@dataclass(frozen=True)
class Checked:
    """What a kernel made of a slice.

    Attributes:
        kernel: its config.
        place: where it ran: "on this GPU", or "in the simulator".
        part: the slice.
        errors: for each result, by name: "error", "naive" (of an implementation that rounds each
            step to the input precision), "budget", and "share" of the budget.
        naive: what "naive" is, in words.
        left_out: options that the slice was computed without.
    """

    kernel: str
    place: str
    part: Slice
    errors: Mapping[str, Mapping[str, Number]]
    naive: str
    left_out: Sequence[str]


@dataclass(frozen=True)
class Row:
    """The online softmax of one row, in float32 and base 2, as its kernel walks.

    Attributes:
        query, head: which row.
        tile: keys of a tile.
        neighbours: rows of its warp, which rescale together; 1 where a row is by itself.
        lag: by how much a maximum may grow, in powers of two, before anything is rescaled; None
            in kernels that follow each maximum.
        first_key: of the first tile that is walked over.
        scores: of the row, -inf where they are masked.
        largest: after each tile, the true running maximum of the scores.
        subtracted: the number that is subtracted from them.
        sums: the running sum.
        factors: by which sum and O were multiplied before the tile's P was added.
        own, others: tiles that rescaled because this row had to, and those that multiplied by 1
            because a neighbour had to.
        lse, lse_at_once: the logarithm of the sum, and that of all scores at once in float64.
        parts: blocks that share the row's keys; each begins with no maximum.
        note: what is not as in the call.
    """

    query: Number
    head: Number
    tile: Number
    neighbours: Number
    lag: Number | None
    first_key: Number
    scores: np.ndarray
    largest: np.ndarray
    subtracted: np.ndarray
    sums: np.ndarray
    factors: np.ndarray
    own: np.ndarray
    others: np.ndarray
    lse: Number
    lse_at_once: Number
    parts: Number
    note: str


@dataclass(frozen=True)
class NumericsFacts:
    """Numerics of a call.

    Attributes:
        elements: whose they are, in words.
        checked: errors of a slice; None where it was not run.
        not_checked: why not; "" if it was.
        row: one row's softmax; None where none sees a key, or its sum is not kept in scores.
        no_row: why not; "" if there is one.
    """

    elements: str
    checked: Checked | None
    not_checked: str
    row: Row | None
    no_row: str


def find(asked: Asked) -> NumericsFacts:
    """The facts of a call.

    Raises:
        NotShownError: it has no scores, or elements are not finite.
    """
    problem = asked.problem
    if not problem.seqlen_q * problem.seqlen_k * problem.num_heads_q * problem.batch:
        raise NotShownError("there are no scores, so nothing is rounded")
    elements = elements_of(asked)
    checked = row = None
    not_checked = no_row = ""
    try:
        checked = _checked(asked, elements)
    except (_NoBudgetError, NotSimulatedError) as error:
        not_checked = str(error)
    if asked.problem.codes is not None or asked.forward.traits.fp8:
        no_row = "P is rounded to 8 bits here, in units of each tile: section 8 shows its scales"
    elif problem.seqlen_q * problem.seqlen_k > _MOST_SCORES:
        no_row = "there are too many tiles to choose one"
    else:
        row = _row(asked, elements)
        no_row = "" if row is not None else "no row sees a key"
    return NumericsFacts(elements.origin, checked, not_checked, row, no_row)


# A slice against its budget


class _NoBudgetError(ValueError):
    """A slice has no errors that could be drawn."""


def run_check(arrays: tuple, options: dict) -> tuple[Error, ...]:
    """The errors of `numflash.check`, which the simulator runs in a process of its own."""
    return numflash.check(*arrays, **options).errors


def _checked(asked: Asked, elements: Elements) -> Checked:
    kernel, problem = asked.forward, asked.problem
    part, config = slice_of(kernel, problem)
    group = problem.group_size
    q_end, k_end = part.first_query + part.queries, part.first_key + part.keys
    of_heads = max(1, part.heads // group)
    parts = {"q": Part(0, part.first_query, q_end, 0, part.heads)}
    parts |= dict.fromkeys("kv", Part(0, part.first_key, k_end, 0, of_heads))
    arrays = tuple(elements.read(name, each)[None] for name, each in parts.items())
    options, left_out = _options(asked, part)
    if config is not None:
        options["config"] = config
    if _is_here(asked):
        like = asked.question.arrays["q"]
        library, device = library_of(like, "q"), asked.explanation.machine.device
        arrays = tuple(library.from_host(x, device) for x in arrays)
        found, place = run_check(arrays, options), "on this GPU"
    else:
        found = simulate(run_check, arrays, options, arch=asked.machine.arch)
        place = "in the simulator"
    for error in found:
        if not np.isfinite([error.error, error.naive_error]).all():
            raise _NoBudgetError(
                f"{error.name} has no finite error, scores of the slice overflow in "
                f"{problem.dtype}"
            )
    return Checked(
        kernel=config or f"that of the rules for so few queries ({kernel.config.implementation})",
        place=place,
        part=part,
        errors={error.name: _numbers(error) for error in found},
        naive="attention with the same codes and scales in float64"
        if kernel.traits.fp8
        else "an implementation that rounds each step to the input precision",
        left_out=left_out,
    )


def _is_here(asked: Asked) -> bool:
    """Whether kernels run on the GPU that the page is about."""
    return asked.question.gpu is None and not SIMULATED


def _numbers(error: Error) -> dict[str, Number]:
    share = error.error / error.budget if error.budget else float(error.error > 0)
    values = {"error": error.error, "naive": error.naive_error, "budget": error.budget}
    return {name: Number(value, "computed") for name, value in {**values, "share": share}.items()}


def slice_of(kernel: Kernel, problem) -> tuple[Slice, str | None]:
    """The slice that is checked, and the config of its kernel; None leaves that to the rules.

    A tile of rows and so many tiles of keys that the simulator takes about a second. Where one
    tile of the call's kernel takes longer, a smaller kernel of the rules stands for it.
    """
    config, most = kernel.config, _SIMULATED.get(kernel.config.implementation, _SIMULATED_ELSE)
    if kernel.traits.fp8:
        most //= 4
    most_scores = most // max(problem.head_dim, problem.head_dim_v)
    own = config.row_tile * config.column_tile
    rows, width = config.row_tile // max(1, kernel.geometry.pack), config.column_tile
    name = str(config)
    if own > 2 * most_scores:
        rows, width, own, name = 16, 32, 16 * 32 * 4, None
    elif getattr(config, "num_splits", 1) > 1:
        name = None
    queries = min(problem.seqlen_q, rows, MOST_QUERIES)
    keys = min(problem.seqlen_k, width * max(1, most_scores // own), MOST_KEYS)
    heads = min(MOST_HEADS, problem.group_size)
    # The last queries, and the keys up to the last that they see.
    first = problem.seqlen_q - queries
    end = min(max(problem.seqlen_q + problem.band_hi, keys), problem.seqlen_k)
    return Slice(first, queries, end - keys, keys, heads), name


def _options(asked: Asked, part: Slice) -> tuple[dict, list[str]]:
    """The options of the slice, and the names of those that it leaves out."""
    given, problem = asked.question.options, asked.problem
    options = {name: given[name] for name in _TAKEN if given.get(name) is not None}
    if options.get("precision") == "auto":
        # Heads that stay in 16 bits would have no error of 8 bits.
        options["precision"] = "fp8"
    options.pop("max_rel_error", None)
    if given.get("causal") or given.get("window_size", (-1, -1)) != (-1, -1):
        options["shift"] = problem.shift + part.first_query - part.first_key
        options["causal_align"] = "top_left"
    left_out = []
    for name, value in given.items():
        if value is None or name in _TAKEN or name in _ANSWERED:
            continue
        if name in _OF_HEADS and hasattr(value, "shape") and asked.question.data:
            options[name] = np.array(to_numpy(value)[..., : part.heads])
        else:
            left_out.append(name)
    return options, left_out


# The online softmax of a row


def _row(asked: Asked, elements: Elements) -> Row | None:
    """A row of the tile of rows at six tenths of those that see a key; None if none does."""
    kernel, found = asked.forward, laid(asked, asked.forward)
    busy = np.flatnonzero(found.work)
    if not len(busy):
        return None
    tiling, lag = found.tiling, _lag(kernel)
    tile_of_rows = int(busy[int(_CHOSEN * len(busy))])
    neighbours = _rows_of_warp(kernel)
    first = tile_of_rows * tiling.row_tile
    rows = np.arange(first, min(first + neighbours, tiling.rows))
    columns = tiling.column_tile
    shares = [tiles for tiles in found.shares(tile_of_rows) if len(tiles)]
    begin = min(int(tiles[0]) for tiles in shares)
    most = MOST_ROW_KEYS // columns
    note = (
        ""
        if all(tiles[-1] < begin + most for tiles in shares)
        else (f"Of the keys only {most * columns:,} were read. ")
    )
    shares = [tiles[tiles < begin + most] for tiles in shares]
    shares = [tiles for tiles in shares if len(tiles)]
    keys = min((max(int(tiles[-1]) for tiles in shares) + 1) * columns, tiling.columns)
    scores = _scores(asked, elements, rows, tiling, (begin * columns, keys))
    visited = np.zeros(scores.shape[1], bool)
    for tiles in shares:
        for tile in tiles:
            visited[(tile - begin) * columns : (tile - begin + 1) * columns] = True
    scores[:, ~visited] = -np.inf
    which = _row_that_sees(scores)
    if which is None:
        return None
    scale = np.float32(asked.problem.softmax_scale)
    softcap = asked.question.options.get("softcap")
    if softcap:
        scores, scale = np.float32(softcap) * np.tanh(scores * scale / np.float32(softcap)), 1
    walks = [
        _walk(
            scores,
            [slice((t - begin) * columns, (t - begin + 1) * columns) for t in tiles],
            np.float32(scale),
            lag,
        )
        for tiles in shares
    ]
    return _row_of(asked, rows[which], which, tiling, scores, scale, walks, begin, lag, note)


def _lag(kernel: Kernel) -> float | None:
    return LAG if implementation_of(kernel.config).has_tensor_cores else None


def _rows_of_warp(kernel: Kernel) -> int:
    """Rows that rescale together: those of a warp that votes, else one."""
    config, row = kernel.config, implementation_of(kernel.config)
    if not row.has_tensor_cores:
        return 1
    return _WARP_ROWS if row.needs_maps else config.row_tile // config.num_warps


def _scores(
    asked: Asked, elements: Elements, rows: np.ndarray, tiling, keys: tuple[int, int]
) -> np.ndarray:
    """(rows, keys) of Q K^T in float32, -inf where the band masks them."""
    pack = tiling.pack
    token, end = int(rows[0]) // pack, int(rows[-1]) // pack + 1
    q = elements.read("q", Part(0, token, end, 0, pack)).astype(np.float32)
    q = q.reshape(-1, q.shape[-1])[rows[0] - token * pack :][: len(rows)]
    k = elements.read("k", Part(0, *keys, 0, 1)).astype(np.float32)[:, 0]
    away = np.arange(*keys) - rows[:, None] // pack
    return np.where((away >= tiling.lo) & (away <= tiling.hi), q @ k.T, np.float32(-np.inf))


def _row_that_sees(scores: np.ndarray) -> int | None:
    """The row in the middle of those that see a key."""
    seeing = np.flatnonzero(np.isfinite(scores).any(axis=1))
    return int(seeing[len(seeing) // 2]) if len(seeing) else None


class _Walk(NamedTuple):
    """After each tile, arrays of (tiles, rows), the last two of booleans."""

    largest: np.ndarray
    subtracted: np.ndarray
    sums: np.ndarray
    factors: np.ndarray
    grows: np.ndarray
    votes: np.ndarray


def _walk(scores: np.ndarray, tiles: list[slice], scale: np.float32, lag: float | None) -> _Walk:
    """`tiles.mma.softmax` over the rows of a warp; without a lag, `tiles.portable.softmax`."""
    scale_log2 = scale * _LOG2_E
    rows = len(scores)
    row_max, true_max = (np.full(rows, -np.inf, np.float32) for _ in range(2))
    row_sum, found = np.zeros(rows, np.float32), []
    for tile in tiles:
        part = scores[:, tile]
        largest = part.max(axis=1, initial=-np.inf)
        true_max, seen = np.maximum(true_max, largest), np.isfinite(row_max)
        with np.errstate(invalid="ignore"):
            by = np.where(seen, (largest - row_max) * scale_log2, np.inf)
            grows = (largest > -np.inf) & (by > (lag or 0.0))
            new_max = np.where(grows, np.maximum(largest, row_max), row_max)
            factors = np.where(grows, np.exp2((row_max - new_max) * scale_log2), 1)
            shift = np.where(np.isfinite(new_max), new_max, 0)
            p = np.exp2((part - shift[:, None]) * scale_log2)
        row_max, row_sum = new_max, row_sum * factors + p.sum(axis=1)
        grew = grows & seen
        found.append((true_max, row_max, row_sum, factors, grew, np.full(rows, grows.any())))
    return _Walk(*(np.array(column) for column in zip(*found, strict=True)))


def _row_of(
    asked: Asked, row: int, which: int, tiling, scores, scale, walks: list[_Walk], begin, lag, note
) -> Row:
    """The facts of one of the rows that were walked together."""
    joined = _Walk(*(np.concatenate(columns)[:, which] for columns in zip(*walks, strict=True)))
    own, begins = joined.grows, joined.factors == 0
    mine = scores[which].astype(np.float64) * float(scale)
    top = mine.max()
    at_once = float(np.log(np.exp(mine - top).sum()) + top)
    ends = np.cumsum([len(walk.sums) for walk in walks]) - 1
    with np.errstate(divide="ignore"):
        of_parts = [
            float(joined.subtracted[end]) * float(scale) + float(np.log(joined.sums[end]))
            for end in ends
            if joined.sums[end] > 0
        ]
    names = [n for n in _OF_SCORES if asked.question.options.get(n) is not None]
    if names:
        note += f"Without {', '.join(names)}. "
    token, head = divmod(int(row), tiling.pack)
    return Row(
        query=Number(token, "counted"),
        head=Number(head, "counted"),
        tile=Number(tiling.column_tile, "chosen"),
        neighbours=Number(len(scores), "counted"),
        lag=None if lag is None else Number(lag, "chosen"),
        first_key=Number(begin * tiling.column_tile, "counted"),
        scores=mine,
        largest=joined.largest * scale,
        subtracted=joined.subtracted * scale,
        sums=joined.sums,
        factors=joined.factors,
        own=own,
        others=joined.votes & ~own & ~begins,
        lse=Number(float(np.logaddexp.reduce(of_parts)), "computed"),
        lse_at_once=Number(at_once, "computed"),
        parts=Number(len(walks), "counted"),
        note=note,
    )
