"""Sequences with lengths of their own: what a caller gives, checked, and the lists of their tiles.

Lengths lie on the device and are never read here: all that is decided on the host follows from
the shapes of arrays.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView

NAMES = tuple(
    f"{kind}_{side}" for kind in ("cu_seqlens", "seqlens", "starts") for side in ("q", "k")
)
"""The arrays that say where sequences lie."""
MAX_ENTRIES = 2**20
"""The number of a sequence has 20 bits in a record."""
NO_LIMIT = 2**29
"""The band's `hi` where nothing limits it, and `lo` with the other sign."""
MAX_SPLITS = 2**11
"""The number of a split has 11 bits in a record."""
HEADER_WORDS = RECORD_WORDS = 8
MAX_ROWS = 2**28
_MAX_RECORDS = 2**27


class Lengths(NamedTuple):
    """The sequences of a call in numbers; their lengths lie on the device.

    Attributes:
        entries: sequences.
        bound_q, bound_k: rows of packed arrays, or of an entry of padded ones.
        packed: whether all sequences lie in one array; else each has an entry of a batch.
        given: which of `NAMES` the caller gives, in this order.
        most_q, most_k: rows that a sequence has at most, because a bias or a mask has no more.
        added_k: keys that each sequence has besides those that seqlens_k counts.
        with_start_k: whether seqlens_k counts from row 0, and not from the start.
    """

    entries: int
    bound_q: int
    bound_k: int
    packed: bool
    given: tuple[str, ...]
    most_q: int = MAX_ROWS
    most_k: int = MAX_ROWS
    added_k: int = 0
    with_start_k: bool = False

    def bound(self, side: str) -> int:
        """bound_q of "q", bound_k of "k"."""
        return self.bound_q if side == "q" else self.bound_k

    def most(self, side: str) -> int:
        """The most rows that a sequence has."""
        return min(self.bound(side), self.most_q if side == "q" else self.most_k)


