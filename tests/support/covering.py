"""How much runs: of all tests some, and of large tables of cases covering sets.

| run | which |
|---|---|
| `make test` | of each table two cases, of faults in kernels one: they test the tests |
| NUMFLASH_TEST_ALL=1, as CI does | all tests, covering sets; simulated ones to 20 rows: an hour |
| NUMFLASH_TEST_FULL=1 | whole tables: hours |

A fault that no single choice shows takes two that meet: a mask and an implementation, a feature
and a dtype. `covering` keeps of a table rows in which each such pair occurs, or each choice.
`some` and `thorough` say which tests are left to CI, `each_choice` of axes that are crossed, and
`thinned` of long tables.
"""

from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush
from itertools import chain, combinations
from typing import TypeVar

import pytest

from numflash.runtime.switches import is_on

FULL = is_on("NUMFLASH_TEST_FULL")
"""Whether tests run whole tables."""

ALL = FULL or is_on("NUMFLASH_TEST_ALL")
"""Whether all tests run."""

thorough = pytest.mark.thorough
"""On a test that runs only where all do: `tests/conftest.py` deselects it elsewhere."""

whole = pytest.mark.whole
"""On a test whose table is chosen to cover all kinds, and has each row wherever it runs."""

Row = TypeVar("Row")


def some(rows: Iterable[Row], *kept: Row, every: int = 0, all_rows: bool = ALL) -> list[Row]:
    """All rows where all tests run; elsewhere those that are named, or of so many the first.

    Args:
        rows: cases of a test, or their names.
        kept: which of them always run, each of which must be there.
        every: n to keep each n-th, from the first on.
        all_rows: whether to return all of them.
    """
    rows = list(rows)
    if unknown := [row for row in kept if row not in rows]:
        raise ValueError(f"kept must be among the rows, and {unknown} are not")
    if all_rows:
        return rows
    return [row for n, row in enumerate(rows) if row in kept or (every and n % every == 0)]


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
    # What a row gains only falls: who is best by an old figure is looked at again.
    best = [(-len(of_row) / c, i) for i, (of_row, c) in enumerate(zip(pairs, costs, strict=True))]
    heapify(best)
    while missing:
        _, i = heappop(best)
        found = -len(pairs[i] & missing) / costs[i], i
        if best and found > best[0]:
            heappush(best, found)
            continue
        chosen.append(i)
        missing -= pairs[i]
    # What was taken early may have become needless.
    for i in sorted(chosen, key=lambda i: -costs[i]):
        rest = set().union(*(pairs[j] for j in chosen if j != i))
        if pairs[i] <= rest:
            chosen.remove(i)
    return [rows[i] for i in sorted(chosen)]


def each_choice(items: Iterable) -> list:
    """Of collected tests those that have each argument of each axis once, in their order.

    A test with `pytest.mark.parametrize` twice, or with a fixture that has parameters, would run
    for each pair of them. One whose arguments are rows of one table keeps them all.
    """
    items, by_test = list(items), {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)

    def choices(item) -> tuple:
        # The name of its row in each `parametrize`; `indices` tells no two rows from axes.
        return tuple(item.callspec._idlist) if hasattr(item, "callspec") else ()

    kept = set()
    for of_test in by_test.values():
        several = len(of_test) > 1
        of_test = covering(of_test, choices, together=1, full=False) if several else of_test
        kept.update(map(id, of_test))
    return [item for item in items if id(item) in kept]


def thinned(items: Iterable, most: int = 2, most_faults: int | None = 1) -> list:
    """Of collected tests at most so many of each function, spread evenly, in their order.

    Tests that are marked `whole` keep all.

    Args:
        items: what was collected.
        most: of a function.
        most_faults: of one in a module that puts faults into kernels; None for all.
    """
    items, by_test = list(items), {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = set()
    for of_test in by_test.values():
        limit = most_faults if _breaks_kernels(of_test[0]) else most
        if of_test[0].get_closest_marker("whole") is None and limit and len(of_test) > limit:
            kept = {len(of_test) * n // limit for n in range(limit)}
            left_out.update(id(item) for n, item in enumerate(of_test) if n not in kept)
    return [item for item in items if id(item) not in left_out]


def _breaks_kernels(item) -> bool:
    of_faults = "tests.support.faults"
    return any(getattr(x, "__module__", "") == of_faults for x in vars(item.module).values())


def meetings(labels: tuple, together: int = 2) -> set[tuple]:
    """All that meet of the labels of a row, up to so many, each with its axis."""
    named = [(axis, label) for axis, label in enumerate(labels) if label is not None]
    return set(chain.from_iterable(combinations(named, n) for n in range(1, together + 1)))
