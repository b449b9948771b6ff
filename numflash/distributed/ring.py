"""Ring: keys and values go from rank to rank; in the backward also their gradients, or queries.

A rank computes with what is here while what comes next is on its way. It holds two pieces of each
kind that travels: the one that is here, which also leaves, and the one that arrives.

Results are float32 until the last step, and parts join them in the order of the steps. Gradients
that travel are one step behind the operands: the sum of the ranks before arrives while this rank
computes its own, and is added to it. It begins at the owner, and from the last step that adds to
it goes straight home. So the bits depend on the layout, not on what arrives when.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from numflash.api.merge import merge_onto
from numflash.distributed import steps
from numflash.distributed.arrays import Arrays, Places, places_in_bundle
from numflash.distributed.local_calls import Kept, Part, delta_of
from numflash.distributed.problem import Gradients, Problem, sizes_of
from numflash.distributed.sizes import what_travels
from numflash.distributed.steps import Exchange, Step
from numflash.problem.options import expect_one_of


class Cargo(NamedTuple):
    """Arrays that travel together, of some tokens.

    Attributes:
        tokens: how many they are of.
        messages: their memory, flat, uint8.
        views: (batch, tokens, heads, head_dim), or (batch, heads, tokens), by name; of keys and
            values what their `Wire` unpacks.
    """

    tokens: int
    messages: list
    views: dict[str, Any]


class _Room:
    """Memory for what comes: that of what has left before, if both are as large."""

    def __init__(self, make: Callable[[int], Cargo]):
        self._make, self._left = make, None

    def take(self, tokens: int) -> Cargo:
        """Room for so many tokens; what is in it is undefined."""
        found, self._left = self._left, None
        return found if found is not None and found.tokens == tokens else self._make(tokens)

    def leave(self, cargo: Cargo | None) -> None:
        """Say that nobody sends or reads this any more."""
        self._left = cargo


def forward(problem: Problem, q, k, v, first_head: int = 0, *, float32: bool) -> tuple[Any, Any]:
    """See `Method.forward`."""
    plan, arrays = _plan(problem, steps.ring), problem.arrays
    dtype = arrays.dtype_of(q)
    total = _Total(arrays, (*q.shape[:3], v.shape[3]))
    calls = [call for step in plan for call in step.calls]
    # A single call's result needs no float32 to be added in.
    in_float32 = float32 or len(calls) != 1 or calls[0].q != (0, q.shape[1])
    keys = _Round(problem, plan, _Keys(problem, k, v))
    for number, step in enumerate(plan):
        arrived = keys.post(number)
        for part in problem.calls.forward(
            step.calls, q, **keys.views, first_head=first_head, float32=in_float32
        ):
            total.add(part)
            # One part at a time: the next one takes its memory.
            del part
        arrived()
        del arrived
        keys.turn()
    out, lse = total.get()
    return arrays.astype(out, "float32" if float32 else dtype), lse


def backward(
    problem: Problem,
    operands: dict[str, Any],
    first_head: int = 0,
    wrt: tuple[str, ...] = ("q", "k", "v"),
    *,
    travels: str = "auto",
) -> Gradients:
    """See `Method.backward`.

    `travels` is what goes round: "keys", "queries", or "auto", which of the two moves fewer bytes.

    Raises:
        ValueError: another `travels`.
    """
    expect_one_of("travels", travels, ("auto", "keys", "queries"))
    arrays, operands = problem.arrays, dict(operands)
    operands["delta"] = delta_of(arrays, operands)
    operands["out"] = operands["dlse"] = None
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    if travels == "auto":
        travels = problem.once(("travels", wrt), lambda: _what_travels(problem, q, k, v, wrt))
    if travels == "keys":
        plan, cargo = _plan(problem, steps.ring), _Keys(problem, k, v)
    else:
        plan = _plan(problem, steps.ring_of_queries)
        operands["k"], operands["v"] = problem.wire_of(k, v).rounded(k, v)
        cargo = _Queries(problem, operands)
    return _backward(problem, plan, cargo, operands, first_head, wrt)


def _what_travels(problem: Problem, q, k, v, wrt: tuple[str, ...]) -> str:
    sizes = sizes_of(q, k, v, problem.arrays.dtype_of(q), problem.wire)
    return what_travels(problem.layout, problem.band, problem.calls.by_position, sizes, wrt)


class _Keys:
    """Keys and values as their wire has them, and float32 gradients of them.

    Gradients lie side by side: (tokens, batch, heads_kv, head_dim + head_dim_v).
    """

    what = "keys and values"
    gradients = ("k", "v")

    def __init__(self, problem: Problem, k, v):
        self._arrays, self._k, self._v = problem.arrays, k, v
        self._wire = problem.wire_of(k, v)
        self._batch, self._heads = k.shape[0], k.shape[2]
        self._dims = {"k": k.shape[3], "v": v.shape[3]}

    def own(self) -> Cargo:
        """This rank's, copied."""
        cargo = self.new(self._k.shape[1])
        self._wire.fill(cargo.views, 0, self._k, self._v)
        return cargo

    def of_owner(self, cargo: Cargo | None) -> dict[str, Any]:
        """The operands of this rank, as the others see them; `cargo` is what it sends of them."""
        if cargo is None or self._wire.is_exact:
            return dict(zip(self.gradients, self._wire.rounded(self._k, self._v), strict=True))
        return self.opened(cargo)

    def opened(self, cargo: Cargo) -> dict[str, Any]:
        """The operands that have arrived."""
        return dict(zip(self.gradients, self._wire.unpack(cargo.views), strict=True))

    def new(self, tokens: int) -> Cargo:
        """Room for those of another rank."""
        buffer = self._wire.new(tokens)
        return Cargo(tokens, self._wire.messages(buffer, 0, tokens), buffer)

    def new_sums(self, tokens: int, names: tuple[str, ...]) -> Cargo:
        """Room for their gradients."""
        width = sum(self._dims[name] for name in names)
        buffer = self._arrays.empty((tokens, self._batch, self._heads, width), "float32")
        by_batch, views, at = buffer.swapaxes(0, 1), {}, 0
        for name in names:
            views[name] = by_batch[..., at : at + self._dims[name]]
            at += self._dims[name]
        return Cargo(tokens, [self._arrays.as_bytes(buffer)], views)


