"""Lists of the tiles that sequences have: `kernels.sequences.schedule`, word for word."""

from typing import NamedTuple

import numpy as np

from numflash.configs.sequences import BINS

HEADER_WORDS = RECORD_WORDS = 8
ENTRY_BITS = 20
Q_FIRST, SEQLEN_Q, K_FIRST, SEQLEN_K, START, BEGIN, END, ENTRY = range(RECORD_WORDS)
"""The words of a record. The last has the split, too, above its ENTRY_BITS bits."""


class Extents(NamedTuple):
    """Where the sequences of an array lie.

    Attributes:
        first, length: (entries,) int64: of each the first row, and how many it has.
        is_cut: whether one of the caller's numbers leaves the array.
    """

    first: np.ndarray
    length: np.ndarray
    is_cut: bool


def extents_of(
    bound: int,
    entries: int,
    cumulative=None,
    lengths=None,
    starts=None,
    *,
    most: int | None = None,
    added: int = 0,
    with_start: bool = False,
) -> Extents:
    """The sequences of an array of `bound` rows, of what the caller gives; cut to the array.

    Args:
        bound: rows of the array; of a padded batch, those of one entry.
        entries: number of sequences.
        cumulative: (entries + 1,) int32: a sequence ends where the next begins; or None.
        lengths, starts: (entries,) int32, or None; they go before `cumulative`.
        most: rows that a sequence has at most; None: as many as the array.
        added: rows that each sequence has besides those of `lengths`.
        with_start: whether `lengths` count from row 0, not from the start.
    """
    first, length = np.zeros(entries, np.int64), np.full(entries, bound, np.int64)
    if cumulative is not None:
        first = np.asarray(cumulative, np.int64)[:-1]
        length = np.diff(np.asarray(cumulative, np.int64))
    if starts is not None:
        first = np.asarray(starts, np.int64)
    kept = first.clip(0, bound)
    if lengths is not None:
        length = np.asarray(lengths, np.int64) + added - kept * with_start
    elif cumulative is None:
        length = bound - kept
    cut = length.clip(0, np.minimum(bound - kept, bound if most is None else most))
    return Extents(kept, cut, bool((kept != first).any() or (cut != length).any()))


class Lists(NamedTuple):
    """What is made of lengths.

    Attributes:
        tiles: the list, int32: 8 words, of which the first two are the number of records and the
            flag, and 8 words for each record.
        slots: of each record the number of its part, in the order of tiles and splits; -1 where
            it is the only one of its tile.
        split_tiles: a list of the tiles that have several. Its records have the number of the
            first part for k_first, the number of parts for seqlen_k, the first split and the one
            after the last for begin and end.
        tiles_before: (entries,) the number of tiles before each sequence.
    """

    tiles: np.ndarray
    slots: np.ndarray
    split_tiles: np.ndarray
    tiles_before: np.ndarray


def lists_of(q: Extents, k: Extents, shape, room=None) -> Lists:
    """The lists of sequences.

    Args:
        q, k: the sequences.
        shape: what they are for, a `problem.sequences.ListShape`.
        room: the most that they may have, a `problem.sequences.ListRoom`; None: all there is.
    """
    moved = shape.aligned * (k.length - q.length)
    lo, hi = shape.lo + moved, shape.hi + moved
    own, other = (k, q) if shape.by_keys else (q, k)
    if shape.by_keys:
        lo, hi = -hi, -lo
    tiles = -(-own.length * shape.pack // shape.tile)
    entry = np.repeat(np.arange(len(tiles)), tiles)
    place = np.arange(len(entry)) - (np.cumsum(tiles) - tiles)[entry]
    start = (tiles[entry] - 1 - place if shape.in_turn else place) * shape.tile
    is_cut = q.is_cut or k.is_cut
    if room is not None and len(entry) > room.tiles:
        entry, start, is_cut = entry[: room.tiles], start[: room.tiles], True
    last_row = np.minimum(start + shape.tile, own.length[entry] * shape.pack) - 1
    first, last = start // shape.pack, last_row // shape.pack
    begin = np.maximum(0, first + lo[entry]) // shape.stage
    end = np.minimum(other.length[entry], last + hi[entry] + 1).clip(0)
    end = -(-end // shape.stage)

    split, length = np.zeros_like(begin), 2**30
    slots, split_tiles = np.full(len(entry), -1), []
    if shape.least:
        length = split_length((end - begin).clip(0), shape, room)
        n_parts = np.where(end > begin, (end - 1) // length - begin // length + 1, 1)
        in_tile = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        is_split = n_parts > 1
        parts = np.where(is_split, n_parts, 0)
        slot = np.cumsum(parts) - parts
        for tile in np.flatnonzero(is_split):
            of, e = slice(tile, tile + 1), entry[tile]
            splits = begin[tile] // length, (end[tile] - 1) // length + 1
            first_slot, n = slot[tile], n_parts[tile]
            if room is not None:
                first_slot = min(first_slot, room.slots)
                n = min(n, room.slots - first_slot)
                splits = splits[0], splits[0] + n
            words = q.first[e], q.length[e], first_slot, n, *start[of], *splits, e
            split_tiles.append(words)
        tile = np.repeat(np.arange(len(entry)), n_parts)
        entry, start, begin, end = (x[tile] for x in (entry, start, begin, end))
        split = np.where(end > begin, begin // length, 0) + in_tile
        slots = np.where(is_split[tile], slot[tile] + in_tile, -1)
        several = is_split[tile]
        begin = np.where(several, np.maximum(begin, split * length), begin)
        end = np.where(several, np.minimum(end, (split + 1) * length), end)
        if room is not None:
            slots = np.where(slots < room.slots, slots, -1)[: room.records]
            split_tiles = split_tiles[: room.split_tiles]
    of_entry = q.first, q.length, k.first, k.length
    words = *(x[entry] for x in of_entry), start, begin, end, entry | split << ENTRY_BITS
    records = np.stack(words, axis=-1)[: len(slots)]
    work = tiles[entry][: len(slots)] if shape.in_turn else records[:, END] - records[:, BEGIN]
    work = work.clip(0, BINS - 1)
    order = np.argsort(-work, kind="stable")
    return Lists(
        _list(records[order], is_cut),
        slots[order].astype(np.int32),
        _list(split_tiles, False),
        (np.cumsum(tiles) - tiles).astype(np.int32),
    )


def split_length(work: np.ndarray, shape, room=None) -> int:
    """The tiles of the other side in a split.

    Args:
        work: of each tile.
        shape, room: as for `lists_of`.
    """
    least = shape.least if room is None else room.least
    return max(least, -(-int(work.sum()) // shape.shares)) if shape.shares else least


def _list(records, flag: bool) -> np.ndarray:
    header = [len(records), int(flag), *(0,) * (HEADER_WORDS - 2)]
    return np.concatenate([header, np.ravel(records)]).astype(np.int32)
