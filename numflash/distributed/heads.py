"""Attention by heads: ranks change tokens of all heads for heads of all tokens, and back.

Within a group of neighbouring ranks each gets some query heads of all the group's tokens, and the
key-value heads that these use, which are never repeated. Another method computes across groups;
where all ranks are one group, it has one rank.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from numflash.distributed import steps
from numflash.distributed.arrays import Arrays, by_rank
from numflash.distributed.communicators import Communicator
from numflash.distributed.local_calls import delta_of
from numflash.distributed.problem import Gradients, Method, Problem
from numflash.distributed.sizes import Share, shares_of
from numflash.distributed.steps import Regrouping
from numflash.distributed.wire import Wire, rows_of_a_rank
from numflash.runtime.views import numpy_dtype

_OF_TOKENS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class RegroupedProblem(Problem):
    """A problem whose ranks change heads for tokens.

    Attributes:
        within: the ranks of this rank's group, which are neighbours.
        across: the problem of the groups, of each one rank: the ranks with this one's number in
            their groups.
        method: that computes it.
        more: options of the method's backward.
    """

    within: Communicator
    across: Problem
    method: Method
    more: dict[str, Any]

    def with_options(self, options: dict[str, Any]) -> "RegroupedProblem":
        """See `Problem.with_options`."""
        across = self.across.with_options(options)
        return replace(self, calls=across.calls, across=across)

    @property
    def plan(self) -> Regrouping:
        """What this rank exchanges with its group."""
        return self.once(
            Regrouping, lambda: steps.regrouping(self.layout, self.within.size)[self.rank]
        )

    def share(self, heads_q: int, heads_kv: int) -> Share:
        """This rank's heads."""
        within = self.within
        return self.once("share", lambda: shares_of(within.size, heads_q, heads_kv)[within.rank])


def forward(
    problem: RegroupedProblem, q, k, v, first_head: int = 0, *, float32: bool
) -> tuple[Any, Any]:
    """See `Method.forward`."""
    arrays, mine = problem.arrays, problem.share(q.shape[2], k.shape[2])
    # One after the other: what is sent of one is free before the other needs room.
    ((queries,),) = _to_heads(problem, [[q]], "queries")
    keys, values = _keys_to_heads(problem, k, v, mine)
    operands = queries.swapaxes(0, 1), keys, values, first_head + mine.q.start
    found = problem.method.forward(problem.across, *operands, float32=float32)
    del queries, keys, values, operands
    batch, tokens, heads_q, _ = q.shape
    computed = [[found[0].swapaxes(0, 1)], [_of_rows(found[1]).swapaxes(0, 1)]]
    del found
    (results,), (of_rows,) = _to_tokens(problem, computed, "results")
    out = arrays.empty((batch, tokens, heads_q, v.shape[3]), arrays.dtype_of(results))
    lse = arrays.empty((batch, heads_q, tokens), "float32")
    ranks = problem.within.size
    by_rank(out, ranks)[...] = results
    by_rank(_of_rows(lse), ranks)[...] = of_rows
    return out, lse


def backward(
    problem: RegroupedProblem,
    operands: dict[str, Any],
    first_head: int = 0,
    wrt: tuple[str, ...] = _OF_TOKENS,
) -> Gradients:
    """See `Method.backward`."""
    arrays = problem.arrays
    dout, q, k, v = (operands[name] for name in ("dout", *_OF_TOKENS))
    mine = problem.share(q.shape[2], k.shape[2])
    of_rows = [_of_rows(operands["lse"]), _of_rows(delta_of(arrays, operands))]
    found = _to_heads(problem, [[q, dout], of_rows], "queries and their gradients")
    del of_rows
    (queries, of_out), (lse, delta) = found
    of_heads = {
        "q": queries.swapaxes(0, 1),
        "dout": of_out.swapaxes(0, 1),
        "lse": lse[..., 0].swapaxes(0, 1).swapaxes(1, 2),
        "delta": delta[..., 0].swapaxes(0, 1).swapaxes(1, 2),
    }
    of_heads["k"], of_heads["v"] = _keys_to_heads(problem, k, v, mine)
    del found, queries, of_out, lse, delta
    first = first_head + mine.q.start
    found = problem.method.backward(problem.across, of_heads, first, wrt, **problem.more)
    del of_heads
    names = [[x for x in together if x in wrt] for together in (("q",), ("k", "v"))]
    names = [together for together in names if together]
    computed = [[found.pop(name).swapaxes(0, 1) for name in together] for together in names]
    arrived = _to_tokens(problem, computed, "gradients")
    for together, parts in zip(names, arrived, strict=True):
        for name, of_ranks in zip(together, parts, strict=True):
            found[name] = arrays.empty(tuple(operands[name].shape), "float32")
            _sum(found[name], of_ranks)
    return found


