"""`python -m bench fp8-accuracy`: FlashAttention-3's table of FP8 errors, and two more inputs.

Table 3 of arXiv 2407.08608: the RMSE of float16 and FP8 attention against float64, on normal
entries with outliers; here also on a trained model's activations and on attention sinks. The
FP8 methods are the specification in NumPy; on a GPU the kernels are run as well. Every result is
rounded to float16. `python -m bench report` draws table and plot from the record.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.fp8_accuracy import kernels as fp8_kernels
from bench.fp8_accuracy import section as fp8_section
from bench.fp8_accuracy.inputs import PAPER_HEAD_DIM, PAPER_SEQLEN, Input, activations
from bench.fp8_accuracy.methods import BLOCK, FULL, KERNELS, METHODS, TRUTH, Study
from bench.records import record

KIND = "fp8-accuracy"
_QUICK_SEQLEN = 1024
_PIECE = 512
"""Queries of a piece of work: a multiple of the recipes' blocks."""
# A head's queries share the outliers of its keys: many heads say more than many queries.
_QUERIES, _HEADS, _OTHER_HEADS = 512, 64, 8
_SINK_SEQLEN, _SINK_HEADS = 2048, 16
# Each holds about 400 MB.
_MAX_PROCESSES = 16
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_Squares = dict[tuple[str, str], float]