class ListShape(NamedTuple):
    """All that a list of tiles depends on besides lengths.

    Attributes:
        tile: rows of a tile; of queries with the rows of packed heads, or of keys.
        stage: of the other side, in which a tile's work is counted.
        pack: query heads of a token that are neighbouring rows; 1 in lists by keys.
        by_keys: whether tiles are of keys, and their work of queries.
        lo, hi: the band: query i sees the keys j with lo <= j - i <= hi.
        aligned: 1 where the band ends at the last query and the last key, else 0.
        least: tiles of `stage` in a split: one ends at each multiple of it, counted from the first
            key of a sequence. 0: tiles are not split.
        shares: the device makes splits longer than `least`, so that all tiles together have at
            most so many more records; 0: they have `least`, whatever the lengths are.
        in_turn: whether the tiles of a sequence come one after the other, the last rows first, and
            the sequences of most tiles first. Such tiles are not split.
    """

    tile: int
    stage: int
    pack: int = 1
    by_keys: bool = False
    lo: int = -NO_LIMIT
    hi: int = NO_LIMIT
    aligned: int = 0
    least: int = 0
    shares: int = 0
    in_turn: bool = False

    @property
    def name(self) -> str:
        """The name of its operand in a call."""
        kind = "-of-keys" if self.by_keys else ""
        splits = f"-splits{self.least}-{self.shares}" if self.least else ""
        order = "-in-turn" if self.in_turn else ""
        return f"tiles{self.tile}x{self.stage}x{self.pack}{kind}{splits}{order}"

    @property
    def slots(self) -> str:
        """The name of the operand that says where the part of each record goes."""
        return f"slots-of-{self.name}"

    @property
    def split_tiles(self) -> str:
        """The name of the operand that lists the tiles that are split."""
        return f"split-{self.name}"

    @property
    def tiles_before(self) -> str:
        """The name of the operand that has the number of tiles before each sequence."""
        return f"tiles-before-{self.name}"

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of all operands that are made for it."""
        if self.least:
            return self.name, self.split_tiles, self.slots
        return (self.name, self.tiles_before) if self.in_turn else (self.name,)


class ListRoom(NamedTuple):
    """The most that a list may have, whatever the lengths are.

    Attributes:
        tiles: tiles of rows.
        records: records; more than tiles where these are split.
        slots: parts of tiles that are split.
        split_tiles: tiles that are split.
        least: tiles in a split, at least: as many as number splits in 11 bits.
    """

    tiles: int
    records: int
    slots: int = 0
    split_tiles: int = 0
    least: int = 0


def lengths_of(
    views: Mapping[str, ArrayView],
    bounds: tuple[int, int],
    device: int,
    *,
    batch: int | None = None,
    paged: bool = False,
) -> Lengths:
    """Check what a caller says of sequences.

    Args:
        views: of the arrays that are given, by their names in `NAMES`.
        bounds: rows of q and of k.
        device: of q.
        batch: entries of padded arrays; None: the arrays are packed.
        paged: whether keys lie in pages, where each sequence has row 0 of its own.

    Raises:
        TypeError: an array that is not int32.
        ValueError: an array of a wrong shape, strides or device, or one too few.
        UnsupportedError: too many sequences or rows.
    """
    views = {name: views[name] for name in NAMES if name in views}
    for name, view in views.items():
        expect_list(name, view, device)
    if batch is None:
        _expect_whole(views, paged)
    entries, named = _entries_of(views, batch)
    for name, view in views.items():
        extra = int(name.startswith("cu_seqlens"))
        if view.shape[0] != entries + extra:
            more = ", one more than that," if extra else ""
            raise ValueError(
                f"{name} must have {entries + extra} elements{more} for the {entries} sequences "
                f"of {named}, got {view.shape[0]}"
            )
    if entries > MAX_ENTRIES:
        raise UnsupportedError(
            f"{named} has {entries} sequences; a call has at most {MAX_ENTRIES}"
        )
    for side, bound in zip("qk", bounds, strict=True):
        if bound >= MAX_ROWS:
            raise UnsupportedError(f"{side} has {bound} rows; it must have fewer than {MAX_ROWS}")
    return Lengths(entries, *bounds, batch is None, tuple(views))


def room_of(lengths: Lengths, shape: ListShape) -> ListRoom:
    """The room that a list needs, from the shapes of arrays alone.

    Raises:
        UnsupportedError: more records than a list has, or more splits than a record can number.
    """
    own, other = lengths.bound_q, lengths.bound_k
    if shape.by_keys:
        own, other = other, own
    rows, tile, entries = own * shape.pack, shape.tile, lengths.entries
    tiles_of_one = -(-rows // tile)
    tiles = entries * tiles_of_one
    if lengths.packed:
        # Each sequence has a last tile that its rows may not fill.
        tiles = min(tiles, (rows + entries * (tile - 1)) // tile)
    room = ListRoom(tiles, tiles)
    if shape.least:
        work = -(-other // shape.stage)
        least = max(shape.least, -(-work // MAX_SPLITS))
        if least > shape.least and not shape.shares:
            keys = shape.least * shape.stage
            raise UnsupportedError(
                f"with batch_invariant=True keys are split at multiples of {keys}, at most into "
                f"{MAX_SPLITS} splits; k has {other} rows, which one sequence may have, more than "
                f"{MAX_SPLITS * keys}"
            )
        more = tiles * (max(1, -(-work // least)) - 1)
        # What a band begins with may end at the first multiple already.
        torn = 0 if _begins_at_zero(shape) else tiles
        side = "q" if shape.by_keys else "k"
        overlaps = {f"seqlens_{side}", f"starts_{side}"} & set(lengths.given)
        if lengths.packed and not overlaps:
            # Sequences that follow each other have no more of the other side than there is.
            more = min(more, tiles_of_one * (other // (least * shape.stage)) + torn)
        if shape.shares:
            more = min(more, shape.shares + torn)
        split = min(tiles, more)
        # A tile that is split has a part more than records it adds.
        room = ListRoom(tiles, tiles + more, more + split, split, least)
    if room.records > _MAX_RECORDS or rows + tile > 2**31 - 1:
        raise UnsupportedError(
            f"{entries} sequences of {rows} rows have up to {room.records} records of tiles of "
            f"{tile}; a list has at most {_MAX_RECORDS}"
        )
    return room


def expect_inside(
    lengths: Lengths, numbers: Mapping[str, np.ndarray], sides: tuple[str, ...] = ("q", "k")
) -> None:
    """Check the numbers themselves, which a caller has read back from the device.

    Args:
        lengths: of the call.
        numbers: the arrays of `lengths.given` on the host.
        sides: of packed arrays those whose rows must not belong to two sequences, because each
            sequence writes its own.

    Raises:
        ValueError: a sequence leads out of its array, or two have a row in common.
    """
    for side in "qk":
        names = [name for name in lengths.given if name.endswith(f"_{side}")]
        bound, what = lengths.bound(side), ", ".join(names)
        first, length = _extents(lengths, side, numbers)
        end = first + length
        for number in np.flatnonzero((first < 0) | (length < 0) | (end > bound)):
            raise ValueError(
                f"{what} must lie within the {bound} rows of {side}, got {length[number]} rows "
                f"from row {first[number]} on for sequence {number}"
            )
        for number in np.flatnonzero(length > lengths.most(side)):
            raise ValueError(
                f"{what} must give a sequence at most the {lengths.most(side)} rows of {side} "
                f"that bias or mask has, got {length[number]} for sequence {number}"
            )
        if not lengths.packed or side not in sides:
            continue
        order = np.argsort(first, kind="stable")
        order = order[length[order] > 0]
        for one, other in pairwise(order):
            if end[one] > first[other]:
                raise ValueError(
                    f"{what} must give each row of {side} to one sequence, got sequences {one} "
                    f"and {other} both with row {first[other]}"
                )


def _extents(
    lengths: Lengths, side: str, numbers: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(first rows, lengths) of all sequences, as the caller says them."""
    cumulative, given, starts = (
        None if f"{kind}_{side}" not in numbers else numbers[f"{kind}_{side}"].astype(np.int64)
        for kind in ("cu_seqlens", "seqlens", "starts")
    )
    first = np.zeros(lengths.entries, np.int64)
    length = None if cumulative is None else np.diff(cumulative)
    if starts is not None:
        first = starts
    elif cumulative is not None:
        first = cumulative[:-1]
    if given is not None:
        length = given
        if side == "k":
            length = given + lengths.added_k - first * lengths.with_start_k
    return first, lengths.bound(side) - first if length is None else length


