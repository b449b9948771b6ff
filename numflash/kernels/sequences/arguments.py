"""The records that the kernels of this folder take, made as those of `kernels.arguments`."""

from typing import NamedTuple

from numpy import int32 as i32
from numpy import int64 as i64

from numflash.kernels.arguments import Element
from numflash.runtime.views import Pointer


class Ends(NamedTuple):
    """Where the caller says that sequences of queries, or of keys, begin and end.

    A start is starts[entry], else cumulative[entry], else 0. A length is lengths[entry] + added,
    less the start if `with_start`; else cumulative[entry + 1] - cumulative[entry]; else all rows
    from the start on. An array whose has_... is 0 was not given, and is not read.

    The array has `bound` rows, of a padded batch in each entry; a sequence has at most `most`.
    """

    cumulative: Pointer(i32)  # (entries + 1,)
    lengths: Pointer(i32)  # (entries,)
    starts: Pointer(i32)  # (entries,)
    has_cumulative: i32
    has_lengths: i32
    has_starts: i32
    bound: i32
    most: i32
    added: i32
    with_start: i32


class BothEnds(NamedTuple):
    """The queries and the keys of the `entries` sequences of a call."""

    q: Ends
    k: Ends
    entries: i32


class ListPlan(NamedTuple):
    """A list of tiles to be made, see `kernels.sequences.schedule`.

    The list begins at word `begin`. A tile has `tile` rows: queries of `pack` heads, or with
    `by_keys` keys. Its work is the number of tiles of `stage` rows of the other side that it sees,
    by the band of the mask (lo, hi), moved by aligned * (seqlen_k - seqlen_q).

    The list has room for most_tiles tiles, most_records records, most_slots parts and most_split
    tiles that are split. Splits end at multiples of `least` tiles of `stage`. With `shares` above
    0 they may be longer: so long that the work of all tiles makes at most `shares` of them.

    With `in_turn` the tiles of a sequence come one after the other, the last rows first, and the
    sequences of most tiles first.
    """

    begin: i64
    most_tiles: i32
    most_records: i32
    most_slots: i32
    most_split: i32
    tile: i32
    stage: i32
    pack: i32
    by_keys: i32
    lo: i32
    hi: i32
    aligned: i32
    least: i32
    shares: i32
    in_turn: i32


class AngleTable(NamedTuple):
    """A table of rotary's cosines or sines: a row for each position, `row` elements apart."""

    data: Pointer(Element)
    row: i64


class Positions(NamedTuple):
    """The positions of tokens: token i of sequence n has i + offset + offsets[n].

    If `is_packed`, sequence n of the `entries` has the tokens cu_seqlens[n] to
    cu_seqlens[n + 1] - 1 of the array; otherwise each batch entry is a sequence, and cu_seqlens
    is not read. If `has_offsets` is 0, `offsets` is not read, and counts as 0.
    """

    cu_seqlens: Pointer(i32)  # (entries + 1,)
    offsets: Pointer(i32)  # (entries,)
    offset: i32
    entries: i32
    is_packed: i32
    has_offsets: i32


class RotarySizes(NamedTuple):
    """The sizes of an array that is rotated, and of the tables.

    `num_tokens` counts the tokens of all batch entries, `half` is rotary_dim / 2, and the tables
    have `positions` rows. Columns that are not rotated are copied up to column `copied`: head_dim,
    or 0 where the array is rotated in place.
    """

    num_tokens: i32
    seqlen: i32
    num_heads: i32
    half: i32
    positions: i32
    copied: i32


class CacheSlots(NamedTuple):
    """Where the rows of a cache lie: row r of entry e is row r % size of a page.

    The page is table[e * pitch + r // size] of `count` pages; without a table (`has_table` is 0)
    it is page e. An entry has room for `rows` rows; lengths[e] of them were there before this
    call.
    """

    table: Pointer(i32)  # (entries, pages of an entry)
    lengths: Pointer(i32)  # (entries,)
    pitch: i64
    count: i32
    size: i32
    rows: i32
    has_table: i32


class AppendSizes(NamedTuple):
    """The sizes of an append, of q and of the new keys and values.

    The first blocks_q blocks have q; of those behind them blocks_new have keys, and as many
    values. `half` is rotary_dim / 2, or 0 where nothing is rotated, and the tables have
    `positions` rows. The position of query i is `step` * i above that of query 0.
    """

    blocks_q: i32
    blocks_new: i32
    tokens_q: i32
    tokens_new: i32
    seqlen_q: i32
    seqlen_new: i32
    num_heads_q: i32
    num_heads_kv: i32
    head_dim: i32
    head_dim_v: i32
    half: i32
    positions: i32
    step: i32
