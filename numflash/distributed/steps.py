"""Schedules: for each rank and step what it sends, receives and computes. Pure numbers.

All ranks go through the same steps. What a rank sends in an exchange of a step, its peer receives
in the same exchange of the same step, and between two ranks in the same order. The forward, the
backward, `explain`, the benchmark and the tests read these schedules; nothing else decides what
travels.

    gather     each rank receives the keys that its queries see at their places in the whole
               sequence; one step for each group of key-value heads
    ring       keys and values go round; in the backward their gradients follow, one step behind
    queries    the backward in which queries go round, and their gradients follow
    regroup    between tokens of all heads and heads of all tokens ("heads", Ulysses)
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from numflash.distributed.layouts import Layout, Segment
from numflash.distributed.pairs import Band, Calls, Held, by_document, calls_of, pair, sees


class Message(NamedTuple):
    """Rows that travel between this rank and another.

    Attributes:
        peer: the other rank.
        rows: (begin, end): the sender's in the array that is sent, the receiver's in the one that
            is filled.
        owner: whose tokens they are.
    """

    peer: int
    rows: tuple[int, int]
    owner: int


class Exchange(NamedTuple):
    """Messages that are posted together.

    Attributes:
        sends, receives: in the order in which they are posted.
    """

    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sends or self.receives)


class Step(NamedTuple):
    """One step of a rank.

    Attributes:
        fetch: posted before the step's calls, and awaited after them: what the next step reads.
        calls: on what the step before has fetched, in step 0 the rank's own.
        give: posted after the calls, and awaited after those of the next step: sums of gradients.
        owner: whose tokens the calls read, or add gradients to.
    """

    fetch: Exchange
    calls: Calls
    give: Exchange
    owner: int

    @property
    def scores(self) -> int:
        """The work of the step: visible scores, of one head."""
        return sum(call.scores for call in self.calls)


class Gathering(NamedTuple):
    """What a rank does for each group of key-value heads.

    Attributes:
        fetch: messages of keys and values: the sender's rows are its own, the receiver's those of
            the whole sequence.
        own: for each of the rank's segments ((begin, end) of its own rows, of the whole sequence).
        calls: of the rank's own queries on the whole sequence: one for each of its segments.
        give: messages of gradients of keys and values: the sender's rows are those of the whole
            sequence, the receiver's its own.
        is_whole: whether every row of the whole sequence arrives or is the rank's own.
    """

    fetch: Exchange
    own: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    calls: Calls
    give: Exchange
    is_whole: bool


class Regrouping(NamedTuple):
    """How a rank of a group changes tokens of all heads for heads of all tokens.

    Attributes:
        there: the sender's rows are its own, the receiver's those of the group.
        back: the sender's rows are those of the group, the receiver's its own.
        own: for each of the rank's segments ((begin, end) of its own rows, of the group's).
        tokens: of the group.
    """

    there: Exchange
    back: Exchange
    own: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    tokens: int


class PerRank(Sequence):
    """Something for each rank, made when it is asked for: a rank mostly reads its own."""

    def __init__(self, ranks: int, make: Callable[[int], object]):
        self._made, self._make = [None] * ranks, make

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, rank):
        if self._made[rank] is None:
            self._made[rank] = self._make(rank)
        return self._made[rank]


@lru_cache(maxsize=256)
def ring(layout: Layout, band: Band, by_position: bool = False) -> Sequence[tuple[Step, ...]]:
    """For each rank its steps of a ring in which keys and values travel, and their gradients.

    In step s rank r has the keys of rank r - s. They go on to r + 1 as long as a later step sees
    any of them. Gradients follow one step behind, and go home from the last step that has added
    to them. The forward leaves `give` out.
    """
    return _ring(layout, band, by_position, 1)


@lru_cache(maxsize=256)
def ring_of_queries(
    layout: Layout, band: Band, by_position: bool = False
) -> Sequence[tuple[Step, ...]]:
    """For each rank its steps of a ring in which queries travel, and their gradients.

    The mirror of `ring`: in step s rank r has the queries of rank r + s, and sends them to r - 1.
    """
    return _ring(layout, band, by_position, -1)


def _ring(layout: Layout, band: Band, by_position: bool, way: int) -> Sequence[tuple[Step, ...]]:
    n, held = layout.ranks, layout.segments
    of_rank = [by_document(segments) for segments in held]

    def sides(owner: int, step: int) -> tuple[int, int]:
        """Whose queries and whose keys meet when an owner's tokens have made so many steps."""
        visited = (owner + way * step) % n
        return (visited, owner) if way > 0 else (owner, visited)

    def is_useful(owner: int, step: int) -> bool:
        queries, keys = sides(owner, step)
        return _sees_any(of_rank[queries], of_rank[keys], band)

    # The last step in which somebody computes with an owner's tokens.
    last = [
        next((step for step in range(n - 1, 0, -1) if is_useful(owner, step)), 0)
        for owner in range(n)
    ]

    def step_of(rank: int, step: int) -> Step:
        here, coming = (rank - way * step) % n, (rank - way * (step + 1)) % n
        before, behind = (rank - way) % n, (rank + way) % n
        goes_on, comes = step < last[here], step < last[coming]
        fetch = Exchange(
            _whole(layout, here, behind) if goes_on else (),
            _whole(layout, coming, before) if comes else (),
        )
        sends, receives = fetch
        if step == last[here] > 0:
            sends = _whole(layout, here, here)
        if step == last[rank] > 0:
            receives += _whole(layout, rank, (rank + way * step) % n)
        calls = Calls()
        if step <= last[here]:
            queries, keys = sides(here, step)
            calls = calls_of(
                held[queries], held[keys], band, own=step == 0, by_position=by_position
            )
        return Step(fetch, calls, Exchange(sends, receives), here)

    num_steps = max(last) + 1
    return PerRank(n, lambda rank: tuple(step_of(rank, step) for step in range(num_steps)))