def _of_rows(x):
    """(batch, heads, tokens) as (batch, tokens, heads, 1)."""
    return x.swapaxes(1, 2)[..., None]


def _sum(whole, parts) -> None:
    """Put what ranks have computed together, in their order.

    Args:
        whole: (batch, tokens, heads, head_dim) of this rank, float32, to be filled.
        parts: (ranks, tokens, batch, heads of a rank, head_dim). Neighbouring ranks may have a
            share of the same head each.
    """
    ranks, _, _, each, _ = parts.shape
    sharing = ranks * each // whole.shape[2]
    of_heads = by_rank(whole, ranks // sharing)
    of_heads[...] = parts[::sharing]
    for n in range(1, sharing):
        of_heads += parts[n::sharing]


def _to_heads(problem: RegroupedProblem, wholes: list[list], what: str) -> list[list]:
    """This rank's query heads of the group's tokens.

    Args:
        problem: this rank's.
        wholes: (batch, tokens, heads_q, columns) of this rank. Those of one list have one dtype
            and travel side by side.
        what: they are; as often as it is the same, so are the shapes.

    Returns:
        of each (tokens of the group, batch, heads, columns).
    """
    arrays, ranks = problem.arrays, problem.within.size
    parts = [[by_rank(x, ranks) for x in each] for each in wholes]
    trip = problem.once(what, lambda: _trip_of(problem, parts))
    room = ranks, problem.tokens
    here = [x.joined(arrays, room, each) for x, each in zip(trip.kinds, parts, strict=True)]
    there = [arrays.empty((problem.plan.tokens, *x.row), x.dtype) for x in trip.kinds]
    memory = [list(map(arrays.as_bytes, x)) for x in (here, there)]
    _moved(problem, trip.moves, *memory, "heads for tokens", what)
    return trip.apart(there)


def _keys_to_heads(problem: RegroupedProblem, k, v, share: Share) -> tuple[Any, Any]:
    """This rank's key-value heads of the group's tokens, (batch, tokens, heads, head_dim)."""
    wire = problem.wire_of(k[:, :, share.kv], v[:, :, share.kv])
    ranks = problem.within.size
    sent = wire.dealt(ranks, k, v)
    buffer = wire.new(problem.plan.tokens)
    moves = problem.once("keys", lambda: _moves_of_keys(problem, wire))
    memory = [sent.memory], [buffer.memory]
    _moved(problem, moves, *memory, "heads for tokens", "keys and values")
    return wire.unpack(buffer)


def _to_tokens(problem: RegroupedProblem, computed: list[list], what: str) -> list[list]:
    """What the ranks of the group have computed for this rank's tokens.

    Args:
        problem: this rank's.
        computed: (tokens of the group, batch, heads, columns) of this rank, emptied. Those of one
            list have one dtype and travel side by side.
        what: it is.

    Returns:
        for each array (ranks, tokens, batch, heads, columns).
    """
    arrays = problem.arrays
    trip = problem.once(what, lambda: _trip_of(problem, computed))
    there = []
    for kind, each in zip(trip.kinds, computed, strict=True):
        there.append(kind.joined(arrays, (problem.plan.tokens,), each))
        each.clear()
    room = problem.within.size, problem.tokens
    here = [arrays.empty((*room, *x.row), x.dtype) for x in trip.kinds]
    memory = [list(map(arrays.as_bytes, x)) for x in (here, there)]
    _moved(problem, trip.moves, *memory, "tokens for heads", what, back=True)
    return trip.apart(here)


class _Kind(NamedTuple):
    """Arrays that travel side by side, in numbers.

    Attributes:
        row: (batch, heads, columns) of a token.
        dtype: of all of them.
        columns: of each.
    """

    row: tuple[int, int, int]
    dtype: str
    columns: list[slice]

    @classmethod
    def of(cls, arrays: Arrays, parts: list) -> "_Kind":
        """Of (..., batch, heads, columns) arrays."""
        ends = list(accumulate((x.shape[-1] for x in parts), initial=0))
        row = *parts[0].shape[-3:-1], ends[-1]
        return cls(row, arrays.dtype_of(parts[0]), [slice(*at) for at in pairwise(ends)])

    def joined(self, arrays: Arrays, room: tuple[int, ...], parts: list):
        """Them, contiguous, (*room, *row): a copy, unless one that is so is alone."""
        if len(parts) == 1:
            return arrays.contiguous(parts[0])
        whole = arrays.empty((*room, *self.row), self.dtype)
        for columns, x in zip(self.columns, parts, strict=True):
            whole[..., columns] = x
        return whole


class _Moves(NamedTuple):
    """Rows that change places between arrays by rank and arrays of the group's tokens.

    Arrays are numbered; their memory is bytes.

    Attributes:
        here: (array by rank, its bytes, the other rank) of each message.
        there: (array of the group's tokens, its bytes, the other rank).
        own: (array, its bytes by rank, its bytes of the group's tokens) of what stays here.
    """

    here: list[tuple[int, slice, int]]
    there: list[tuple[int, slice, int]]
    own: list[tuple[int, slice, slice]]


class _Trip(NamedTuple):
    """What travels together, and how."""

    kinds: list[_Kind]
    moves: _Moves

    def apart(self, joined: list) -> list[list]:
        """Views of what `joined` has put side by side."""
        return [
            [whole[..., columns] for columns in kind.columns]
            for kind, whole in zip(self.kinds, joined, strict=True)
        ]


_Spans = Callable[[int, int], list[tuple[int, slice]]]
"""(array, its bytes) that rows begin to end are."""


def _moves(problem: RegroupedProblem, each: int, here: _Spans, there: _Spans) -> _Moves:
    """Of arrays in which each rank of the group has so many rows."""
    plan, me = problem.plan, problem.within.rank

    def of_peer(peer: int, rows: tuple[int, int]) -> list[tuple[int, slice]]:
        return here(*(peer * each + row for row in rows))

    return _Moves(
        [(n, at, m.peer) for m in plan.there.sends for n, at in of_peer(m.peer, m.rows)],
        [(n, at, m.peer) for m in plan.there.receives for n, at in there(*m.rows)],
        [
            (n, at, place)
            for rows, places in plan.own
            for (n, at), (_, place) in zip(of_peer(me, rows), there(*places), strict=True)
        ],
    )


def _trip_of(problem: RegroupedProblem, wholes: list[list]) -> _Trip:
    """Of (..., batch, heads of a rank, columns) arrays."""
    kinds = [_Kind.of(problem.arrays, each) for each in wholes]
    widths = [math.prod(kind.row) * numpy_dtype(kind.dtype).itemsize for kind in kinds]

    def spans(begin: int, end: int) -> list[tuple[int, slice]]:
        return [(n, slice(begin * width, end * width)) for n, width in enumerate(widths)]

    return _Trip(kinds, _moves(problem, problem.tokens, spans, spans))


def _moves_of_keys(problem: RegroupedProblem, wire: Wire) -> _Moves:
    """Of buffers of keys and values."""
    each, tokens = rows_of_a_rank(wire, problem.tokens), problem.plan.tokens

    def spans_in(tokens: int) -> _Spans:
        return lambda begin, end: [(0, span) for span in wire.spans(tokens, begin, end)]

    return _moves(problem, each, spans_in(problem.within.size * each), spans_in(tokens))


def _moved(
    problem: RegroupedProblem,
    moves: _Moves,
    here: list,
    there: list,
    how: str,
    what: str,
    *,
    back: bool = False,
) -> None:
    """Move rows.

    Args:
        problem: this rank's.
        moves: which.
        here: the memory of arrays by rank, flat, of bytes: sent, or with `back` filled.
        there: that of arrays of the group's tokens: filled, or with `back` sent.
        how, what: they move, for errors.
        back: which way.
    """
    ends = [(here[n][at], peer) for n, at, peer in moves.here]
    others = [(there[n][at], peer) for n, at, peer in moves.there]
    sends, receives = (others, ends) if back else (ends, others)
    wait = _nothing
    if ends or others:
        name = f"{how} within a group of {problem.within.size}, {what}"
        wait = problem.within.exchange(sends, receives, name)
    for n, at, place in moves.own:
        if back:
            here[n][at] = there[n][place]
        else:
            there[n][place] = here[n][at]
    wait()


def _nothing() -> None:
    pass
