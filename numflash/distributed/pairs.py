"""What a rank's queries see of some rank's keys, as calls of attention. Pure numbers.

A *band* is what a query sees, by position in its document: keys from `left` before it to `right`
after it. A query always sees its own position.
"""

from collections.abc import Sequence
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


class Pack(NamedTuple):
    """Calls that one call of attention makes together: equal windows, and offsets."""

    window: Band
    offset: int
    calls: tuple[Call, ...]


@lru_cache(maxsize=65536)
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
) -> tuple[Call, ...]:
    """The calls of one rank's queries on one rank's keys: few and large.

    Args:
        queries, keys: the segments, each one after the other in its array.
        band: what a query sees.
        own: whether both are the same tokens.
        by_position: whether scores depend on positions (ALiBi, dropout, functions, a bias): then
            only neighbouring tokens share a call.
    """
    if own and not by_position and band == Band(None, 0) and _one_document(queries):
        # What lies between two segments is hidden from neither or both: one triangle.
        n = sum(segment.length for segment in queries)
        first = queries[0].first if queries else 0
        triangle = Call(
            (0, n), (0, n), 0, band, (first, first), _document(queries), True, n * (n + 1) // 2
        )
        return (triangle,) if n else ()
    found, q_begin = [], 0
    for i, query in enumerate(queries):
        k_begin = 0
        for j, key in enumerate(keys):
            if query.document == key.document:
                call = pair(query, q_begin, key, k_begin, band, own and i == j)
                found += [call] if call else []
            k_begin += key.length
        q_begin += query.length
    if not by_position:
        for side in ("k", "q"):
            found = _joined(found, side)
    return tuple(found)


def pair(
    query: Segment, q_begin: int, key: Segment, k_begin: int, band: Band, is_own: bool
) -> Call | None:
    """The call of two segments of one document, or None where nothing is seen.

    Rows that see nothing at either end, and keys that nobody sees behind the last that is seen,
    are left out. Keys before the first that is seen stay: kernels skip whole tiles of them, and
    where tiles begin decides the bits of a result.
    """
    num_q, num_k, shift = query.length, key.length, query.first - key.first
    first, last = 0, num_q
    if band.right is not None:
        first = max(first, -shift - band.right)
    if band.left is not None:
        last = min(last, num_k + band.left - shift)
    if first >= last:
        return None
    seen = num_k if band.right is None else min(num_k, last + shift + band.right)
    if seen <= 0:
        return None
    num_q, shift = last - first, shift + first
    scores = visible(shift, num_q, seen, band)
    if not scores:
        return None
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


def packs(calls: Sequence[Call], by_position: bool) -> tuple[Pack, ...]:
    """Calls of several documents, put together where attention can make them in one call."""
    if by_position or len({call.document for call in calls}) < 2:
        return tuple(Pack(call.window, call.offset, (call,)) for call in calls)
    found: dict[tuple, list[Call]] = {}
    rows: dict[tuple, list[tuple[int, int]]] = {}
    for call in calls:
        key, number = (call.window, call.offset, call.is_own), 0
        # Rows that are in one call twice would be written twice.
        while any(_meet(call.q, q) for q in rows.get((*key, number), ())):
            number += 1
        found.setdefault((*key, number), []).append(call)
        rows.setdefault((*key, number), []).append(call.q)
    return tuple(Pack(key[0], key[1], tuple(group)) for key, group in found.items())


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _up_to(past: int, num_q: int, num_k: int) -> int:
    """The number of keys j < i + past, for i from 0 to num_q - 1, with 0 <= j < num_k."""

    def below(end: int) -> int:
        """The sum of min(max(t, 0), num_k) over t < end."""
        rising = min(max(end, 0), num_k + 1)
        return rising * (rising - 1) // 2 + max(0, end - num_k - 1) * num_k

    return below(past + num_q) - below(past)


def _one_document(segments: Sequence[Segment]) -> bool:
    rising = all(a.end <= b.first for a, b in pairwise(segments))
    return len({segment.document for segment in segments}) <= 1 and rising


def _document(segments: Sequence[Segment]) -> int:
    return segments[0].document if segments else 0


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
