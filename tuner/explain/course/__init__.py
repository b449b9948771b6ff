"""A course on FlashAttention in ten lessons, computed by the kernels in the simulator.

`run` gives lessons, `write` a page of them. A lesson is a module; `LESSONS` names them in order.
"""

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from numflash.runtime.files import replace_file

from ..simulated import simulate
from . import page
from .lesson import Lesson

LESSONS = {
    "blocked_scores": "a product by blocks is the product",
    "split_softmax": "a softmax in two halves",
    "online_softmax": "the softmax that goes along with the keys",
    "blocks_on_sms": "6 blocks on 4 SMs",
    "who_takes_what": "FlashAttention-1, -2, and split keys",
    "traffic": "bytes, memory, block sizes",
    "warpgroups": "specialised warps, turns, overlap",
    "by_hand": "N = 4, d = 2 by hand",
    "recomputation": "the backward makes P again",
    "eight_bits": "eight bits and an outlier",
}
"""A module of each lesson, and what it is about; lesson 1 is the first."""
_ARCH, _SECONDS = "sm_80", 600.0


def numbers_of(asked: Sequence[str | int]) -> list[int]:
    """The lessons that are asked for, each once and in order; all if none is named.

    Raises:
        ValueError: there is no such lesson; the message lists those that there are.

    Example:
        >>> numbers_of(["3", "1"])
        [1, 3]
    """
    every = range(1, len(LESSONS) + 1)
    unknown = [text for text in asked if str(text) not in map(str, every)]
    if unknown:
        listed = "\n".join(f"  {n:2}  {LESSONS[name]}" for n, name in enumerate(LESSONS, 1))
        raise ValueError(f"there is no lesson {', '.join(map(str, unknown))}; there are\n{listed}")
    return sorted({int(text) for text in asked}) or list(every)


def run(numbers: Sequence[str | int] = (), quiet: bool = False) -> list[Lesson]:
    """Compute lessons, in this process if it simulates an A100, else in one of their own.

    Numba decides between GPU and simulator when it is imported, so a process that uses a GPU
    cannot simulate.

    Args:
        numbers: of lessons, from 1 on; none means all.
        quiet: say nothing. Otherwise each lesson's name is written to stderr as it begins, and how
            long it took.

    Raises:
        ValueError: there is no such lesson.
        RuntimeError: the other process failed; the message says why.

    Example:
        >>> [lesson] = run([2], quiet=True)
        >>> all(check.holds for check in lesson.checks)
        True
    """
    numbers = numbers_of(numbers)
    return simulate(compute, numbers, quiet, arch=_ARCH, seconds=_SECONDS, speaks=not quiet)


def compute(numbers: Sequence[int], quiet: bool) -> list[Lesson]:
    """Compute lessons in this process, which must simulate kernels."""
    names, found = list(LESSONS), []
    for number in numbers:
        name, began = names[number - 1], time.perf_counter()
        if not quiet:
            print(f"lesson {number}: {LESSONS[name]} ...", end="", file=sys.stderr, flush=True)
        found.append(import_module(f".{name}", __package__).lesson())
        if not quiet:
            print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def write(path: str | Path, lessons: Sequence[Lesson]) -> None:
    """Write a page of lessons, complete in itself. Raises OSError if it cannot be written."""
    replace_file(Path(path), page.of(lessons))
