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

from functools import lru_cache
from typing import NamedTuple

from numflash.distributed.layouts import Layout, Segment
from numflash.distributed.pairs import Band, Call, calls_of, pair


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
    calls: tuple[Call, ...]
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
    calls: tuple[Call, ...]
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


@lru_cache(maxsize=256)
def ring(layout: Layout, band: Band, by_position: bool = False) -> tuple[tuple[Step, ...], ...]:
    """For each rank its steps of a ring in which keys and values travel, and their gradients.

    In step s rank r has the keys of rank r - s. They go on to r + 1 as long as a later step sees
    any of them. Gradients follow one step behind, and go home from the last step that has added
    to them. The forward leaves `give` out.
    """
    return _ring(layout, band, by_position, 1)


@lru_cache(maxsize=256)
def ring_of_queries(
    layout: Layout, band: Band, by_position: bool = False
) -> tuple[tuple[Step, ...], ...]:
    """For each rank its steps of a ring in which queries travel, and their gradients.

    The mirror of `ring`: in step s rank r has the queries of rank r + s, and sends them to r - 1.
    """
    return _ring(layout, band, by_position, -1)


def _ring(layout, band, by_position, way) -> tuple[tuple[Step, ...], ...]:
    n, held = layout.ranks, layout.segments

    def calls_at(owner: int, step: int) -> tuple[Call, ...]:
        visited = held[(owner + way * step) % n]
        queries, keys = (visited, held[owner]) if way > 0 else (held[owner], visited)
        return calls_of(queries, keys, band, own=step == 0, by_position=by_position)

    calls = [[calls_at(owner, step) for step in range(n)] for owner in range(n)]
    # The last step in which somebody computes with an owner's tokens.
    last = [max((s for s in range(n) if calls[owner][s]), default=0) for owner in range(n)]
    steps: list[list[Step]] = [[] for _ in range(n)]
    for step in range(max(last, default=0) + 1):
        for rank in range(n):
            here, coming = (rank - way * step) % n, (rank - way * (step + 1)) % n
            before, behind = (rank - way) % n, (rank + way) % n
            fetch = Exchange(
                _whole(layout, here, behind) if step < last[here] else (),
                _whole(layout, coming, before) if step < last[coming] else (),
            )
            onwards, home = step < last[here], step == last[here] > 0
            sends = _whole(layout, here, behind if onwards else here) if onwards or home else ()
            receives = _whole(layout, coming, before) if step < last[coming] else ()
            if step == last[rank] > 0:
                receives += _whole(layout, rank, (rank + way * step) % n)
            work = calls[here][step] if step <= last[here] else ()
            steps[rank].append(Step(fetch, work, Exchange(sends, receives), here))
    return tuple(map(tuple, steps))


def _whole(layout: Layout, owner: int, peer: int) -> tuple[Message, ...]:
    """All of an owner's rows, unless it has none."""
    tokens = layout.tokens(owner)
    return (Message(peer, (0, tokens), owner),) if tokens else ()


@lru_cache(maxsize=256)
def gathering(layout: Layout, band: Band) -> tuple[Gathering, ...]:
    """For each rank what it receives, computes and gives back; keys that it does not see stay."""
    n, held = layout.ranks, layout.segments
    fetches = [([], []) for _ in range(n)]
    for source in range(n):
        for piece, own, place in zip(
            held[source], layout.rows(source), layout.places(source), strict=True
        ):
            for rank in range(n):
                if rank != source and _is_seen(held[rank], piece, band):
                    fetches[source][0].append(Message(rank, own, source))
                    fetches[rank][1].append(Message(source, place, source))
    found = []
    for rank in range(n):
        sends, receives = map(tuple, fetches[rank])
        # Gradients go the other way. A message's owner is whose tokens it has, in both.
        give = Exchange(receives, sends)
        own = tuple(zip(layout.rows(rank), layout.places(rank), strict=True))
        arrived = sum(end - begin for _, (begin, end), _ in receives)
        is_whole = arrived + layout.tokens(rank) == layout.seqlen
        calls = _calls_on_whole(layout, rank, band)
        found.append(Gathering(Exchange(sends, receives), own, calls, give, is_whole))
    return tuple(found)


def _is_seen(queries: tuple[Segment, ...], key: Segment, band: Band) -> bool:
    return any(
        query.document == key.document and pair(query, 0, key, 0, band, False) for query in queries
    )


def _calls_on_whole(layout: Layout, rank: int, band: Band) -> tuple[Call, ...]:
    """One call for each segment, on its document's keys from the first on.

    They begin there on every rank, so that tiles do, too, and a query's result has the same bits
    on any number of ranks.
    """
    calls = []
    for segment, (begin, _) in zip(layout.segments[rank], layout.rows(rank), strict=True):
        document = Segment(segment.document, 0, layout.lengths[segment.document])
        start = layout.starts[segment.document]
        calls.append(pair(segment, begin, document, start, band, True))
    return tuple(calls)


@lru_cache(maxsize=256)
def regrouping(layout: Layout, size: int) -> tuple[Regrouping, ...]:
    """For each rank how its group of `size` neighbouring ranks changes tokens for heads.

    A message's peer is its number within the group. The tokens of a group are those of
    `layout.merged(size)`, in its order.
    """
    merged, found = layout.merged(size), []
    for rank in range(layout.ranks):
        first, me = rank - rank % size, rank % size
        group = rank // size
        mine = _places_in(merged, group, layout.segments[rank])
        sends, receives = [], []
        for peer in range(size):
            if peer == me:
                continue
            theirs = layout.segments[first + peer]
            sends += [Message(peer, rows, rank) for rows in layout.rows(rank)]
            receives += [
                Message(peer, rows, first + peer) for rows in _places_in(merged, group, theirs)
            ]
        there, back = (
            Exchange(tuple(sends), tuple(receives)),
            Exchange(tuple(receives), tuple(sends)),
        )
        own = tuple(zip(layout.rows(rank), mine, strict=True))
        found.append(Regrouping(there, back, own, merged.tokens(group)))
    return tuple(found)


def _places_in(merged: Layout, group: int, segments: tuple[Segment, ...]) -> list[tuple[int, int]]:
    """(begin, end) of each segment among the rows of a group."""
    found = []
    for segment in segments:
        for whole, (begin, _) in zip(merged.segments[group], merged.rows(group), strict=True):
            if whole.document == segment.document and whole.first <= segment.first < whole.end:
                at = begin + segment.first - whole.first
                found.append((at, at + segment.length))
    return found