class _Queries:
    """Queries with dout, lse and delta, and the float32 gradient of the queries."""

    what = "queries"
    gradients = ("q",)
    _names = ("q", "dout", "lse", "delta")

    def __init__(self, problem: Problem, operands: dict[str, Any]):
        self._problem, self._arrays = problem, problem.arrays
        self._given = {name: operands[name] for name in self._names}

    def own(self) -> Cargo:
        """This rank's, copied."""
        cargo = self.new(self._given["q"].shape[1])
        for name, array in self._given.items():
            cargo.views[name][...] = array
        return cargo

    def of_owner(self, cargo: Cargo | None) -> dict[str, Any]:
        """The operands of this rank; `cargo` is what it sends of them."""
        return self._given

    def opened(self, cargo: Cargo) -> dict[str, Any]:
        """The operands that have arrived."""
        return cargo.views

    def new(self, tokens: int) -> Cargo:
        """Room for those of another rank."""
        places = self._problem.once(("queries", tokens), lambda: self._places(tokens))
        bundle = self._arrays.bundle_at(places)
        return Cargo(tokens, [bundle.memory], bundle)

    def _places(self, tokens: int) -> Places:
        """Of so many, in a bundle."""
        parts = []
        for name, array in self._given.items():
            batch, *others = array.shape
            is_row = len(others) == 2
            shape = (batch, others[0], tokens) if is_row else (batch, tokens, *others[1:])
            parts.append((name, (shape, self._arrays.dtype_of(array))))
        return places_in_bundle(tuple(parts))

    def new_sums(self, tokens: int, names: tuple[str, ...]) -> Cargo:
        """Room for the gradients of queries."""
        batch, _, heads, head_dim = self._given["q"].shape
        array = self._arrays.empty((batch, tokens, heads, head_dim), "float32")
        return Cargo(tokens, [self._arrays.as_bytes(array)], {"q": array})


class _Round:
    """What goes round, as this rank sees it.

    Attributes:
        views: of the operands that are here, by name.
    """

    _here: Cargo | None
    _coming: Cargo | None

    def __init__(self, problem: Problem, plan: tuple[Step, ...], cargo: "_Keys | _Queries"):
        self._problem, self._plan, self._cargo = problem, plan, cargo
        self._room = _Room(cargo.new)
        self._here = cargo.own() if plan and plan[0].fetch.sends else None
        self._coming = None
        self.views = cargo.of_owner(self._here)

    def post(self, number: int) -> Callable[[], None]:
        """Send what is here on, and make room for what comes; the wait for both."""
        exchange = self._plan[number].fetch
        coming = [self._room.take(_tokens(message)) for message in exchange.receives]
        self._coming = coming[0] if coming else None
        what = f"ring step {number + 1} of {len(self._plan)}, {self._cargo.what}"
        return _post(self._problem, exchange, self._here, coming, what)

    def turn(self) -> None:
        """What came is here. Where nothing came, no call will read the operands."""
        self._room.leave(self._here)
        self._here, self._coming = self._coming, None
        if self._here is not None:
            self.views = self._cargo.opened(self._here)


class _Total:
    """out and lse of the keys so far."""

    def __init__(self, arrays: Arrays, shape: tuple[int, int, int, int]):
        self._arrays, self._shape = arrays, shape
        self._out = self._lse = None

    def add(self, part: Part) -> None:
        """Merge what one call gave."""
        out, lse = part.results
        if self._out is None and part.q == (0, self._shape[1]):
            self._out, self._lse = out, lse
            return
        whole, whole_lse = self.get()
        rows = slice(*part.q)
        merge_onto(whole[:, rows], whole_lse[:, :, rows], out, lse)

    def get(self) -> tuple[Any, Any]:
        """Both; before the first part, of queries that see nothing."""
        if self._out is None:
            batch, tokens, heads, _ = self._shape
            self._out = self._arrays.zeros(self._shape, "float32")
            self._lse = self._arrays.empty((batch, heads, tokens), "float32")
            self._lse[...] = float("-inf")
        return self._out, self._lse


