"""Attention by gathering keys and values, some key-value heads at a time.

Each rank receives the keys and values that its queries see, at their places in the whole sequence,
while it computes with those of the heads before. Each of its segments is one call over all keys
from the first of its document on: nothing is merged, dQ is complete, and with one config on all
ranks out and lse have the bits of one GPU. Float32 shares of dK and dV go home, where they are
added in the order of ranks.

Source: Llama 3, arXiv 2407.21783, section 3.3.2, context parallelism by all-gather.
"""

from collections.abc import Callable, Iterator
from typing import Any

from numflash.distributed import steps
from numflash.distributed.local_calls import Part
from numflash.distributed.problem import Gradients, Problem
from numflash.distributed.steps import Exchange, Gathering

_OF_TOKENS = ("q", "k", "v")


def forward(problem: Problem, q, k, v, first_head: int = 0, *, float32: bool) -> tuple[Any, Any]:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        problem: this rank's.
        q: (batch, tokens, heads_q, head_dim) of this rank.
        k, v: (batch, tokens, heads_kv, head_dim or head_dim_v) of this rank.
        first_head: the number of the first query head in the whole problem.
        float32: whether out is float32, and not of the dtype of q.

    Returns:
        out (batch, tokens, heads_q, head_dim_v) and lse (batch, heads_q, tokens) float32.

    Raises:
        CommunicatorError: a peer is gone or did not come.
    """
    plan, arrays = _plan(problem), problem.arrays
    batch, tokens, heads_q, _ = q.shape
    dtype = "float32" if float32 else arrays.dtype_of(q)
    out = arrays.empty((batch, tokens, heads_q, v.shape[3]), dtype)
    lse = arrays.empty((batch, heads_q, tokens), "float32")
    group, several = heads_q // k.shape[2], len(problem.layout.lengths) > 1
    if several:
        lse[...] = float("-inf")
    at_once = problem.heads_at_once(q, k, v, backward=False)
    for heads, keys, values in _fetched(problem, plan, k, v, at_once):
        mine = slice(heads.start * group, heads.stop * group)
        operands = q[:, :, mine], keys, values, first_head + mine.start
        for part in problem.calls.forward(
            plan.calls, *operands, float32=float32, into=out[:, :, mine]
        ):
            rows, (_, found) = lse[:, mine, slice(*part.q)], part.results
            # Parts of several documents have -inf in each other's rows.
            rows[...] = arrays.library.maximum(rows, found) if several else found
    return out, lse


def backward(
    problem: Problem,
    operands: dict[str, Any],
    first_head: int = 0,
    wrt: tuple[str, ...] = _OF_TOKENS,
) -> Gradients:
    """The gradients of `forward`, of this rank's rows.

    Args:
        problem: this rank's.
        operands: dout, q, k, v, lse and out, or in its place delta, of this rank's rows; dlse,
            where lse has a gradient of its own, else None or left out.
        first_head: as of `forward`.
        wrt: of "q", "k", "v", "sinks" and "alibi_slopes".

    Returns:
        A float32 gradient by each name in wrt. Those of sinks and alibi_slopes have the shapes of
        the whole problem's, and are this rank's share: the sum over ranks is the gradient.

    Raises:
        CommunicatorError: a peer is gone or did not come.
    """
    plan, arrays = _plan(problem), problem.arrays
    q, k, v = (operands[name] for name in _OF_TOKENS)
    found = {
        name: arrays.zeros(tuple(operands[name].shape), "float32")
        for name in wrt
        if name in _OF_TOKENS
    }
    at_once, group = problem.heads_at_once(q, k, v, backward=True), q.shape[2] // k.shape[2]
    shares = _Shares(problem, plan, found, k, v, at_once)
    for heads, keys, values in _fetched(problem, plan, k, v, at_once):
        mine = slice(heads.start * group, heads.stop * group)
        of_group = {
            name: x[:, mine] if name in ("lse", "delta", "dlse") else x[:, :, mine]
            for name, x in operands.items()
            if x is not None and name not in ("k", "v")
        }
        of_group |= {"k": keys, "v": values}
        shares.begin(heads)
        for part in problem.calls.backward(plan.calls, of_group, first_head + mine.start, wrt):
            if "q" in found:
                rows = found["q"][:, slice(*part.q), mine]
                rows += part.results["q"]
            shares.add(part)
            for name, gradient in part.results.items():
                if name not in _OF_TOKENS:
                    found[name] = found[name] + gradient if name in found else gradient
        shares.give()
    shares.end()
    for name in wrt:
        if name not in found:
            # This rank has no queries.
            found[name] = arrays.zeros(tuple(problem.calls.of_heads(name).shape), "float32")
    return found


def is_alone(plan: Gathering) -> bool:
    """Whether all keys are this rank's, where they belong: nothing is fetched or copied."""
    return not plan.fetch and plan.is_whole and all(rows == place for rows, place in plan.own)


def _plan(problem: Problem) -> Gathering:
    return steps.gathering(problem.layout, problem.band)[problem.rank]


