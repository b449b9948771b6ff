"""What a rank's queries see of some rank's keys, as calls of attention. Pure numbers.

A *band* is what a query sees, by position in its document: keys from `left` before it to `right`
after it. A query always sees its own position.
"""

from bisect import bisect
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from numflash.distributed.layouts import Segment


class Band(NamedTuple):
    """A query at position i sees the keys at i - left up to i + right; None is no limit."""

    left: int | None = None
    right: int | None = None

    @classmethod
    def of(cls, causal: bool, window_size: tuple[int | None, int | None]) -> "Band":
        """The band of `attention`'s options."""
        left, right = (None if side in (None, -1) else int(side) for side in window_size)
        return cls(left, 0 if causal else right)


class Call(NamedTuple):
    """One call of attention, on rows of a rank's queries and of some keys.

    Attributes:
        q, k: (begin, end) of its rows, in the array of the queries and in that of the keys.
        shift: the first query's position less the first key's; 0 if all see all.
        window: (left, right) around a query's position, None for no limit.
        origin: the positions of the first query and the first key in their document.
        document: whose tokens these are.
        is_own: whether the keys are those of the queries' own positions, which a query has in one
            call only: there its sink joins its sum.
        scores: how many are visible.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    shift: int
    window: Band
    origin: tuple[int, int]
    document: int
    is_own: bool
    scores: int

    @property
    def offset(self) -> int:
        """`shift`, for causal_align="bottom_right"."""
        if self.window == Band():
            return 0
        return self.shift + (self.q[1] - self.q[0]) - (self.k[1] - self.k[0])


class Calls(tuple[Call, ...]):
    """Calls, hashed once: what is made of them is kept, and looked up at each step."""

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


class Pack(NamedTuple):
    """Calls that one call of attention makes together.

    Attributes:
        window: of each of them.
        offset: of each of them, unless scores depend on positions.
        calls: no query is in two.
    """

    window: Band
    offset: int
    calls: Calls


class Held(NamedTuple):
    """A segment among others.

    Attributes:
        number: its place in their list.
        begin: its first row in their array.
        segment: itself.
    """

    number: int
    begin: int
    segment: Segment


def by_document(segments: Iterable[Segment]) -> dict[int, list[Held]]:
    """The segments of each document, in their order."""
    found: dict[int, list[Held]] = {}
    begin = 0
    for number, segment in enumerate(segments):
        found.setdefault(segment.document, []).append(Held(number, begin, segment))
        begin += segment.length
    return found


def sees(query: Segment, key: Segment, band: Band) -> bool:
    """Whether a query of one segment sees a key of the other, both of one document."""
    return (band.right is None or key.first < query.end + band.right) and (
        band.left is None or query.first - band.left < key.end
    )


def visible(shift: int, num_q: int, num_k: int, band: Band) -> int:
    """How many of num_q x num_k scores are visible, with the first query `shift` after key 0."""
    whole = num_q * num_k
    ahead = whole if band.right is None else _up_to(shift + band.right + 1, num_q, num_k)
    behind = 0 if band.left is None else _up_to(shift - band.left, num_q, num_k)
    return max(0, ahead - behind)


def calls_of(
    queries: Sequence[Segment],
    keys: Sequence[Segment],
    band: Band,
    *,
    own: bool,
    by_position: bool = False,
) -> Calls:
    """The calls of one rank's queries on one rank's keys: few and large.

    Args:
        queries, keys: the segments, each one after the other in its array.
        band: what a query sees.
        own: whether both are the same tokens.
        by_position: whether scores depend on positions (ALiBi, dropout, functions, a bias): then
            only neighbouring tokens share a call.
    """
    if own and queries and not by_position and band == Band(None, 0) and _is_rising(queries):
        # What lies between two segments is hidden from neither or both: one triangle.
        n, (document, first, _) = sum(segment.length for segment in queries), queries[0]
        scores, at = n * (n + 1) // 2, (first, first)
        return Calls([Call((0, n), (0, n), 0, band, at, document, True, scores)])
    found, q_begin, of_document = [], 0, by_document(keys)
    for i, query in enumerate(queries):
        for j, k_begin, key in of_document.get(query.document, ()):
            call = pair(query, q_begin, key, k_begin, band, own and i == j)
            if call:
                found.append(call)
        q_begin += query.length
    if not by_position:
        for side in ("k", "q"):
            found = _joined(found, side)
    return Calls(found)


def pair(
    query: Segment, q_begin: int, key: Segment, k_begin: int, band: Band, is_own: bool
) -> Call | None:
    """The call of two segments of one document, or None where nothing is seen.

    Rows that see nothing, and keys behind the last that is seen, are left out. Keys before the
    first that is seen stay: kernels skip whole tiles of them, and where tiles begin decides the
    bits of a result.
    """
    if not sees(query, key, band):
        return None
    shift, first, last, seen = query.first - key.first, 0, query.length, key.length
    if band.right is not None:
        first = max(first, -shift - band.right)
    if band.left is not None:
        last = min(last, seen + band.left - shift)
    if band.right is not None:
        seen = min(seen, last + shift + band.right)
    num_q, shift = last - first, shift + first
    scores = visible(shift, num_q, seen, band)
    whole = scores == num_q * seen
    return Call(
        (q_begin + first, q_begin + last),
        (k_begin, k_begin + seen),
        0 if whole else shift,
        Band() if whole else band,
        (query.first + first, key.first),
        query.document,
        is_own,
        scores,
    )


@lru_cache(maxsize=4096)
def packs(calls: Calls, apart: bool, by_position: bool = False) -> tuple[Pack, ...]:
    """Calls put together where attention can make them in one call.

    Args:
        calls: of one step.
        apart: whether each call stays alone, as calls of one document do anyway.
        by_position: as of `calls_of`: then only calls that begin where their documents do are
            put together, for the origin of a call is that of all its sequences.
    """
    if apart or len({call.document for call in calls}) < 2:
        return tuple(Pack(call.window, call.offset, Calls([call])) for call in calls)
    found: dict[tuple, list[_Apart]] = {}
    for number, call in enumerate(calls):
        kind = call.window, call.offset, call.is_own
        if by_position:
            kind = (call.window, 0) if call.origin == (0, 0) else (number,)
        groups = found.setdefault(kind, [])
        if not any(group.add(call) for group in groups):
            groups.append(_Apart(call))
    return tuple(
        Pack(group.calls[0].window, group.calls[0].offset, Calls(group.calls))
        for groups in found.values()
        for group in groups
    )


class _Apart:
    """Calls of which no two have the same query: a row that two of them write would be lost."""

    def __init__(self, call: Call):
        self.calls, self._rows = [call], [call.q]

    def add(self, call: Call) -> bool:
        """Whether the call could be added."""
        at = bisect(self._rows, call.q)
        if at and self._rows[at - 1][1] > call.q[0]:
            return False
        if at < len(self._rows) and self._rows[at][0] < call.q[1]:
            return False
        self._rows.insert(at, call.q)
        self.calls.append(call)
        return True


def _up_to(past: int, num_q: int, num_k: int) -> int:
    """The number of keys j < i + past, for i from 0 to num_q - 1, with 0 <= j < num_k."""

    def below(end: int) -> int:
        """The sum of min(max(t, 0), num_k) over t < end."""
        rising = min(max(end, 0), num_k + 1)
        return rising * (rising - 1) // 2 + max(0, end - num_k - 1) * num_k

    return below(past + num_q) - below(past)


def _is_rising(segments: Sequence[Segment]) -> bool:
    """Whether these are segments of one document, by position."""
    return all(a.document == b.document and a.end <= b.first for a, b in pairwise(segments))


def _joined(calls: list[Call], side: str) -> list[Call]:
    """Neighbouring calls that see everything, as one: along the keys ("k") or the queries."""
    other, found = {"k": "q", "q": "k"}[side], []
    for call in calls:
        last = found[-1] if found else None
        meets = (
            last is not None
            and last.window == call.window == Band()
            and getattr(last, other) == getattr(call, other)
            and getattr(last, side)[1] == getattr(call, side)[0]
            and last.document == call.document
        )
        if meets and (side == "k" or last.is_own == call.is_own):
            rows = getattr(last, side)[0], getattr(call, side)[1]
            scores, is_own = last.scores + call.scores, last.is_own or call.is_own
            found[-1] = last._replace(**{side: rows}, scores=scores, is_own=is_own)
        else:
            found.append(call)
    return found