class _Shares:
    """Gradients of one step that are to travel: those of equal rows are added, others kept apart.

    They wait here for the sum of the ranks before.
    """

    _found: dict[tuple[str, tuple[int, int]], Any]

    def __init__(self):
        self._found = {}

    def add(self, name: str, rows: tuple[int, int], gradient) -> None:
        """Add to the share of these rows."""
        held = self._found.get((name, rows))
        if held is None:
            self._found[name, rows] = gradient
        else:
            held += gradient

    def pour(self, views: dict[str, Any]) -> None:
        """Add all to (batch, tokens, heads, head_dim) arrays, in the order in which rows came."""
        for (name, rows), gradient in self._found.items():
            views[name][:, slice(*rows)] += gradient
        self._found.clear()


def _backward(
    problem: Problem,
    plan: tuple[Step, ...],
    cargo: "_Keys | _Queries",
    operands: dict[str, Any],
    first_head: int,
    wrt: tuple[str, ...],
) -> Gradients:
    going = tuple(name for name in cargo.gradients if name in wrt)
    kept, shares = Kept(problem, operands, wrt), _Shares()
    around, sums = _Round(problem, plan, cargo), _Sums(problem, plan, cargo, going)
    for number, step in enumerate(plan):
        fetched = around.post(number)
        for part in problem.calls.backward(step.calls, operands | around.views, first_head, wrt):
            _take(part, going, shares, kept)
            del part
        if going:
            sums.give(number, shares)
        fetched()
        del fetched
        around.turn()
    sums.wait()
    found = sums.views
    return {name: found[name] if name in found else kept.get(name) for name in wrt}


def _take(part: Part, going: tuple[str, ...], shares: _Shares, kept: Kept) -> None:
    """The gradients of one call, to those that travel and those that stay."""
    for name, gradient in part.results.items():
        (shares if name in going else kept).add(name, part.rows_of(name), gradient)


class _Sums:
    """Sums of the gradients that travel, one step behind the operands."""

    def __init__(
        self,
        problem: Problem,
        plan: tuple[Step, ...],
        cargo: "_Keys | _Queries",
        going: tuple[str, ...],
    ):
        self._problem, self._plan, self._what = problem, plan, f"gradients of {cargo.what}"
        self._room = _Room(lambda tokens: cargo.new_sums(tokens, going))
        # Those of the ranks before this one, by owner.
        self._landed: dict[int, Cargo] = {}
        self._leaving: Cargo | None = None
        self._under_way = _no_wait

    @property
    def views(self) -> dict[str, Any]:
        """Of this rank's own tokens, by name; empty where nobody has computed with them."""
        own = self._landed.get(self._problem.rank)
        return {} if own is None else own.views

    def give(self, number: int, shares: _Shares) -> None:
        """Add the shares of a step to the sum of the ranks before, and send it on or home."""
        # What has left makes room for what comes.
        self.wait()
        step = self._plan[number]
        total = self._landed.pop(step.owner, None)
        if number == 0:
            total = self._room.take(self._problem.layout.tokens(step.owner))
            for view in total.views.values():
                view[...] = 0
        if total is not None:
            shares.pour(total.views)
        if number == 0 and not step.give.sends:
            self._landed[step.owner] = total
        coming = [self._room.take(_tokens(message)) for message in step.give.receives]
        for cargo, message in zip(coming, step.give.receives, strict=True):
            self._landed[message.owner] = cargo
        self._leaving = total if step.give.sends else None
        what = f"ring step {number + 1} of {len(self._plan)}, {self._what}"
        self._under_way = _post(self._problem, step.give, total, coming, what)

    def wait(self) -> None:
        """Wait for what is under way."""
        self._under_way()
        self._under_way = _no_wait
        self._room.leave(self._leaving)
        self._leaving = None


def _post(
    problem: Problem, exchange: Exchange, leaving: Cargo | None, coming: list[Cargo], what: str
) -> Callable[[], None]:
    """Post the messages of an exchange, all of them whole; the wait for them."""
    if not exchange:
        return _no_wait
    sends = [(x, message.peer) for message in exchange.sends for x in leaving.messages]
    pairs = zip(coming, exchange.receives, strict=True)
    receives = [(x, message.peer) for each, message in pairs for x in each.messages]
    return problem.comm.exchange(sends, receives, what)


def _no_wait() -> None:
    """Nothing was posted."""


def _tokens(message: steps.Message) -> int:
    begin, end = message.rows
    return end - begin


def _plan(problem: Problem, ring: Callable) -> tuple[Step, ...]:
    """This rank's steps."""

    def make() -> tuple[Step, ...]:
        return ring(problem.layout, problem.band, problem.calls.by_position)[problem.rank]

    return problem.once(ring, make)
