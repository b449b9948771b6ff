"""Covering sets: of a large table of cases some, in which all that counts still occurs.

A fault that no single choice shows takes two that meet: a mask and an implementation, a feature
and a dtype. `covering` keeps of a table rows in which each such pair occurs, or each choice; the
whole table runs with NUMFLASH_TEST_FULL=1.
"""

from collections.abc import Callable, Hashable, Iterable
from itertools import chain, combinations
from typing import TypeVar

from numflash.runtime.switches import is_on

FULL = is_on("NUMFLASH_TEST_FULL")
"""Whether tests run whole tables."""

Row = TypeVar("Row")


def covering(
    rows: Iterable[Row],
    labels: Callable[[Row], tuple[Hashable, ...]],
    together: int = 2,
    cost: Callable[[Row], float] = lambda row: 1.0,
    full: bool = FULL,
) -> list[Row]:
    """Some of `rows`, in their order, with every pair of labels that any row has.

    One after the other the row is taken that has the most pairs still missing for its cost; of
    equals the first. So the choice is the same in every run.

    Args:
        rows: the table.
        labels: what a row says along each axis. None is no label.
        together: how many labels must meet: 2 for pairs, 1 where each must occur.
        cost: of running a row, in any unit.
        full: whether to return all rows.
    """
    rows = list(rows)
    if full:
        return rows
    pairs = [meetings(labels(row), together) for row in rows]
    missing, costs, chosen = set().union(*pairs), [cost(row) for row in rows], []
    while missing:
        gains = [len(of_row & missing) / c for of_row, c in zip(pairs, costs, strict=True)]
        best = max(range(len(rows)), key=lambda i: (gains[i], -i))
        chosen.append(best)
        missing -= pairs[best]
    # What was taken early may have become needless.
    for i in sorted(chosen, key=lambda i: -costs[i]):
        rest = set().union(*(pairs[j] for j in chosen if j != i))
        if pairs[i] <= rest:
            chosen.remove(i)
    return [rows[i] for i in sorted(chosen)]


def meetings(labels: tuple, together: int = 2) -> set[tuple]:
    """All that meet of the labels of a row, up to so many, each with its axis."""
    named = [(axis, label) for axis, label in enumerate(labels) if label is not None]
    return set(chain.from_iterable(combinations(named, n) for n in range(1, together + 1)))