def add_command(commands) -> None:
    """Add `fp8-accuracy` to the commands of `python -m bench`."""
    parser = commands.add_parser(KIND, help=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=PAPER_SEQLEN, help="tokens of the outliers")
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[PAPER_HEAD_DIM, 64, 256], metavar="N"
    )
    parser.add_argument(
        "--heads", type=int, help=f"of each input; {_HEADS} of outliers at 128 if not given"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_SEQLEN} tokens, one head of 128"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the record")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables and write the record; 1 if the paper's accuracy is missed."""
    start = time.monotonic()
    inputs = chosen_inputs(arguments)
    processes = 1 if arguments.quick else min(os.cpu_count() or 1, _MAX_PROCESSES)
    engine = fp8_kernels.find()
    print(f"kernels: {engine.device or engine.reason}", flush=True)
    found = {
        **record.describe_machine(),
        "kind": KIND,
        "kernels": {"device": engine.device, "reason": engine.reason},
        "inputs": [],
    }
    with _pool(processes) as pool:
        for case in inputs:
            begin = time.monotonic()
            found["inputs"].append(measure(case, engine.run if engine.device else None, pool))
            print(f"{case}: {time.monotonic() - begin:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / fp8_section.FILE_NAME
    record.save(found, path)
    print(f"\n{fp8_section.tables_of(found)}\n")
    print(f"{path}: {time.monotonic() - start:.0f} s")
    reached = fp8_section.requirement(found)
    if reached is None:
        print(f"Not compared with the paper: it needs head_dim 128 and {PAPER_SEQLEN} tokens.")
        return 0
    print(reached.text)
    return 1 if reached.verdict == fp8_section.MISSED else 0


def chosen_inputs(arguments: argparse.Namespace) -> list[Input]:
    """The inputs that the options ask for."""
    head_dims, heads, seqlen = arguments.head_dim, arguments.heads, arguments.seqlen
    if arguments.quick:
        head_dims, heads, seqlen = [PAPER_HEAD_DIM], heads or 1, min(seqlen, _QUICK_SEQLEN)
    outliers = []
    for head_dim in head_dims:
        draws = heads or (_HEADS if head_dim == PAPER_HEAD_DIM else _OTHER_HEADS)
        outliers.append(Input("outliers", head_dim, seqlen, draws, queries=_QUERIES))
    sinks = Input(
        "sinks",
        PAPER_HEAD_DIM,
        min(seqlen, _SINK_SEQLEN),
        heads or _SINK_HEADS,
        queries=_QUERIES,
    )
    return [*outliers, activations(), sinks]


def measure(case: Input, run_kernels: Callable | None = None, pool=None) -> dict:
    """The errors of every method on one input.

    Args:
        case: the input.
        run_kernels: as `fp8_kernels.Engine.run`; None where there are no kernels.
        pool: processes to share the work; None does it here.

    Returns:
        The input's sizes, the RMS of the exact output, and a list of methods, each with its
        engine, rmse, standard error over the draws and relative_rmse, or a reason.
    """
    pieces = list(_pieces(case))
    reasons: dict[str, str] = {}
    given = _given(case, pieces, run_kernels, reasons) if run_kernels else [{}] * len(pieces)
    work = (pool.map if pool else map)(squared_errors, [case] * len(pieces), pieces, given)
    squares: dict[tuple[str, str], np.ndarray] = {}
    for done, (piece, sums) in enumerate(zip(pieces, work, strict=True), 1):
        for key, value in sums.items():
            squares.setdefault(key, np.zeros(case.draws))[piece[0]] += value
        if sys.stderr.isatty():
            end = "\r" if done == len(pieces) else ""
            print(f"\r{case}: {done / len(pieces):4.0%}{end}", end="", file=sys.stderr, flush=True)
    count = case.batch * case.heads * case.seqlen_q * case.head_dim
    failed = {(name, KERNELS) for name in reasons}
    by_draw = {key: sums / count for key, sums in squares.items() if key not in failed}
    output_rms, _ = rmse_of(by_draw.pop((TRUTH, TRUTH)))
    methods: list[dict] = []
    for method in METHODS:
        for engine in (method.engine, KERNELS):
            entry: dict[str, Any] = {"method": method.name, "engine": engine}
            if (method.name, engine) in by_draw:
                rmse, error = rmse_of(by_draw[method.name, engine])
                entry |= {
                    "rmse": rmse,
                    "standard_error": error,
                    "relative_rmse": rmse / output_rms,
                }
                if method.recipe in (BLOCK, FULL) and ("fp8-tensor", engine) in by_draw:
                    both = by_draw["fp8-tensor", engine], by_draw[method.name, engine]
                    entry["gain"], entry["gain_standard_error"] = ratio_of(*both)
                methods.append(entry)
            elif engine == KERNELS and method.name in reasons:
                methods.append({**entry, "reason": reasons[method.name]})
    names = ("name", "head_dim", "seqlen", "seqlen_q", "draws", "batch", "heads")
    sizes = {name: getattr(case, name) for name in names}
    return {**sizes, "output_rms": output_rms, "methods": methods}


def rmse_of(mean_squares: np.ndarray) -> tuple[float, float]:
    """The RMSE over all draws from the mean square of each, and its standard error."""
    rmse, draws = float(mean_squares.mean() ** 0.5), len(mean_squares)
    if draws == 1 or rmse == 0:
        return rmse, 0.0
    return rmse, float(mean_squares.std(ddof=1)) / draws**0.5 / (2 * rmse)


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """The ratio of two RMSEs from mean squares of the same draws, and its standard error."""
    above, below, draws = numerator.sum(), denominator.sum(), len(numerator)
    ratio = float((above / below) ** 0.5)
    if draws == 1:
        return ratio, 0.0
    without_one = ((above - numerator) / (below - denominator)) ** 0.5
    return ratio, float(without_one.std() * (draws - 1) ** 0.5)


def squared_errors(
    case: Input, piece: tuple[int, int, int, int, int], given: Mapping[str, np.ndarray]
) -> _Squares:
    """Sums of squared errors over some queries of one head, by method and engine.

    Args:
        case: the input.
        piece: draw, entry of the batch, head, first query and the one after the last.
        given: by method, what the kernels gave for these queries.

    Returns:
        Also the sum of squares of the exact output, under (TRUTH, TRUTH).
    """
    draw, *where = piece
    study = _study(case, draw)
    exact = study.out(TRUTH, *where)
    sums = {(TRUTH, TRUTH): _sum_of_squares(exact)}
    for method in METHODS:
        sums[method.name, method.engine] = _sum_of_squares(study.out(method.name, *where) - exact)
    for name, out in given.items():
        sums[name, KERNELS] = _sum_of_squares(out.astype(np.float64) - exact)
    return sums


def _sum_of_squares(x: np.ndarray) -> float:
    return float(np.sum(x * x))


# The pieces of a draw follow each other.
@lru_cache(maxsize=1)
def _study(case: Input, draw: int) -> Study:
    return Study(case, draw)


def _pieces(case: Input) -> Iterator[tuple[int, int, int, int, int]]:
    for draw, entry, head in product(range(case.draws), range(case.batch), range(case.heads)):
        for first in range(0, case.seqlen_q, _PIECE):
            yield draw, entry, head, first, min(first + _PIECE, case.seqlen_q)


def _given(
    case: Input, pieces: list, run_kernels: Callable, reasons: dict[str, str]
) -> Iterator[dict[str, np.ndarray]]:
    """For each piece, what the kernels gave by method; why one gave nothing goes to `reasons`.

    A method that fails in one draw has no figure.
    """
    last, outs = None, {}
    for draw, entry, head, first, end in pieces:
        if draw != last:
            last, outs = draw, run_kernels(case, draw)
            reasons |= {name: out for name, out in outs.items() if isinstance(out, str)}
        arrays = {name: out for name, out in outs.items() if name not in reasons}
        yield {name: out[entry, first:end, head] for name, out in arrays.items()}


def _pool(processes: int):
    """Processes with one BLAS thread each; None for one process, which is this."""
    return nullcontext() if processes == 1 else _processes(processes)


@contextmanager
def _processes(count: int):
    # Read when a process imports NumPy. Not fork: this one may hold a CUDA context.
    before = {name: os.environ.get(name) for name in _BLAS_THREADS}
    os.environ.update(dict.fromkeys(_BLAS_THREADS, "1"))
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