def _fetched(
    problem: Problem, plan: Gathering, k, v, at_once: int
) -> Iterator[tuple[slice, Any, Any]]:
    """So many heads at a time with their keys and values of all tokens; the next are under way.

    Keys that nobody here sees are zeros: a hidden NaN would spoil what shares a tile with it.
    """
    heads_kv = k.shape[2]
    if is_alone(plan):
        wire = problem.wire_of(k, v)
        yield slice(0, heads_kv), *wire.rounded(k, v)
        return
    wire = problem.wire_of(k[:, :, :at_once], v[:, :, :at_once])
    groups = [slice(n, n + at_once) for n in range(0, heads_kv, at_once)]
    seqlen, zeroed = problem.layout.seqlen, not plan.is_whole
    buffers = [wire.new(seqlen, zeroed=zeroed) for _ in groups[:2]]
    places = dict(plan.own)

    def post(number: int) -> Callable[[], None]:
        buffer, heads = buffers[number % 2], groups[number]
        for rows, place in plan.own:
            mine = slice(None), slice(*rows), heads
            wire.fill(buffer, place[0], k[mine], v[mine])
        what = f"keys and values of heads {heads.start} to {heads.stop - 1} of {heads_kv}"
        sent = [(m.peer, places[m.rows]) for m in plan.fetch.sends]
        received = [(m.peer, m.rows) for m in plan.fetch.receives]
        sides = (
            [(x, peer) for peer, rows in side for x in wire.messages(buffer, *rows)]
            for side in (sent, received)
        )
        return _post(problem, plan.fetch, *sides, what)

    wait = post(0)
    for number, heads in enumerate(groups):
        wait()
        if number + 1 < len(groups):
            wait = post(number + 1)
        yield heads, *wire.unpack(buffers[number % 2])


def _post(
    problem: Problem, exchange: Exchange, sends: list, receives: list, what: str
) -> Callable[[], None]:
    return problem.comm.exchange(sends, receives, what) if exchange else _nothing


def _nothing() -> None:
    pass


class _Shares:
    """Gradients of keys and values: this rank's shares of all ranks' tokens, which go home.

    A buffer holds those of one group of heads, of dK and dV side by side. It is filled again once
    what it held has arrived.
    """

    def __init__(
        self, problem: Problem, plan: Gathering, found: dict[str, Any], k, v, at_once: int
    ):
        """Bind the gradients of this rank's own tokens, which shares are added to."""
        self._problem, self._plan, self._found = problem, plan, found
        self._names = tuple(name for name in ("k", "v") if name in found)
        self._is_alone = is_alone(plan)
        self._is_clear = False
        self._heads = slice(0, 0)
        self._under_way: tuple[Callable[[], None], slice] | None = None
        self._buffer = self._arrived = None
        if self._is_alone or not self._names:
            return
        arrays, self._columns, at = problem.arrays, {}, 0
        for name, x in (("k", k), ("v", v)):
            if name in found:
                self._columns[name] = slice(at, at + x.shape[3])
                at += x.shape[3]
        row = k.shape[0], at_once, at
        self._buffer = arrays.empty((problem.layout.seqlen, *row), "float32")
        receives = plan.give.receives
        tokens = sum(m.rows[1] - m.rows[0] for m in receives)
        arrived, at, self._arrived = arrays.empty((tokens, *row), "float32"), 0, []
        for message in receives:
            end = at + message.rows[1] - message.rows[0]
            self._arrived.append(arrived[at:end])
            at = end

    def begin(self, heads: slice) -> None:
        """Say which heads the next shares are of."""
        self._heads, self._is_clear = heads, False

    def add(self, part: Part) -> None:
        """Add what one call gave, once the group before has arrived."""
        for name in self._names:
            if self._is_alone:
                rows = self._found[name][:, slice(*part.k)]
            else:
                self._clear()
                rows = self._buffer[slice(*part.k), ..., self._columns[name]].swapaxes(0, 1)
            rows += part.results[name]

    def give(self) -> None:
        """Send the shares of these heads home."""
        if self._buffer is None:
            return
        self._clear()
        give, as_bytes = self._plan.give, self._problem.arrays.as_bytes
        sends = [(as_bytes(self._buffer[slice(*m.rows)]), m.peer) for m in give.sends]
        pairs = zip(self._arrived, give.receives, strict=True)
        receives = [(as_bytes(x), m.peer) for x, m in pairs]
        what = (
            f"gradients of keys and values of heads {self._heads.start} to {self._heads.stop - 1}"
        )
        self._under_way = _post(self._problem, give, sends, receives, what), self._heads

    def end(self) -> None:
        """Add what is still under way."""
        if self._under_way is None:
            return
        wait, heads = self._under_way
        self._under_way = None
        wait()
        rank = self._problem.rank
        for owner in range(self._problem.layout.ranks):
            if owner == rank:
                for rows, place in self._plan.own:
                    self._add_home(rows, heads, self._buffer[slice(*place)])
            for message, share in zip(self._plan.give.receives, self._arrived, strict=True):
                if message.peer == owner:
                    self._add_home(message.rows, heads, share)

    def _add_home(self, rows: tuple[int, int], heads: slice, share) -> None:
        """A share, (tokens, batch, heads, columns), to the gradients of this rank's tokens."""
        for name, columns in self._columns.items():
            own = self._found[name][:, slice(*rows), heads]
            own += share[..., columns].swapaxes(0, 1)

    def _clear(self) -> None:
        if not self._is_clear:
            self.end()
            self._buffer[...] = 0
            self._is_clear = True
