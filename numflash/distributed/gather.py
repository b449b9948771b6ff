"""Attention by gathering keys and values, some key-value heads at a time.

Each rank receives the keys and values that its queries see, at their places in the whole sequence,
while it computes with those of the heads before. Each of its segments is one call over all keys
from the first of its document on: nothing is merged, dQ is complete, and with one config on all
ranks out and lse have the bits of one GPU. Float32 shares of dK and dV go home, where they are
added in the order of ranks.

Source: Llama 3, arXiv 2407.21783, section 3.3.2, context parallelism by all-gather.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from numflash.distributed import steps
from numflash.distributed.arrays import Bundle
from numflash.distributed.local_calls import OPERANDS, Kept, Part
from numflash.distributed.packing import Packed, are_packed
from numflash.distributed.problem import Gradients, Problem
from numflash.distributed.steps import Exchange, Gathering
from numflash.distributed.wire import Wire, recipe_of

_BY_HEAD = ("lse", "delta", "dlse")
"""Of (batch, heads, tokens)."""


def forward(problem: Problem, q, k, v, first_head: int = 0, *, float32: bool) -> tuple[Any, Any]:
    """See `Method.forward`."""
    plan, arrays = _planned(problem, q, k, v, backward=False), problem.arrays
    batch, tokens, heads_q, _ = q.shape
    dtype = "float32" if float32 else arrays.dtype_of(q)
    out = arrays.empty((batch, tokens, heads_q, v.shape[3]), dtype)
    lse = arrays.empty((batch, heads_q, tokens), "float32")
    several = len(problem.layout.lengths) > 1
    if several:
        lse[...] = float("-inf")
    calls, verb = plan.steps.calls, problem.calls.forward
    for group, keys, values in _fetched(problem, plan, k, v):
        mine = group.q
        operands = q[:, :, mine], keys, values, first_head + mine.start
        of_group = lse[:, mine]
        for part in verb(calls, *operands, float32=float32, into=out[:, :, mine]):
            rows, (_, found) = of_group[:, :, slice(*part.q)], part.results
            # Parts of several documents have -inf in each other's rows.
            rows[...] = arrays.library.maximum(rows, found) if several else found
    return out, lse


def backward(
    problem: Problem,
    operands: dict[str, Any],
    first_head: int = 0,
    wrt: tuple[str, ...] = OPERANDS,
) -> Gradients:
    """See `Method.backward`."""
    q, k, v = (operands[name] for name in OPERANDS)
    plan, kept = _planned(problem, q, k, v, backward=True), Kept(problem, operands, wrt)
    verb, calls = problem.calls.backward, plan.steps.calls
    if plan.is_alone:
        of_all = {**operands, **dict(zip(("k", "v"), plan.wire.rounded(k, v), strict=True))}
        for part in verb(calls, of_all, first_head, wrt):
            kept.take(part)
            # The next call takes the memory.
            del part
        return {name: kept.get(name) for name in wrt}
    of_queries = kept.get("q") if "q" in wrt else None
    others = [name for name in wrt if name not in OPERANDS]
    shares = _Shares(problem, plan, {"k": k, "v": v}, wrt)
    given = {name: x for name, x in operands.items() if x is not None and name not in ("k", "v")}
    for group, keys, values in _fetched(problem, plan, k, v):
        mine, of_group = group.q, {"k": keys, "v": values}
        for name, x in given.items():
            of_group[name] = x[:, mine] if name in _BY_HEAD else x[:, :, mine]
        shares.begin(group.kv)
        into = None if of_queries is None else of_queries[:, :, mine]
        for part in verb(calls, of_group, first_head + mine.start, wrt):
            found = part.results
            if into is not None:
                rows = into[:, slice(*part.q)]
                rows += found["q"]
            shares.add(part)
            for name in others:
                if name in found:
                    kept.add(name, part.q, found[name])
            # The next call takes the memory.
            del part, found
        shares.give()
    shares.end()
    gradients = shares.gradients
    return {name: gradients[name] if name in gradients else kept.get(name) for name in wrt}


class _Group(NamedTuple):
    """Heads whose keys and values are fetched together.

    Attributes:
        q: the query heads.
        kv: the key-value heads.
        what: names them in errors.
    """

    q: slice
    kv: slice
    what: str


class _Plan(NamedTuple):
    """What a rank does, in numbers of its arrays.

    Attributes:
        steps: by tokens.
        is_alone: whether all keys are this rank's, where they belong, and nothing is fetched.
        groups: in their order; all have as many heads.
        wire: of the keys and values of one group; of all heads where nothing is fetched.
        own: of this rank's tokens (rows, the first place) each.
        sends, receives: (bytes of a buffer of `wire`, the other rank) of each message.
        packed: where runs of rows are put together, those that leave and those that arrive; their
            messages are of buffers with these alone.
    """

    steps: Gathering
    is_alone: bool
    groups: tuple[_Group, ...]
    wire: Wire
    own: tuple[tuple[slice, int], ...]
    sends: tuple[tuple[slice, int], ...]
    receives: tuple[tuple[slice, int], ...]
    packed: tuple[Packed, Packed] | None

    @property
    def at_once(self) -> int:
        """Key-value heads of a group."""
        return self.groups[0].kv.stop


def _planned(problem: Problem, q, k, v, *, backward: bool) -> _Plan:
    return problem.once(
        ("gather", backward), lambda: _plan_of(problem, q, k, v, backward=backward)
    )


def _plan_of(problem: Problem, q, k, v, *, backward: bool) -> _Plan:
    plan = steps.gathering(problem.layout, problem.band)[problem.rank]
    heads_kv, seqlen = k.shape[2], problem.layout.seqlen
    in_place = plan.is_whole and all(rows == place for rows, place in plan.own)
    is_alone = in_place and not plan.fetch
    each = heads_kv if is_alone else problem.heads_at_once(q, k, v, backward=backward)
    group, groups = q.shape[2] // heads_kv, []
    for n in range(0, heads_kv, each):
        what = f"keys and values of heads {n} to {n + each - 1} of {heads_kv}"
        groups.append(_Group(slice(n * group, (n + each) * group), slice(n, n + each), what))
    wire, places = problem.wire_of(k[:, :, :each], v[:, :, :each]), dict(plan.own)
    sent = [(message.peer, places[message.rows]) for message in plan.fetch.sends]
    received = [(message.peer, message.rows) for message in plan.fetch.receives]
    sides, sizes, packed = (sent, received), (seqlen, seqlen), None
    if are_packed(problem.layout, problem.band, recipe_of(problem.wire, k.shape[3])):
        packed = tuple(Packed.of(problem.arrays, side) for side in sides)
        sides, sizes = zip(*((each.extents, each.tokens) for each in packed), strict=True)
    sends, receives = (
        tuple((span, peer) for peer, rows in side for span in wire.spans(tokens, *rows))
        for side, tokens in zip(sides, sizes, strict=True)
    )
    own = tuple((slice(*rows), place[0]) for rows, place in plan.own)
    return _Plan(plan, is_alone, tuple(groups), wire, own, sends, receives, packed)


def _fetched(problem: Problem, plan: _Plan, k, v) -> Iterator[tuple[_Group, Any, Any]]:
    """So many heads at a time with their keys and values of all tokens; the next are under way.

    Keys that nobody here sees are zeros: a hidden NaN would spoil what shares a tile with it.
    """
    wire, groups = plan.wire, plan.groups
    if plan.is_alone:
        yield groups[0], *wire.rounded(k, v)
        return
    seqlen, zeroed = problem.layout.seqlen, not plan.steps.is_whole
    buffers = [wire.new(seqlen, zeroed=zeroed) for _ in groups[:2]]
    fetch = _packed_fetch if plan.packed else _fetch
    fetch_into = fetch(problem, plan, buffers)

    def post(number: int) -> Callable[[], None]:
        buffer, heads = buffers[number % 2], groups[number].kv
        for rows, begin in plan.own:
            wire.fill(buffer, begin, k[:, rows, heads], v[:, rows, heads])
        return fetch_into[number % 2](groups[number].what)

    wait = post(0)
    for number, group in enumerate(groups):
        wait()
        if number + 1 < len(groups):
            wait = post(number + 1)
        yield group, *wire.unpack(buffers[number % 2])


_Fetch = Callable[[str], Callable[[], None]]
"""Post what a buffer sends and receives, for errors in words; the wait for it."""


def _fetch(problem: Problem, plan: _Plan, buffers: list[Bundle]) -> list[_Fetch]:
    """Of each buffer, from the places of rows to their places."""
    fetch = partial(_post, problem, plan.steps.fetch)
    return [partial(fetch, *_messages(plan, whole, whole)) for whole in buffers]


def _packed_fetch(problem: Problem, plan: _Plan, buffers: list[Bundle]) -> list[_Fetch]:
    """Of each buffer, by one of the rows that leave and one of those that arrive."""
    leave, arrive = plan.packed
    leaving, arriving = (plan.wire.new(each.tokens) for each in plan.packed)
    messages = _messages(plan, leaving, arriving)

    def fetch(whole: Bundle, what: str) -> Callable[[], None]:
        for name, rows in leaving.items():
            rows[...] = whole[name][leave.index]
        wait = _post(problem, plan.steps.fetch, *messages, what)

        def arrived() -> None:
            wait()
            for name, rows in arriving.items():
                whole[name][arrive.index] = rows

        return arrived

    return [partial(fetch, whole) for whole in buffers]


def _messages(plan: _Plan, leaving: Bundle, arriving: Bundle) -> list[list[tuple[Any, int]]]:
    sides = (leaving, plan.sends), (arriving, plan.receives)
    return [[(bundle.memory[span], peer) for span, peer in side] for bundle, side in sides]


def _post(
    problem: Problem, exchange: Exchange, sends: list, receives: list, what: str
) -> Callable[[], None]:
    return problem.comm.exchange(sends, receives, what) if exchange else _nothing


def _nothing() -> None:
    pass


class _Home(NamedTuple):
    """How shares of gradients go home, in numbers of their arrays.

    Attributes:
        columns: by name, those of dK and dV.
        row: (batch, heads of a group, columns of dK and dV), of one token.
        tokens: that arrive.
        sends, receives: (bytes of all tokens' shares, or of those that leave put together, or of
            what arrives; the other rank) of each message.
        rows: own rows that ranks have shares of.
        pieces: in the order of ranks (which of `rows`, whether this rank made them, where they lie
            among all tokens, or among those that arrive). What one rank has of neighbouring rows
            is one.
    """

    columns: dict[str, slice]
    row: tuple[int, int, int]
    tokens: int
    sends: list[tuple[slice, int]]
    receives: list[tuple[slice, int]]
    rows: list[slice]
    pieces: list[tuple[int, bool, slice]]


def _home_of(rank: int, plan: _Plan, batch: int, dims: dict[str, int]) -> _Home:
    columns, width = {}, 0
    for name, dim in dims.items():
        columns[name] = slice(width, width + dim)
        width += dim
    row = batch, plan.at_once, width
    size, (sends, receives) = 4 * math.prod(row), plan.steps.give
    order = sorted(range(len(receives)), key=lambda n: (receives[n].peer, receives[n].rows))
    at, spans, pieces = 0, {}, []
    for n in order:
        peer, (begin, end), _ = receives[n]
        past = at + end - begin
        spans[n] = slice(at * size, past * size)
        if pieces and pieces[-1][:2] == (peer, begin):
            _, _, (first, _), (room, _) = pieces.pop()
        else:
            first, room = begin, at
        pieces.append((peer, end, (first, end), (room, past)))
        at = past
    found = [(peer, rows, False, place) for peer, _, rows, place in pieces]
    found += [(rank, rows, True, place) for rows, place in plan.steps.own]
    found.sort(key=lambda piece: piece[:2])
    rows = list(dict.fromkeys(rows for _, rows, *_ in found))
    leave = [(m.peer, m.rows) for m in sends]
    arrive = [(message.peer, spans[n]) for n, message in enumerate(receives)]
    if plan.packed:
        # What leaves here is where keys have arrived; what arrives lies by rank anyway.
        leave, arrive = plan.packed[1].extents, _by_peer(arrive)
    return _Home(
        columns,
        row,
        at,
        [(slice(begin * size, end * size), peer) for peer, (begin, end) in leave],
        [(span, peer) for peer, span in arrive],
        [slice(*each) for each in rows],
        [(rows.index(each), is_own, slice(*place)) for _, each, is_own, place in found],
    )


def _by_peer(spans: list[tuple[int, slice]]) -> list[tuple[int, slice]]:
    """One span for each rank, whose spans lie next to each other."""
    found: dict[int, slice] = {}
    for peer, span in sorted(spans, key=lambda each: (each[0], each[1].start)):
        found[peer] = slice(found.get(peer, span).start, span.stop)
    return list(found.items())


class _Shares:
    """Gradients of keys and values: this rank's shares of all ranks' tokens, which go home.

    A buffer holds those of one group of heads, of dK and dV side by side. It is filled again once
    what it held has arrived.

    Attributes:
        gradients: of this rank's tokens, by name: the sums of what has arrived.
    """

    _under_way: tuple[Callable[[], None], slice] | None

    def __init__(
        self,
        problem: Problem,
        plan: _Plan,
        operands: dict[str, Any],
        wrt: tuple[str, ...],
    ):
        """Take room for the heads of a group."""
        dims = {name: x.shape[3] for name, x in operands.items() if name in wrt}
        batch, tokens, heads, _ = operands["k"].shape
        home = problem.once(("home", *dims), lambda: _home_of(problem.rank, plan, batch, dims))
        self._problem, self._plan, self._home = problem, plan.steps, home
        self._heads, self._is_clear = slice(0, 0), False
        self._under_way = self._buffer = None
        # Of a buffer, by rows: each group of heads has calls on the same.
        self._of_rows: dict[tuple[int, int], dict[str, Any]] = {}
        arrays = problem.arrays
        self._sums = arrays.zeros((tokens, batch, heads, home.row[2]), "float32")
        self.gradients = self._by_name(self._sums)
        if not dims:
            return
        self._buffer = arrays.empty((problem.layout.seqlen, *home.row), "float32")
        room = arrays.empty((home.tokens, *home.row), "float32")
        self._packed = plan.packed[1] if plan.packed else None
        self._leaving = self._buffer
        if self._packed:
            self._leaving = arrays.empty((self._packed.tokens, *home.row), "float32")
        leaving, arriving = map(arrays.as_bytes, (self._leaving, room))
        self._sends = [(leaving[span], peer) for span, peer in home.sends]
        self._receives = [(arriving[span], peer) for span, peer in home.receives]
        self._arrived = [
            (n, (self._buffer if is_own else room)[at]) for n, is_own, at in home.pieces
        ]

    def begin(self, heads: slice) -> None:
        """Say which heads the next shares are of."""
        self._heads, self._is_clear = heads, False

    def add(self, part: Part) -> None:
        """Add what one call gave, once the group before has arrived."""
        if self._buffer is None:
            return
        if not self._is_clear:
            self._clear()
        views = self._of_rows.get(part.k)
        if views is None:
            views = self._of_rows[part.k] = self._by_name(self._buffer[slice(*part.k)])
        for name, x in views.items():
            x += part.results[name]

    def give(self) -> None:
        """Send the shares of these heads home."""
        if self._buffer is None:
            return
        if not self._is_clear:
            self._clear()
        if self._packed:
            self._leaving[...] = self._buffer[self._packed.index]
        first, last = self._heads.start, self._heads.stop - 1
        what = f"gradients of keys and values of heads {first} to {last}"
        wait = _post(self._problem, self._plan.give, self._sends, self._receives, what)
        self._under_way = wait, self._heads

    def end(self) -> None:
        """Add what is still under way, in the order of ranks."""
        if self._under_way is None:
            return
        (wait, heads), self._under_way = self._under_way, None
        wait()
        sums = [self._sums[rows, :, heads] for rows in self._home.rows]
        for n, share in self._arrived:
            own = sums[n]
            own += share

    def _by_name(self, rows) -> dict[str, Any]:
        """dK and dV of (tokens, batch, heads, columns): (batch, tokens, heads, head_dim)."""
        by_batch = rows.swapaxes(0, 1)
        return {name: by_batch[..., columns] for name, columns in self._home.columns.items()}

    def _clear(self) -> None:
        """Make room for the shares of the next heads."""
        self.end()
        self._buffer[...] = 0
        self._is_clear = True
