"""Many runs of rows that travel as one message to each rank: put together before, dealt out after.

A run of tokens travels from its place to its place; of many documents there are thousands. Where
there are more than libraries bear, a copy of what leaves and of what arrives costs less.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from numflash.distributed import steps
from numflash.distributed.arrays import Arrays
from numflash.distributed.layouts import Layout
from numflash.distributed.pairs import Band
from numflash.distributed.steps import Message
from numflash.problem.fp8 import Fp8Recipe

MOST_MESSAGES = 256
"""That a rank posts together: more have hung in NCCL (PyTorch's pull request 174942)."""


class Packed(NamedTuple):
    """Rows of the whole sequence that travel next to each other.

    Attributes:
        index: the rows, in the order in which they travel: by rank.
        extents: (the other rank, (begin, end) among them).
    """

    index: Any
    extents: tuple[tuple[int, tuple[int, int]], ...]

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return self.extents[-1][1][1] if self.extents else 0

    @classmethod
    def of(cls, arrays: Arrays, runs: Iterable[tuple[int, tuple[int, int]]]) -> "Packed":
        """(The other rank, rows of the whole sequence) of each run; of a rank in their order."""
        runs = sorted(runs, key=lambda run: run[0])
        rows = [np.arange(*place, dtype=np.int64) for _, place in runs]
        extents, at = {}, 0
        for (peer, _), each in zip(runs, rows, strict=True):
            begin, _ = extents.get(peer, (at, at))
            at += len(each)
            extents[peer] = begin, at
        index = np.concatenate([np.empty(0, np.int64), *rows])
        return cls(arrays.from_host(index), tuple(extents.items()))


@lru_cache(maxsize=256)
def are_packed(layout: Layout, band: Band, recipe: Fp8Recipe | None) -> bool:
    """Whether "gather" puts runs together: the same on all ranks.

    Args:
        layout: who holds what.
        band: what a query sees.
        recipe: how keys and values are quantised before they travel.
    """
    return has_many_messages(layout, band, recipe) and can_be_packed(recipe)


def can_be_packed(recipe: Fp8Recipe | None) -> bool:
    """Whether rows can be put together one by one: no two of them share a scale."""
    return recipe is None or recipe.granularity == "token"


def has_many_messages(layout: Layout, band: Band, recipe: Fp8Recipe | None) -> bool:
    """Whether a rank would post too many messages at a time, if each run was one."""
    of_a_run = 1 if recipe is None else 2
    return any(
        of_a_run * sum(map(len, plan.fetch)) > MOST_MESSAGES
        for plan in steps.gathering(layout, band)
    )


def of_peers(messages: Iterable[Message]) -> list[Message]:
    """One message for each rank, of as many rows; where they lie is left open."""
    tokens: dict[int, int] = {}
    for peer, (begin, end), _ in messages:
        tokens[peer] = tokens.get(peer, 0) + end - begin
    return [Message(peer, (0, number), peer) for peer, number in sorted(tokens.items())]
