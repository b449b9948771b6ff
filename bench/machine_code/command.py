"""`python -m bench machine-code`: the machine code of all kernels, before and after a change.

Without files it compiles the kernels that dispatch chooses or may choose on every GPU, and writes
registers, spills, warnings, parameters, opcodes and main loops. With two such files it prints what
differs, and fails where anything is worse. With `--against` it prints the main loops of another
compiler's kernels, out of a wheel or a cubin, beside ours. It needs a compiler and a disassembler,
no GPU.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from bench.machine_code import against, compare, figures
from bench.machine_code.kernels import NamedKernel, kernels
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED

_OUT = Path("build/machine-code.json")
_EVERY = 10  # seconds between lines of progress


def add_command(commands) -> None:
    """Add `machine-code` to the commands of `python -m bench`."""
    parser = commands.add_parser(
        "machine-code", help=__doc__.splitlines()[0].partition(": ")[2], description=__doc__
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="BEFORE AFTER: compare two files"
    )
    parser.add_argument("--out", type=Path, default=_OUT, help=f"default: {_OUT}")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="FAMILY/GPU",
        help="as in forward, backward-dq/sm_80 or '*/sm_90a'",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="wheels, libraries, cubins or folders of these: print the main loops of their "
        "kernels, then ours, those of --only or the defaults for the same GPUs in bfloat16",
    )
    parser.add_argument(
        "--matching",
        default="",
        metavar="REGEX",
        help="with --against: only kernels in whose 'sm_90/MANGLED_NAME' it is found",
    )
    parser.add_argument(
        "--diff",
        metavar="TEXT",
        help="with two files: also print how opcodes differ in kernels whose name contains TEXT",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write or compare figures; 1 where a kernel fails or is worse, 2 if misused."""
    try:
        if arguments.against:
            return _against(arguments)
        if arguments.matching:
            raise ValueError("--matching stands with --against only")
        if not arguments.files:
            return _write(arguments)
        if len(arguments.files) != 2:
            raise ValueError(f"give BEFORE and AFTER, or no file; got {len(arguments.files)}")
        before, after = map(figures.read, arguments.files)
    except (OSError, ValueError, UnsupportedError) as error:
        print(f"python -m bench machine-code: error: {error}", file=sys.stderr)
        return 2
    text, passes = compare.report(before, after)
    print(text)
    if arguments.diff is not None:
        print("\n".join(compare.opcode_differences(before, after, arguments.diff)))
    return int(not passes)


def _against(arguments: argparse.Namespace) -> int:
    if SIMULATED:
        raise UnsupportedError("kernels cannot be compiled while NUMBA_ENABLE_CUDASIM is set")
    if arguments.files:
        raise ValueError("--against stands without BEFORE and AFTER")
    try:
        re.compile(arguments.matching)
    except re.error as error:
        raise ValueError(f"--matching {arguments.matching!r} is no regex: {error}") from error
    ours = kernels(arguments.only) if arguments.only else None
    print(against.report(arguments.against, arguments.matching, ours))
    return 0


def _write(arguments: argparse.Namespace) -> int:
    if SIMULATED:
        raise UnsupportedError("kernels cannot be compiled while NUMBA_ENABLE_CUDASIM is set")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
    wanted = kernels(arguments.only)
    start = said = time.monotonic()
    found: dict[str, dict] = {}
    for kernel, each in _all_figures(wanted, arguments.jobs):
        found[str(kernel)] = each
        now = time.monotonic()
        if now - said >= _EVERY or len(found) == len(wanted):
            said, seconds = now, now - start
            left = seconds / len(found) * (len(wanted) - len(found))
            text = f"{len(found)} of {len(wanted)} kernels, {seconds:.0f} s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)
    figures.write(arguments.out, arguments.only, {str(k): found[str(k)] for k in wanted})
    failed = {name: each["failed"] for name, each in found.items() if "failed" in each}
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    print(f"{len(found)} kernels, {len(failed)} failed: {arguments.out}")
    return int(bool(failed))


def _all_figures(wanted: list[NamedKernel], jobs: int) -> Iterator[tuple[NamedKernel, dict]]:
    """Each kernel with its figures, in order."""
    if jobs == 1:
        yield from zip(wanted, map(figures.figures_of, wanted), strict=True)
        return
    with get_context("spawn").Pool(jobs) as pool:
        # One after another: kernels differ in how long they take.
        yield from zip(wanted, pool.imap(figures.figures_of, wanted), strict=True)
