"""Which rank holds which tokens: pure numbers, without arrays.

A document is a sequence of its own: a token sees no other's. A segment is a run of neighbouring
tokens of one document. A rank's tokens are its segments, one after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Integral
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Neighbouring tokens of one document.

    Attributes:
        document: its number.
        first: the position of its first token in the document.
        length: of its tokens.

    Example:
        >>> from numflash.distributed import Layout
        >>> Layout.contiguous(16, ranks=2).segments[1]
        (Segment(document=0, first=8, length=8),)
    """

    document: int
    first: int
    length: int

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.first + self.length


@dataclass(frozen=True)
class Layout:
    """Which rank holds which tokens of a sequence, or of several documents.

    Made by `zigzag`, `zigzag_documents`, `contiguous` and `of_segments`. Two layouts of equal
    segments are equal, and schedules are kept for each.

    Attributes:
        lengths: of the documents, in tokens; one sequence is one document.
        segments: for each rank its `Segment`s, in the order in which it holds them.

    Example:
        >>> from numflash.distributed import Layout
        >>> layout = Layout.zigzag(16, ranks=2)
        >>> layout.positions(0).tolist()
        [0, 1, 2, 3, 12, 13, 14, 15]
    """

    lengths: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]

    @classmethod
    def zigzag(cls, seqlen: int, ranks: int, *, multiple: int = 1) -> "Layout":
        """One sequence in 2 * ranks chunks: rank r holds chunks r and 2 * ranks - 1 - r.

        Under a causal mask every rank then has the same work. It is the order that PyTorch calls
        head-tail.

        Args:
            seqlen: tokens; the chunks differ by `multiple` at most.
            ranks: how many.
            multiple: chunks begin at multiples of so many tokens.

        Raises:
            TypeError, ValueError: not whole numbers, or fewer ranks than one.
        """
        return cls.zigzag_documents([seqlen], ranks, multiple=multiple)

    @classmethod
    def zigzag_documents(
        cls, lengths: Iterable[int], ranks: int, *, multiple: int = 1
    ) -> "Layout":
        """Each document in 2 * ranks chunks, as `zigzag` has one; arguments and errors as there.

        Packed documents are balanced only if each of them is cut.
        """
        lengths, ranks, multiple = _checked(lengths, ranks, multiple)
        held: list[list[Segment]] = [[] for _ in range(ranks)]
        for document, length in enumerate(lengths):
            at = _cut(length, 2 * ranks, multiple)
            for rank in range(ranks):
                for chunk in (rank, 2 * ranks - 1 - rank):
                    held[rank].append(Segment(document, at[chunk], at[chunk + 1] - at[chunk]))
        return cls(lengths, tuple(map(_joined, held)))

    @classmethod
    def contiguous(cls, seqlen: int | Iterable[int], ranks: int, *, multiple: int = 1) -> "Layout":
        """The sequence, or the documents as they follow each other, in one piece for each rank.

        The order for windows and for full masks; under a causal mask the last rank has the most
        work. Arguments and errors as of `zigzag`; seqlen may be the lengths of documents.
        """
        given = seqlen if isinstance(seqlen, Iterable) else [seqlen]
        lengths, ranks, multiple = _checked(given, ranks, multiple)
        at = _cut(sum(lengths), ranks, multiple)
        starts = list(accumulate(lengths, initial=0))
        held = []
        for begin, end in pairwise(at):
            pieces = []
            for document, (start, stop) in enumerate(pairwise(starts)):
                first, last = max(begin, start), min(end, stop)
                pieces.append(Segment(document, first - start, max(0, last - first)))
            held.append(_joined(pieces))
        return cls(lengths, tuple(held))

    @classmethod
    def of_segments(
        cls, lengths: Iterable[int], segments: Sequence[Sequence[tuple[int, int, int]]]
    ) -> "Layout":
        """A layout of the caller's own.

        Args:
            lengths: of the documents.
            segments: for each rank (document, position of the first token, length), in the order
                in which it holds them.

        Raises:
            TypeError: not whole numbers.
            ValueError: no ranks; a token that no rank holds, or two do; a segment outside its
                document.
        """
        lengths, _, _ = _checked(lengths, len(segments), 1)
        held = []
        for rank, pieces in enumerate(segments):
            for piece in pieces:
                _expect_segment(rank, piece, lengths)
            held.append(_joined([Segment(*map(int, piece)) for piece in pieces]))
        layout = cls(lengths, tuple(held))
        layout._expect_every_token_once()
        return layout

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.segments)

    @property
    def seqlen(self) -> int:
        """Tokens of all documents."""
        return self.starts[-1] + self.lengths[-1] if self.lengths else 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: schedules are looked up at each call, and layouts may be long."""
        return hash((self.lengths, self.segments))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """For each document the global row of its first token: documents follow each other."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    def tokens(self, rank: int) -> int:
        """How many tokens a rank holds.

        Raises:
            ValueError: no such rank; as all that take one.
        """
        self._expect_rank(rank)
        return self._tokens[rank]

    @cached_property
    def _tokens(self) -> tuple[int, ...]:
        return tuple(sum(segment.length for segment in held) for held in self.segments)

    def rows(self, rank: int) -> list[tuple[int, int]]:
        """(begin, end) of each of a rank's segments among its own rows."""
        self._expect_rank(rank)
        ends = accumulate((s.length for s in self.segments[rank]), initial=0)
        return list(pairwise(ends))

    def places(self, rank: int) -> list[tuple[int, int]]:
        """(begin, end) of each of a rank's segments among the global rows."""
        self._expect_rank(rank)
        found = []
        for segment in self.segments[rank]:
            begin = self.starts[segment.document] + segment.first
            found.append((begin, begin + segment.length))
        return found

    def positions(self, rank: int) -> np.ndarray:
        """The position of each of a rank's tokens in its document: what rotary embeddings take.

        Returns:
            (tokens,) int32, on the host.
        """
        self._expect_rank(rank)
        parts = [np.arange(s.first, s.end, dtype=np.int32) for s in self.segments[rank]]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def indices(self, rank: int) -> np.ndarray:
        """The global row of each of a rank's tokens: (tokens,) int64, on the host."""
        parts = [np.arange(begin, end) for begin, end in self.places(rank)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def shard(self, x, rank: int, axis: int = 1):
        """A rank's part of a whole array.

        Args:
            x: an array of any library with the global tokens along `axis`, documents one after
                the other.
            rank: whose part.
            axis: of the tokens.

        Returns:
            a view where the rank holds one segment, else a copy.

        Raises:
            ValueError: another number of tokens, no such rank.
        """
        from numflash.distributed import arrays

        return arrays.shard(self, x, rank, axis)

    def gather(self, x, comm, axis: int = 1):
        """The whole array, from every rank's part of it; each rank calls this with its own.

        Args:
            x: (..., tokens of this rank, ...), its dtype and other axes the same on all ranks.
            comm: a communicator of `ranks` ranks.
            axis: of the tokens.

        Returns:
            a new array with the global tokens along `axis`; the inverse of `shard`.

        Raises:
            ValueError: another number of tokens than the layout gives this rank.
        """
        from numflash.distributed import arrays

        return arrays.gather(self, x, comm, axis)

    def merged(self, size: int) -> "Layout":
        """The layout of groups of `size` neighbouring ranks, each group as one rank.

        A group's segments are ordered by document and position; those that meet become one.

        Raises:
            ValueError: groups of another size are left over.
        """
        expect_whole("size", size, 1)
        if self.ranks % size:
            raise ValueError(f"size must divide the number of ranks, {self.ranks}, got {size}")
        groups = range(0, self.ranks, size)
        held = [sorted(sum(self.segments[first : first + size], ())) for first in groups]
        return Layout(self.lengths, tuple(map(_joined, held)))

    def _expect_rank(self, rank: int) -> None:
        """Raises ValueError."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be from 0 to {self.ranks - 1}, got {rank}")

    def _expect_every_token_once(self) -> None:
        """Raises ValueError."""
        ends = [0] * len(self.lengths)
        for segment in sorted(sum(self.segments, ())):
            expected = ends[segment.document]
            if segment.first != expected:
                what = "nobody holds" if segment.first > expected else "two ranks hold"
                token = min(segment.first, expected)
                raise ValueError(
                    f"every token must be on one rank; {what} token {token} of document "
                    f"{segment.document}"
                )
            ends[segment.document] = segment.end
        for document, (end, length) in enumerate(zip(ends, self.lengths, strict=True)):
            if end < length:
                raise ValueError(
                    f"every token must be on one rank; nobody holds token {end} of document "
                    f"{document}"
                )


def _joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Without empty segments, and those that continue each other as one."""
    found: list[Segment] = []
    for segment in segments:
        if not segment.length:
            continue
        last = found[-1] if found else None
        if last is not None and (last.document, last.end) == segment[:2]:
            found[-1] = Segment(*last[:2], last.length + segment.length)
        else:
            found.append(segment)
    return tuple(found)


def _cut(length: int, parts: int, multiple: int) -> list[int]:
    """The bounds of `parts` chunks, which begin at multiples and differ by `multiple` at most."""
    units = -(-length // multiple)
    return [min(length, units * i // parts * multiple) for i in range(parts + 1)]


def _checked(lengths, ranks, multiple) -> tuple[tuple[int, ...], int, int]:
    """Raises TypeError, ValueError."""
    if not isinstance(lengths, Iterable):
        raise TypeError(
            f"lengths must be those of the documents, got {lengths!r} ({type(lengths).__name__})"
        )
    lengths = tuple(lengths)
    for length in lengths:
        expect_whole("a length", length, 0)
    expect_whole("ranks", ranks, 1)
    expect_whole("multiple", multiple, 1)
    return tuple(map(int, lengths)), int(ranks), int(multiple)


def expect_whole(name: str, value, least: int) -> None:
    """Check a number. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _expect_segment(rank: int, piece, lengths: tuple[int, ...]) -> None:
    """Raises TypeError, ValueError."""
    name = f"a segment of rank {rank}"
    if not isinstance(piece, tuple | list) or len(piece) != 3:
        raise TypeError(f"{name} must be (document, first position, length), got {piece!r}")
    for part, number in zip(("document", "first position", "length"), piece, strict=True):
        expect_whole(f"the {part} of {name}", number, 0)
    document, first, length = piece
    if document >= len(lengths):
        raise ValueError(f"{name} must be of one of {len(lengths)} documents, got {piece!r}")
    if first + length > lengths[document]:
        raise ValueError(
            f"{name} must lie inside document {document}, of {lengths[document]} tokens, got "
            f"{piece!r}"
        )