def _sees_any(queries: dict[int, list[Held]], keys: dict[int, list[Held]], band: Band) -> bool:
    """Whether a query sees a key."""
    return any(
        sees(query.segment, key.segment, band)
        for document in queries.keys() & keys.keys()
        for query in queries[document]
        for key in keys[document]
    )


def _whole(layout: Layout, owner: int, peer: int) -> tuple[Message, ...]:
    """All of an owner's rows, unless it has none."""
    tokens = layout.tokens(owner)
    return (Message(peer, (0, tokens), owner),) if tokens else ()


class Balance(NamedTuple):
    """How evenly ranks share their work, 1 being best.

    Attributes:
        busiest: the work of the busiest rank, over the mean.
        lockstep: the time of ranks that wait for each other after each step, over that of ranks
            with equal work.
    """

    busiest: float
    lockstep: float


def balance(steps: Sequence[tuple[Step, ...]]) -> Balance:
    """The balance of a ring; of ranks without any work, 1."""
    work = [[step.scores for step in of_rank] for of_rank in steps]
    mean = sum(map(sum, work)) / len(work)
    if not mean:
        return Balance(1.0, 1.0)
    return Balance(max(map(sum, work)) / mean, sum(map(max, zip(*work, strict=True))) / mean)


@lru_cache(maxsize=256)
def gathering(layout: Layout, band: Band) -> Sequence[Gathering]:
    """For each rank what it receives, computes and gives back; keys that it does not see stay."""
    n = layout.ranks
    own = [list(zip(layout.rows(r), layout.places(r), strict=True)) for r in range(n)]
    of_rank = [by_document(segments) for segments in layout.segments]

    def is_seen(rank: int, key: Segment) -> bool:
        return any(sees(query, key, band) for _, _, query in of_rank[rank].get(key.document, ()))

    def gathering_of(rank: int) -> Gathering:
        sends, receives = [], []
        others = [peer for peer in range(n) if peer != rank]
        for piece, (rows, _) in zip(layout.segments[rank], own[rank], strict=True):
            sends += [Message(peer, rows, rank) for peer in others if is_seen(peer, piece)]
        for peer in others:
            for piece, (_, place) in zip(layout.segments[peer], own[peer], strict=True):
                if is_seen(rank, piece):
                    receives.append(Message(peer, place, peer))
        fetch, give = _there_and_back(sends, receives)
        arrived = sum(end - begin for _, (begin, end), _ in receives)
        is_whole = arrived + layout.tokens(rank) == layout.seqlen
        calls = _calls_on_whole(layout, rank, band)
        return Gathering(fetch, tuple(own[rank]), calls, give, is_whole)

    return PerRank(n, gathering_of)


def _there_and_back(sends: list[Message], receives: list[Message]) -> tuple[Exchange, Exchange]:
    """An exchange, and that in which all goes back to where it came from."""
    there = Exchange(tuple(sends), tuple(receives))
    return there, Exchange(there.receives, there.sends)


def _calls_on_whole(layout: Layout, rank: int, band: Band) -> Calls:
    """One call for each segment, on its document's keys from the first on.

    They begin there on every rank, so that tiles do, too, and a query's result has the same bits
    on any number of ranks.
    """
    calls = []
    for segment, (begin, _) in zip(layout.segments[rank], layout.rows(rank), strict=True):
        document = Segment(segment.document, 0, layout.lengths[segment.document])
        start = layout.starts[segment.document]
        calls.append(pair(segment, begin, document, start, band, True))
    return Calls(calls)


@lru_cache(maxsize=256)
def regrouping(layout: Layout, size: int) -> Sequence[Regrouping]:
    """For each rank how its group of `size` neighbouring ranks changes tokens for heads.

    A message's peer is its number within the group, its owner a rank of the layout. The tokens of
    a group are those of `layout.merged(size)`, in its order.
    """
    merged = layout.merged(size)

    def regrouping_of(rank: int) -> Regrouping:
        group, me = divmod(rank, size)
        wholes, begins = merged.segments[group], [begin for begin, _ in merged.rows(group)]

        def places(owner: int) -> list[tuple[int, int]]:
            """(begin, end) of each of a rank's segments among the rows of the group."""
            found = []
            for segment in layout.segments[owner]:
                # The last that begins no later: a group's segments are in order.
                at = bisect(wholes, (*segment[:2], layout.seqlen)) - 1
                begin = begins[at] + segment.first - wholes[at].first
                found.append((begin, begin + segment.length))
            return found

        sends, receives = [], []
        for peer in range(size):
            if peer != me:
                owner = group * size + peer
                sends += [Message(peer, rows, rank) for rows in layout.rows(rank)]
                receives += [Message(peer, rows, owner) for rows in places(owner)]
        there, back = _there_and_back(sends, receives)
        own = tuple(zip(layout.rows(rank), places(rank), strict=True))
        return Regrouping(there, back, own, merged.tokens(group))

    return PerRank(layout.ranks, regrouping_of)
