"""Attention by heads: ranks change tokens of all heads for heads of all tokens, and back.

Within a group of neighbouring ranks each gets some query heads of all the group's tokens, and the
key-value heads that these use, which are never repeated. Another method computes across groups;
where all ranks are one group, it has one rank.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numflash.distributed import steps
from numflash.distributed.communicators import Communicator
from numflash.distributed.local_calls import delta_of
from numflash.distributed.problem import Gradients, Method, Problem
from numflash.distributed.sizes import Share, shares_of
from numflash.distributed.steps import Regrouping
from numflash.distributed.wire import Wire

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

    def shares(self, heads_q: int, heads_kv: int) -> list[Share]:
        """The heads of each rank of the group."""
        return self.once("shares", lambda: shares_of(self.within.size, heads_q, heads_kv))


def forward(
    problem: RegroupedProblem, q, k, v, first_head: int = 0, *, float32: bool
) -> tuple[Any, Any]:
    """See `Method.forward`."""
    arrays, shares = problem.arrays, problem.shares(q.shape[2], k.shape[2])
    mine = shares[problem.within.rank]
    # One after the other: what is sent of one is free before the other needs room.
    (queries,) = _to_heads(problem, [q.swapaxes(0, 1)], "queries")
    keys, values = _keys_to_heads(problem, k, v, shares)
    operands = queries.swapaxes(0, 1), keys, values, first_head + mine.q.start
    found = problem.method.forward(problem.across, *operands, float32=float32)
    del queries, keys, values, operands
    batch, tokens, heads_q, _ = q.shape
    computed = [found[0].swapaxes(0, 1), found[1].swapaxes(1, 2).swapaxes(0, 1)]
    del found
    arrived = _to_tokens(problem, computed, "results")
    out = arrays.empty((batch, tokens, heads_q, v.shape[3]), arrays.dtype_of(arrived[0]))
    lse = arrays.empty((batch, heads_q, tokens), "float32")
    for whole, part in zip((out.swapaxes(0, 1), _of_rows(lse)), arrived, strict=True):
        _by_rank(whole, problem.within.size)[...] = part
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
    shares = problem.shares(q.shape[2], k.shape[2])
    mine = shares[problem.within.rank]
    delta = _of_rows(delta_of(arrays, operands))
    of_rows = [q.swapaxes(0, 1), dout.swapaxes(0, 1), _of_rows(operands["lse"]), delta]
    queries, of_out, lse, delta = _to_heads(problem, of_rows, "queries and their gradients")
    del of_rows
    keys, values = _keys_to_heads(problem, k, v, shares)
    of_heads = {
        "q": queries.swapaxes(0, 1),
        "dout": of_out.swapaxes(0, 1),
        "lse": arrays.contiguous(lse.swapaxes(0, 1).swapaxes(1, 2)),
        "delta": delta.swapaxes(0, 1).swapaxes(1, 2),
        "k": keys,
        "v": values,
    }
    del queries, of_out, lse, delta, keys, values
    first = first_head + mine.q.start
    found = problem.method.backward(problem.across, of_heads, first, wrt, **problem.more)
    del of_heads
    names = [name for name in _OF_TOKENS if name in wrt]
    computed = [found.pop(name).swapaxes(0, 1) for name in names]
    arrived = _to_tokens(problem, computed, "gradients")
    for name, parts in zip(names, arrived, strict=True):
        found[name] = arrays.empty(tuple(operands[name].shape), "float32")
        _sum(found[name].swapaxes(0, 1), parts)
    return found


def _of_rows(x):
    """(batch, heads, tokens) as (tokens, batch, heads)."""
    return x.swapaxes(1, 2).swapaxes(0, 1)


def _by_rank(x, ranks: int):
    """(tokens, batch, heads, ...) as (ranks, tokens, batch, heads of a rank, ...): a view."""
    tokens, batch, heads, *others = x.shape
    of_ranks = x.reshape((tokens, batch, ranks, heads // ranks, *others))
    return of_ranks.swapaxes(1, 2).swapaxes(0, 1)


def _sum(whole, parts) -> None:
    """Put what ranks have computed together, in their order.

    Args:
        whole: (tokens, batch, heads, head_dim) of this rank, float32, to be filled.
        parts: (ranks, tokens, batch, heads of a rank, head_dim). Neighbouring ranks may have a
            share of the same head each.
    """
    ranks, _, _, each, _ = parts.shape
    sharing = ranks * each // whole.shape[2]
    of_heads = _by_rank(whole, ranks // sharing)
    of_heads[...] = parts[::sharing]
    for n in range(1, sharing):
        of_heads += parts[n::sharing]


def _to_heads(problem: RegroupedProblem, wholes: list, what: str) -> list:
    """This rank's query heads of the group's tokens.

    Args:
        problem: this rank's.
        wholes: (tokens, batch, heads_q, ...) of this rank each.
        what: they are.
    """
    arrays, plan, within = problem.arrays, problem.plan, problem.within
    by_rank = [arrays.contiguous(_by_rank(x, within.size)) for x in wholes]
    found = [arrays.empty((plan.tokens, *x.shape[2:]), arrays.dtype_of(x)) for x in by_rank]
    wait = _post_rows(problem, by_rank, found, what, back=False)
    for whole, parts in zip(found, by_rank, strict=True):
        for rows, place in plan.own:
            whole[slice(*place)] = parts[within.rank, slice(*rows)]
    wait()
    return found


def _keys_to_heads(problem: RegroupedProblem, k, v, shares: list[Share]) -> tuple[Any, Any]:
    """This rank's key-value heads of the group's tokens, (batch, tokens, heads, head_dim)."""
    plan, me = problem.plan, problem.within.rank
    heads = shares[me].kv
    wire = problem.wire_of(k[:, :, heads], v[:, :, heads])
    each = _rows_of_a_rank(k.shape[1], wire)
    buffer, sent = wire.new(plan.tokens), wire.new(len(shares) * each)
    for rank, share in enumerate(shares):
        if rank != me:
            wire.fill(sent, rank * each, k[:, :, share.kv], v[:, :, share.kv])
    for rows, place in plan.own:
        own = slice(None), slice(*rows), heads
        wire.fill(buffer, place[0], k[own], v[own])
    if plan.there:
        here, there = problem.once("spans of keys", lambda: _spans_of_keys(problem, wire))
        sends = [(sent.memory[span], peer) for span, peer in here]
        receives = [(buffer.memory[span], peer) for span, peer in there]
        _post(problem, sends, receives, "heads for tokens", "keys and values")()
    return wire.unpack(buffer)


def _spans_of_keys(problem: RegroupedProblem, wire: Wire) -> list[list[tuple[slice, int]]]:
    """(bytes of a buffer, the other rank) of each message of keys: sent, and received."""
    plan, each = problem.plan, _rows_of_a_rank(problem.tokens, wire)
    here, there = plan.there
    of_peers = [(m.peer, [m.peer * each + row for row in m.rows]) for m in here]
    of_group = [(m.peer, m.rows) for m in there]
    sizes = problem.within.size * each, plan.tokens
    return [
        [(span, peer) for peer, rows in side for span in wire.spans(tokens, *rows)]
        for side, tokens in zip((of_peers, of_group), sizes, strict=True)
    ]


def _rows_of_a_rank(tokens: int, wire: Wire) -> int:
    """Of a buffer in which each rank of the group has rows for this rank's tokens."""
    return -(-tokens // wire.tokens_per_scale) * wire.tokens_per_scale


def _to_tokens(problem: RegroupedProblem, computed: list, what: str) -> list:
    """What the ranks of the group have computed for this rank's tokens.

    Args:
        problem: this rank's.
        computed: (tokens of the group, batch, heads, ...) of this rank each; contiguous after it.
        what: it is.

    Returns:
        for each array (ranks, tokens, batch, heads, ...).
    """
    arrays, plan, within = problem.arrays, problem.plan, problem.within
    for n, x in enumerate(computed):
        computed[n] = arrays.contiguous(x)
    shape = within.size, problem.tokens
    found = [arrays.empty((*shape, *x.shape[1:]), arrays.dtype_of(x)) for x in computed]
    wait = _post_rows(problem, found, computed, what, back=True)
    for parts, x in zip(found, computed, strict=True):
        for rows, place in plan.own:
            parts[within.rank, slice(*rows)] = x[slice(*place)]
    wait()
    return found


def _post_rows(
    problem: RegroupedProblem, by_rank: list, wholes: list, what: str, *, back: bool
) -> Callable[[], None]:
    """Post rows of arrays; the wait for them.

    Args:
        problem: this rank's.
        by_rank: for each rank of the group its heads of this rank's tokens, contiguous; they are
            sent, or with `back` filled.
        wholes: of the group's tokens, contiguous; they are filled, or sent.
        what: they are.
        back: which way.
    """
    plan, as_bytes = problem.plan, problem.arrays.as_bytes
    if not plan.there:
        return _nothing
    widths = tuple([x[0].nbytes for x in wholes])
    planned = problem.once(("spans", widths), lambda: _spans_of_rows(problem, widths))
    flat = [list(map(as_bytes, arrays)) for arrays in (by_rank, wholes)]
    here, there = (
        [(memory[n][span], peer) for n, span, peer in side]
        for memory, side in zip(flat, planned, strict=True)
    )
    if back:
        return _post(problem, there, here, "tokens for heads", what)
    return _post(problem, here, there, "heads for tokens", what)


def _spans_of_rows(
    problem: RegroupedProblem, widths: tuple[int, ...]
) -> list[list[tuple[int, slice, int]]]:
    """(array, its bytes, the other rank) of each message: by rank, and of the group's tokens.

    A token has so many bytes in each array.
    """
    here, there = problem.plan.there
    tokens = problem.tokens
    of_peers = [(m.peer, [m.peer * tokens + row for row in m.rows]) for m in here]
    of_group = [(m.peer, m.rows) for m in there]
    return [
        [
            (n, slice(begin * width, end * width), peer)
            for peer, (begin, end) in side
            for n, width in enumerate(widths)
        ]
        for side in (of_peers, of_group)
    ]


def _post(
    problem: RegroupedProblem, sends: list, receives: list, how: str, what: str
) -> Callable[[], None]:
    name = f"{how} within a group of {problem.within.size}, {what}"
    return problem.within.exchange(sends, receives, name)


def _nothing() -> None:
    pass
