"""Each method's schedule with its bytes, rank by rank: what `explain` and the benchmark show.

A turn is what a rank does from one wait to the next: calls, and messages that move meanwhile.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from numflash.distributed import steps
from numflash.distributed.layouts import Layout
from numflash.distributed.packing import are_packed, of_peers
from numflash.distributed.pairs import Band, Calls
from numflash.distributed.sizes import Sizes, gathered_at_once, shares_of
from numflash.distributed.steps import Exchange


class Turn(NamedTuple):
    """What a rank does between two waits.

    Attributes:
        what: it is, in words.
        calls: of attention, each on `heads` query heads; they run while the messages move.
        heads: query heads of each call.
        sent, received: bytes of the messages.
        messages: runs of tokens that the rank sends and receives.
        scores: visible scores of all batch entries and heads.
    """

    what: str
    calls: Calls
    heads: int
    sent: int
    received: int
    messages: int
    scores: int


Turns = tuple[Turn, ...]
"""Of one rank; of each rank there are as many."""


class _Traffic(NamedTuple):
    """Bytes and messages of a turn."""

    sent: int = 0
    received: int = 0
    messages: int = 0

    def __add__(self, other: "_Traffic") -> "_Traffic":
        return _Traffic(*map(sum, zip(self, other, strict=True)))


_NOTHING = _Traffic()


def of_ring(
    layout: Layout,
    band: Band,
    sizes: Sizes,
    *,
    by_position: bool = False,
    travels: str | None = None,
) -> list[Turns]:
    """The turns of a ring: one for each step, and in a backward one for what goes home last.

    Args:
        layout: who holds what.
        band: what a query sees.
        sizes: of one token.
        by_position: as of `pairs.calls_of`.
        travels: None for the forward, else "keys" or "queries".
    """
    ring = steps.ring_of_queries if travels == "queries" else steps.ring
    operands = sizes.queries if travels == "queries" else sizes.keys
    sums = sizes.query_sums if travels == "queries" else sizes.key_sums

    def turns_of(plan: tuple[steps.Step, ...]) -> Turns:
        found, given = [], _NOTHING
        for number, step in enumerate(plan):
            traffic = given + _traffic(step.fetch, operands)
            what = f"step {number + 1} of {len(plan)}"
            found.append(_turn(what, step.calls, sizes, traffic))
            given = _traffic(step.give, sums) if travels else _NOTHING
        if travels and len(plan) > 1:
            found.append(_turn("gradients come home", Calls(), sizes, given))
        return tuple(found)

    return [turns_of(plan) for plan in ring(layout, band, by_position)]


def of_gather(
    layout: Layout,
    band: Band,
    sizes: Sizes,
    *,
    max_workspace: int | None = None,
    backward: bool = False,
) -> list[Turns]:
    """The turns of gathering: the first keys, one for each group of heads, the last gradients."""
    at_once = gathered_at_once(layout, sizes, max_workspace, backward=backward)
    plans = steps.gathering(layout, band)
    is_needed = any(plan.fetch or plan.give for plan in plans)
    if not is_needed:
        at_once = sizes.heads_kv
    group, groups = sizes.of_heads(at_once), sizes.heads_kv // at_once
    if are_packed(layout, band, sizes.recipe):
        sides = [[Exchange(*map(of_peers, x)) for x in (p.fetch, p.give)] for p in plans]
        plans = [p._replace(fetch=x, give=y) for p, (x, y) in zip(plans, sides, strict=True)]

    def turns_of(plan: steps.Gathering) -> Turns:
        fetch = _traffic(plan.fetch, group.keys)
        give = _traffic(plan.give, group.key_sums) if backward else _NOTHING
        found = [_turn("first keys and values", Calls(), group, fetch)] if is_needed else []
        for number in range(groups):
            traffic = fetch if number + 1 < groups else _NOTHING
            traffic += give if number else _NOTHING
            first = number * at_once
            what = f"key-value heads {first} to {first + at_once - 1}"
            found.append(_turn(what, plan.calls, group, traffic))
        if backward and is_needed:
            found.append(_turn("last gradients come home", Calls(), group, give))
        return tuple(found)

    return [turns_of(plan) for plan in plans]


def of_heads(
    layout: Layout, sizes: Sizes, size: int, across: Sequence[Turns], *, backward: bool = False
) -> list[Turns]:
    """The turns of a method whose ranks change tokens for heads before it, and back after it.

    Args:
        layout: who holds what.
        sizes: of one token, of all heads.
        size: ranks of a group.
        across: for each group the turns of the method that follows.
        backward: whether of the backward.
    """
    mine = share_of(sizes, size)

    def there(tokens: int) -> int:
        of_results = mine.out(tokens, mine.itemsize) + 2 * mine.rows(tokens)
        return mine.q(tokens) + mine.keys(tokens) + of_results * backward

    def back(tokens: int) -> int:
        if backward:
            return mine.query_sums(tokens) + mine.key_sums(tokens)
        return mine.out(tokens, mine.itemsize) + mine.rows(tokens)

    found = []
    for rank, plan in enumerate(steps.regrouping(layout, size)):
        first = _turn("heads for tokens", Calls(), mine, _traffic(plan.there, there))
        last = _turn("tokens for heads", Calls(), mine, _traffic(plan.back, back))
        found.append((first, *across[rank // size], last))
    return found


def share_of(sizes: Sizes, size: int) -> Sizes:
    """The sizes of a rank's heads in a group of `size`: all its ranks have as many."""
    heads = shares_of(size, sizes.heads_q, sizes.heads_kv)[0]
    heads_q, heads_kv = (part.stop - part.start for part in heads)
    return sizes._replace(heads_q=heads_q, heads_kv=heads_kv)


def _turn(what: str, calls: Calls, sizes: Sizes, traffic: _Traffic) -> Turn:
    scores = sizes.batch * sizes.heads_q * sum(call.scores for call in calls)
    return Turn(what, calls, sizes.heads_q, *traffic, scores)


def _traffic(exchange: Exchange, size: Callable[[int], int]) -> _Traffic:
    """Bytes of an exchange in which each token has as many."""
    sent, received = (sum(size(end - begin) for _, (begin, end), _ in side) for side in exchange)
    return _Traffic(sent, received, sum(map(len, exchange)))
