"""Sequences that stand for a class whose lengths lie on the device, where nobody knows them.

They are drawn from a log-normal distribution, which has a long tail as the lengths of real texts
have. The seed is always the same: all processes measure the same call, and the model counts its
work.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from numflash.problem.classes import ProblemClass
from numflash.selection.geometry import PACKED_SEQLEN

SIGMA = 1.1
"""Of the logarithm of a length: of 64 sequences the longest has some ten times the median."""
_HEADS = 32


class Sequences(NamedTuple):
    """The lengths of sequences, a number for each."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]


def heads_of(problem: ProblemClass, batch_heads: int | None = None) -> int:
    """The query heads of a call that stands for a class; the rest of batch x heads is batch.

    Args:
        problem: the class.
        batch_heads: instead of the class's.
    """
    batch_heads = problem.batch_heads if batch_heads is None else batch_heads
    group = problem.group_size
    choices = range(group, max(group, min(batch_heads, _HEADS)) + 1, group)
    return max((n for n in choices if batch_heads % n == 0), default=group)


def sequences_of(problem: ProblemClass, batch_heads: int | None = None) -> Sequences:
    """The sequences that stand for a class of them; arguments as of `heads_of`.

    Packed ones have the class's tokens on average. In pages the longest fills what a sequence has
    room for. Where there are few queries, as in decoding, all sequences have as many.
    """
    batch_heads = problem.batch_heads if batch_heads is None else batch_heads
    entries = max(1, batch_heads // heads_of(problem, batch_heads))
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    if problem.page_size:
        seqlens_k = long_tailed_up_to(entries, room_of_pages(problem))
    else:
        seqlens_k = long_tailed(entries, seqlen_k)
    if problem.page_size or seqlen_q <= PACKED_SEQLEN:
        return Sequences((seqlen_q,) * entries, seqlens_k)
    return Sequences(long_tailed(entries, seqlen_q), seqlens_k)


def room_of_pages(problem: ProblemClass) -> int:
    """Keys that a sequence's pages have room for, a multiple of the page's."""
    return max(1, problem.seqlen_k // problem.page_size) * problem.page_size


@lru_cache(maxsize=256)
def long_tailed(count: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths with exactly this mean, each at least 1."""
    drawn = _drawn(count, seed)
    lengths = np.maximum(1, (drawn * (mean / drawn.mean())).astype(int))
    # Rounding leaves a few tokens, or takes some too many where the mean is small.
    longest = np.argsort(-lengths, kind="stable")
    left = count * mean - int(lengths.sum())
    while left:
        step = int(np.sign(left))
        for place in longest[: abs(left)]:
            if lengths[place] + step >= 1:
                lengths[place] += step
                left -= step
    return tuple(map(int, lengths))


@lru_cache(maxsize=256)
def long_tailed_up_to(count: int, most: int) -> tuple[int, ...]:
    """`count` lengths of which the longest is `most`, each at least 1."""
    drawn = _drawn(count, 0)
    lengths = np.maximum(1, (drawn * (most / drawn.max())).astype(int))
    lengths[np.argmax(drawn)] = most
    return tuple(map(int, lengths))


def _drawn(count: int, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0.0, SIGMA, count))