def most_records(lengths: Lengths, shape: ListShape) -> int:
    """The number of records that a list may have. Raises UnsupportedError as `room_of`."""
    return room_of(lengths, shape).records


def words_of_list(lengths: Lengths, shape: ListShape) -> int:
    """32-bit words of a list and of what its kernel needs while it makes it.

    32 bytes, 32 for each record, and 4 for each sequence. Where tiles are split also 4 for each
    record, 8 for each tile, and 32 for each tile that is split. A multiple of 32 bytes.
    """
    room = room_of(lengths, shape)
    words = HEADER_WORDS + RECORD_WORDS * room.records + lengths.entries
    if shape.least:
        of_split = HEADER_WORDS + RECORD_WORDS * room.split_tiles
        words += of_split + room.records + 2 * room.tiles
    return -(-words // RECORD_WORDS) * RECORD_WORDS


def _begins_at_zero(shape: ListShape) -> bool:
    """Whether the other side's first tile is among those that each tile sees, if it sees any."""
    return shape.hi >= NO_LIMIT if shape.by_keys else shape.lo <= -NO_LIMIT


def expect_list(name: str, view: ArrayView, device: int, of: str = "q") -> None:
    """Check an array of a number for each sequence by itself. Raises TypeError, ValueError.

    `of` names the argument that it must lie on the device of.
    """
    if view.dtype != "int32":
        raise TypeError(f"{name} must be int32, got {view.dtype}")
    if len(view.shape) != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(view.shape)}")
    if not view.is_contiguous:
        raise ValueError(f"{name} must be contiguous, got a stride of {view.strides[0]}")
    if view.device != device:
        raise ValueError(
            f"{name} must lie on the device of {of}, {device}, got device {view.device}"
        )


def _expect_whole(views: Mapping[str, ArrayView], paged: bool) -> None:
    """Check that packed sequences have starts and lengths. Raises ValueError."""
    for side in "qk":
        if f"cu_seqlens_{side}" in views or (paged and side == "k"):
            continue
        if not {f"seqlens_{side}", f"starts_{side}"} <= set(views):
            raise ValueError(
                f"packed sequences need cu_seqlens_{side}, or both starts_{side} and "
                f"seqlens_{side}"
            )


def _entries_of(views: Mapping[str, ArrayView], batch: int | None) -> tuple[int, str]:
    """The number of sequences, and what says so. Raises ValueError."""
    if batch is not None:
        return batch, "q"
    name, view = next(iter(views.items()))
    if not name.startswith("cu_seqlens"):
        return view.shape[0], name
    if not view.shape[0]:
        raise ValueError(f"{name} must have one element more than there are sequences, got 0")
    return view.shape[0] - 1, name
