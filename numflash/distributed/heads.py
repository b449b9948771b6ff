"""Attention by heads: ranks change tokens of all heads for heads of all tokens, and back.

Within a group of neighbouring ranks each gets some query heads of all the group's tokens, and the
key-value heads that these use, which are never repeated. Another method computes across groups;
where all ranks are one group, it has one rank.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from numflash.distributed import steps
from numflash.distributed.communicators import Communicator
from numflash.distributed.local_calls import delta_of
from numflash.distributed.problem import Gradients, Method, Problem
from numflash.distributed.sizes import Share, shares_of
from numflash.distributed.steps import Message, Regrouping

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
    (queries,) = _to_heads(problem, [q.swapaxes(0, 1)], shares, "queries")
    keys, values = _keys_to_heads(problem, k, v, shares)
    operands = queries.swapaxes(0, 1), keys, values, first_head + mine.q.start
    found = problem.method.forward(problem.across, *operands, float32=float32)
    del queries, keys, values, operands
    batch, tokens, heads_q, _ = q.shape
    out = arrays.empty((batch, tokens, heads_q, v.shape[3]), arrays.dtype_of(found[0]))
    lse = arrays.empty((batch, heads_q, tokens), "float32")
    computed = [found[0].swapaxes(0, 1), found[1].swapaxes(1, 2).swapaxes(0, 1)]
    del found
    of_tokens = out.swapaxes(0, 1), lse.swapaxes(1, 2).swapaxes(0, 1)
    for rank, parts in _to_tokens(problem, computed, "results"):
        for whole, (rows, part) in zip(of_tokens, parts, strict=True):
            whole[slice(*rows), :, shares[rank].q] = part
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
    of_rows = [x.swapaxes(0, 1) for x in (q, dout)]
    of_rows += [
        x.swapaxes(1, 2).swapaxes(0, 1) for x in (operands["lse"], delta_of(arrays, operands))
    ]
    queries, of_out, lse, delta = _to_heads(
        problem, of_rows, shares, "queries and their gradients"
    )
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
    sums = {
        name: arrays.zeros(tuple(x.shape), "float32")
        for name, x in (("q", q), ("k", k), ("v", v))
        if name in names
    }
    # By rank: several may have a share of a key-value head.
    for rank, parts in _to_tokens(problem, computed, "gradients"):
        for name, (rows, part) in zip(names, parts, strict=True):
            heads = shares[rank].q if name == "q" else shares[rank].kv
            whole = sums[name].swapaxes(0, 1)[slice(*rows), :, heads]
            whole += part
    return found | sums


def _to_heads(problem: RegroupedProblem, wholes: list, shares: list[Share], what: str) -> list:
    """This rank's query heads of the group's tokens.

    Args:
        problem: this rank's.
        wholes: (tokens, batch, heads_q, ...) of this rank each.
        shares: of the ranks.
        what: they are.
    """
    arrays, plan, me = problem.arrays, problem.plan, problem.within.rank

    owns = [x[:, :, shares[me].q] for x in wholes]
    found = [arrays.empty((plan.tokens, *x.shape[1:]), arrays.dtype_of(x)) for x in owns]
    sent = {
        rank: [arrays.contiguous(x[:, :, share.q]) for x in wholes]
        for rank, share in enumerate(shares)
        if rank != me
    }
    wait = _post_rows(problem, found, sent, what, back=False)
    for whole, own in zip(found, owns, strict=True):
        for rows, place in plan.own:
            whole[slice(*place)] = own[slice(*rows)]
    wait()
    return found


def _keys_to_heads(problem: RegroupedProblem, k, v, shares: list[Share]) -> tuple[Any, Any]:
    """This rank's key-value heads of the group's tokens, (batch, tokens, heads, head_dim)."""
    plan, me = problem.plan, problem.within.rank
    heads = shares[me].kv
    wire = problem.wire_of(k[:, :, heads], v[:, :, heads])
    buffer, sent = wire.new(plan.tokens), {}
    for rank, share in enumerate(shares):
        if rank != me and k.shape[1]:
            sent[rank] = wire.new(k.shape[1])
            wire.fill(sent[rank], 0, k[:, :, share.kv], v[:, :, share.kv])
    for rows, place in plan.own:
        own = slice(None), slice(*rows), heads
        wire.fill(buffer, place[0], k[own], v[own])

    spans = wire.spans
    sends = [
        (sent[peer].memory[span], peer)
        for peer, rows, _ in plan.there.sends
        for span in spans(k.shape[1], *rows)
    ]
    receives = [
        (buffer.memory[span], peer)
        for peer, rows, _ in plan.there.receives
        for span in spans(plan.tokens, *rows)
    ]
    if plan.there:
        _post(problem, sends, receives, "heads for tokens", "keys and values")()
    return wire.unpack(buffer)


def _to_tokens(problem: RegroupedProblem, computed: list, what: str) -> Iterable[tuple[int, list]]:
    """What the ranks of the group have computed for this rank's tokens, in the order of ranks.

    Args:
        problem: this rank's.
        computed: (tokens of the group, batch, heads, ...) of this rank each; contiguous after it.
        what: it is.

    Yields:
        (rank, for each array ((begin, end) of this rank's own rows, (rows, batch, heads, ...))).
    """
    arrays, plan, me = problem.arrays, problem.plan, problem.within.rank
    for n, x in enumerate(computed):
        computed[n] = arrays.contiguous(x)
    tokens, ranks = problem.tokens, range(problem.within.size)
    # Each of the others has all of this rank's tokens.
    arrived = {
        rank: [arrays.empty((tokens, *x.shape[1:]), arrays.dtype_of(x)) for x in computed]
        for rank in ranks
        if rank != me and tokens
    }
    _post_rows(problem, computed, arrived, what, back=True)()
    for rank in ranks:
        if rank == me:
            for rows, place in plan.own:
                yield rank, [(rows, x[slice(*place)]) for x in computed]
        elif tokens:
            yield rank, [((0, tokens), x) for x in arrived[rank]]


def _post_rows(
    problem: RegroupedProblem, wholes: list, parts: dict[int, list], what: str, *, back: bool
) -> Callable[[], None]:
    """Post rows of arrays; the wait for them.

    Args:
        problem: this rank's.
        wholes: of the group's tokens, contiguous; they are filled, or with `back` sent.
        parts: for each other rank, of this rank's tokens, contiguous; they are sent, or filled.
        what: they are.
        back: which way.
    """
    plan, as_bytes = problem.plan, problem.arrays.as_bytes
    if not plan.there:
        return _nothing
    of_group = [as_bytes(x) for x in wholes]
    of_peers = {peer: [as_bytes(x) for x in each] for peer, each in parts.items()}
    widths = tuple([x.shape[0] // max(1, plan.tokens) for x in of_group])
    here, there = problem.once(
        ("spans", widths), lambda: [_spans(side, widths) for side in plan.there]
    )
    sides = (
        [(of_peers[peer][n][span], peer) for peer, n, span in here],
        [(of_group[n][span], peer) for peer, n, span in there],
    )
    if back:
        return _post(problem, *reversed(sides), "tokens for heads", what)
    return _post(problem, *sides, "heads for tokens", what)


def _spans(messages: tuple[Message, ...], widths: tuple[int, ...]) -> list[tuple[int, int, slice]]:
    """(rank, array, bytes) of each message of arrays whose rows have so many bytes."""
    return [
        (peer, n, slice(begin * width, end * width))
        for peer, (begin, end), _ in messages
        for n, width in enumerate(widths)
    ]


def _post(
    problem: RegroupedProblem, sends: list, receives: list, how: str, what: str
) -> Callable[[], None]:
    name = f"{how} within a group of {problem.within.size}, {what}"
    return problem.within.exchange(sends, receives, name)


def _nothing() -> None:
    pass
