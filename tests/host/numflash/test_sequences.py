"""Sequences with lengths of their own: what a caller may give, and lists in NumPy."""

from itertools import pairwise

import numpy as np
import pytest

from numflash.problem import sequences
from numflash.problem.sequences import (
    NO_LIMIT,
    Lengths,
    ListShape,
    lengths_of,
    most_records,
    room_of,
    words_of_list,
)
from numflash.reference import sequences as reference
from numflash.reference.sequences import extents_of, lists_of, split_length
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, fresh
from numflash.tiles import blocks
from tests.support.covering import thorough
from tests.support.sequence_cases import CASES, SPLITS, packed


def brute_records(q, k, shape):
    """Each tile's record, found by asking each query about each key."""
    found, work = [], []
    for entry in range(len(q.length)):
        seqlen_q, seqlen_k = int(q.length[entry]), int(k.length[entry])
        moved = shape.aligned * (seqlen_k - seqlen_q)
        i, j = np.ogrid[:seqlen_q, :seqlen_k]
        seen = (shape.lo + moved <= j - i) & (j - i <= shape.hi + moved)
        rows = np.repeat(seen, shape.pack, 0)
        if shape.by_keys:
            rows = seen.T
        starts = range(0, len(rows), shape.tile)
        for start in reversed(starts) if shape.in_turn else starts:
            others = np.flatnonzero(rows[start : start + shape.tile].any(0))
            tiles = (
                (others[0] // shape.stage, others[-1] // shape.stage + 1) if len(others) else ()
            )
            first = q.first[entry], seqlen_q, k.first[entry], seqlen_k
            found.append((*map(int, first), start, tiles, entry))
            work.append(len(starts) if shape.in_turn else len(range(*tiles or (0,))))
    work = [min(1023, each) for each in work]
    return [found[n] for n in sorted(range(len(found)), key=lambda n: -work[n])]


SMALL = [name for name in CASES if name not in ("far ends", "more work than bins")]


@pytest.mark.parametrize("case", SMALL)
def test_records_are_what_queries_and_keys_see(case):
    given, shape = CASES[case]
    q, k = given.extents()
    made = lists_of(q, k, shape).tiles
    records, is_cut = made[8:].reshape(-1, 8), made[1]
    found = [
        (*map(int, r[:5]), (int(r[5]), int(r[6])) if r[5] < r[6] else (), int(r[7]))
        for r in records
    ]
    assert found == brute_records(q, k, shape) and not is_cut


@pytest.mark.parametrize("case", CASES)
def test_no_lengths_have_more_records_than_there_is_room_for(case):
    given, shape = CASES[case]
    made = lists_of(*given.extents(), shape).tiles
    most = most_records(given.lengths, shape)
    assert made[0] <= most and len(made) <= words_of_list(given.lengths, shape)


def test_the_bound_of_packed_sequences_is_met():
    """By sequences of which each has a last tile of one row."""
    lengths, shape = [17, 1, 33, 1, 1], ListShape(16, 16)
    given = packed(lengths, lengths)
    assert most_records(given.lengths, shape) == lists_of(*given.extents(), shape).tiles[0]


@pytest.mark.parametrize("case", SPLITS)
def test_parts_are_all_of_the_work_of_their_tiles_in_order(case):
    given, shape = SPLITS[case]
    q, k = given.extents()
    room = room_of(given.lengths, shape)
    made = lists_of(q, k, shape, room)
    whole = lists_of(q, k, shape._replace(least=0, shares=0)).tiles[8:].reshape(-1, 8)
    records = made.tiles[8:].reshape(-1, 8)
    assert made.tiles[1] == 0 and len(records) <= room.records
    assert len(made.slots) == len(records) and made.split_tiles[0] <= room.split_tiles
    length = split_length((whole[:, 6] - whole[:, 5]).clip(0), shape, room)
    assert length >= shape.least and (shape.shares > 0 or length == shape.least)
    split_tiles = {
        (r[7], r[4]): (*map(int, r[2:4]), *map(int, r[5:7]))
        for r in made.split_tiles[8:].reshape(-1, 8)
    }
    slots, seen = set(), 0
    for tile in whole:
        mine = (records[:, 7] & 0xFFFFF == tile[7]) & (records[:, 4] == tile[4])
        parts = records[mine, 7] >> 20, made.slots[mine], *records[mine, 5:7].T
        parts = sorted(zip(*parts, strict=True))
        begin, end = tile[5:7]
        if begin >= end or end <= (begin // length + 1) * length:
            assert [p[1:] for p in parts] == [(-1, begin, end)]
            assert (tile[7], tile[4]) not in split_tiles
            continue
        cuts = [begin, *range((begin // length + 1) * length, end, length), end]
        assert [p[2:] for p in parts] == list(pairwise(cuts))
        assert [p[0] for p in parts] == [cut // length for cut in cuts[:-1]]
        first_slot = parts[0][1]
        assert [p[1] for p in parts] == list(range(first_slot, first_slot + len(parts)))
        splits = parts[0][0], parts[-1][0] + 1
        assert split_tiles[tile[7], tile[4]] == (first_slot, len(parts), *splits)
        slots |= {p[1] for p in parts}
        seen += 1
    assert seen == len(split_tiles) == made.split_tiles[0]
    assert slots == set(range(len(slots))) and len(slots) <= room.slots


def test_the_bound_of_parts_is_met():
    """By tiles that see all keys: the workspace of parts is not larger than they need."""
    given, shape = packed([32], [64]), ListShape(16, 16, least=1)
    room = room_of(given.lengths, shape)
    made = lists_of(*given.extents(), shape, room)
    assert room.slots == max(made.slots) + 1 == 8


@thorough
def test_tiles_have_so_many_more_records_as_shares_at_most():
    """Whatever the lengths: of random ones, with begins that splits may tear."""
    rng = np.random.default_rng(7)
    for _ in range(300):
        number, longest = rng.integers(1, 9), int(rng.choice([30, 300, 3000]))
        given = packed(*rng.integers(0, longest, (2, number)))
        lo = -int(rng.choice([40, 300, NO_LIMIT]))
        shape = ListShape(16, 16, lo=lo, hi=0, aligned=1, least=int(rng.integers(1, 6)))
        for shares in (0, 1, 5, 40):
            shape = shape._replace(shares=shares)
            room = room_of(given.lengths, shape)
            assert lists_of(*given.extents(), shape, room).tiles[1] == 0


def test_more_splits_than_a_record_numbers_are_refused_or_made_longer():
    lengths = Lengths(1, 1, 2**20, False, ("seqlens_k",))
    with pytest.raises(
        UnsupportedError, match=r"multiples of 64, .* 2048 splits; k has 1048576 rows"
    ):
        room_of(lengths, ListShape(16, 16, least=4))
    assert room_of(lengths, ListShape(16, 16, least=4, shares=9)).least == 32


def test_many_entries_and_rows_fit_32_bits_or_are_refused():
    of = Lengths(2**20, 2**28 - 1, 2**28 - 1, True, ("cu_seqlens_q", "cu_seqlens_k"))
    assert most_records(of, ListShape(64, 128)) < 2**27
    with pytest.raises(UnsupportedError, match="a list has at most 134217728"):
        most_records(of._replace(packed=False), ListShape(64, 128))
    with pytest.raises(UnsupportedError, match="a list has at most"):
        most_records(of, ListShape(64, 128, pack=9))


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"cumulative": [0, 3, 10]}, ([0, 3], [3, 7], False)),
        ({"lengths": [3, 10]}, ([0, 0], [3, 10], False)),
        ({"starts": [4, 10]}, ([4, 10], [6, 0], False)),
        ({"starts": [4, 1], "lengths": [6, 9]}, ([4, 1], [6, 9], False)),
        ({"cumulative": [0, 3, 10], "lengths": [2, 0]}, ([0, 3], [2, 0], False)),
        ({"cumulative": [0, 3, 10], "starts": [1, 4]}, ([1, 4], [3, 6], True)),
        ({"cumulative": [5, 3, 12]}, ([5, 3], [0, 7], True)),
        ({"lengths": [-1, 11]}, ([0, 0], [0, 10], True)),
        ({"starts": [-2, 11]}, ([0, 10], [10, 0], True)),
    ],
)
def test_extents_of_ten_rows(arrays, wanted):
    found = extents_of(10, 2, **{n: np.array(x, np.int32) for n, x in arrays.items()})
    assert (found.first.tolist(), found.length.tolist(), found.is_cut) == wanted


def test_records_have_the_words_that_kernels_read():
    assert (reference.Q_FIRST, reference.ENTRY, reference.HEADER_WORDS) == (0, 7, 8)
    for name in ("HEADER_WORDS", "RECORD_WORDS", "ENTRY_BITS"):
        assert getattr(blocks, name) == getattr(reference, name), name
    assert sequences.MAX_ENTRIES == 2**blocks.ENTRY_BITS
    assert (sequences.HEADER_WORDS, sequences.RECORD_WORDS) == (8, 8)
    made = lists_of(*packed([20], [30]).extents(), ListShape(16, 8)).tiles
    assert made.tolist() == [
        *(2, 0, 0, 0, 0, 0, 0, 0),
        *(0, 20, 0, 30, 0, 0, 4, 0),
        *(0, 20, 0, 30, 16, 0, 4, 0),
    ]


CU = {"cu_seqlens_q": fresh((5,), "int32", 0), "cu_seqlens_k": fresh((5,), "int32", 0)}
BAD = {
    "dtype": ({"cu_seqlens_q": fresh((5,), "int64", 0)}, TypeError, "cu_seqlens_q must be int32"),
    "dimensions": (
        {"cu_seqlens_k": fresh((5, 1), "int32", 0)},
        ValueError,
        r"cu_seqlens_k must have one dimension, got shape \(5, 1\)",
    ),
    "strides": (
        {"cu_seqlens_k": ArrayView(0, (5,), (2,), "int32", 0)},
        ValueError,
        "cu_seqlens_k must be contiguous, got a stride of 2",
    ),
    "device": (
        {"cu_seqlens_k": fresh((5,), "int32", 1)},
        ValueError,
        "cu_seqlens_k must lie on the device of q, 0, got device 1",
    ),
    "number": (
        {"cu_seqlens_k": fresh((6,), "int32", 0)},
        ValueError,
        "cu_seqlens_k must have 5 elements, one more than that, for the 4 sequences of "
        "cu_seqlens_q, got 6",
    ),
    "number of lengths": (
        {"seqlens_k": fresh((5,), "int32", 0)},
        ValueError,
        "seqlens_k must have 4 elements for the 4 sequences of cu_seqlens_q, got 5",
    ),
    "no element": (
        {"cu_seqlens_q": fresh((0,), "int32", 0)},
        ValueError,
        "cu_seqlens_q must have one element more than there are sequences, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arrays_are_refused(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        lengths_of(CU | change, (10, 10), 0)


def test_packed_sequences_need_starts_and_lengths():
    with pytest.raises(ValueError, match="packed sequences need cu_seqlens_k, or both starts_k"):
        lengths_of({"cu_seqlens_q": CU["cu_seqlens_q"]}, (10, 10), 0)
    some = {"starts_k": fresh((4,), "int32", 0)}
    with pytest.raises(ValueError, match="packed sequences need cu_seqlens_k, or both starts_k"):
        lengths_of({"cu_seqlens_q": CU["cu_seqlens_q"]} | some, (10, 10), 0)


def test_padded_sequences_are_those_of_the_batch():
    views = {"seqlens_k": fresh((4,), "int32", 0)}
    lengths = lengths_of(views, (10, 20), 0, batch=4)
    assert lengths[:5] == (4, 10, 20, False, ("seqlens_k",))
    with pytest.raises(
        ValueError, match="seqlens_k must have 3 elements for the 3 sequences of q"
    ):
        lengths_of(views, (10, 20), 0, batch=3)


def test_too_many_sequences_or_rows_are_refused():
    many = {n: fresh((2**20 + 2,), "int32", 0) for n in CU}
    with pytest.raises(UnsupportedError, match="has 1048577 sequences"):
        lengths_of(many, (10, 10), 0)
    with pytest.raises(UnsupportedError, match="k has 268435456 rows"):
        lengths_of(CU, (10, 2**28), 0)
