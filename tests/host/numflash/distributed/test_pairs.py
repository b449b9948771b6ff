"""What one rank's queries see of one rank's keys, as calls of attention."""

import random
from itertools import combinations, product

import numpy as np
import pytest

from numflash.distributed.layouts import Layout, Segment
from numflash.distributed.pairs import Band, Calls, calls_of, packs, pair, sees, visible
from tests.support.layouts import BANDS, dense, in_band, random_layout, seen_by

SIDES = (None, 0, 1, 3)


@pytest.mark.parametrize("band", [Band(*sides) for sides in product(SIDES, SIDES)], ids=str)
def test_two_segments_against_a_dense_mask(band):
    for num_q, num_k, shift in product((1, 2, 5), (1, 3, 4), range(-9, 10)):
        query, key = Segment(0, 9 + shift, num_q), Segment(0, 9, num_k)
        distance = np.arange(num_k)[None] - np.arange(num_q)[:, None] - shift
        want = in_band(distance, band)
        assert visible(shift, num_q, num_k, band) == want.sum()
        assert sees(query, key, band) == want.any()
        call = pair(query, 100, key, 200, band, False)
        if not want.any():
            assert call is None
            continue
        got = np.zeros_like(want)
        rows, keys = slice(*np.subtract(call.q, 100)), slice(*np.subtract(call.k, 200))
        got[rows, keys] = seen_by(call)
        assert (got == want).all()
        assert call.scores == want.sum()
        assert call.origin == (query.first + rows.start, key.first + keys.start)
        # No row sees nothing, and the last key is seen.
        assert want[rows].any(1).all() and not np.delete(want, np.r_[rows], 0).any()
        assert keys.start == 0 and want[:, keys.stop - 1].any()
        assert (call.window == Band()) == bool(want[rows, keys].all())


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_calls_against_a_dense_mask(band):
    draw = random.Random(1)
    for by_position in (False, True) * 20:
        layout = random_layout(draw.randint(1, 4), draw, tokens=24)
        want = dense(layout, band)
        for one, other in product(range(layout.ranks), repeat=2):
            mask = want[np.ix_(layout.indices(one), layout.indices(other))]
            segments = layout.segments[one], layout.segments[other]
            calls = calls_of(*segments, band, own=one == other, by_position=by_position)
            got, own = np.zeros(mask.shape, int), np.zeros(len(mask), int)
            for call in calls:
                got[slice(*call.q), slice(*call.k)] += seen_by(call)
                own[slice(*call.q)] += call.is_own
                assert call.scores == seen_by(call).sum()
                _expect_places(layout, one, other, call, by_position)
            assert (got == mask).all()
            assert (own == (one == other)).all()


def _expect_places(layout, one, other, call, by_position):
    """The document and the positions of a call are those of its first query and key."""
    query, key = layout.indices(one)[call.q[0]], layout.indices(other)[call.k[0]]
    start = layout.starts[call.document]
    assert (query - start, key - start) == call.origin
    if by_position:
        # Positions rise by one from there.
        for rank, (begin, end) in ((one, call.q), (other, call.k)):
            assert set(np.diff(layout.indices(rank)[begin:end])) <= {1}


@pytest.mark.parametrize("by_position", [False, True])
def test_a_causal_zigzag_is_one_call_a_step(by_position):
    """Own tokens: one triangle. Earlier rank: all queries on half the keys. Later: the reverse."""
    held = Layout.zigzag(32, 4).segments
    found = {
        name: [
            (call.q, call.k, call.window)
            for call in calls_of(
                held[1], held[other], Band(None, 0), own=other == 1, by_position=by_position
            )
        ]
        for name, other in (("own", 1), ("earlier", 0), ("later", 2))
    }
    if by_position:
        assert {name: len(calls) for name, calls in found.items()} == {
            "own": 3,
            "earlier": 2,
            "later": 2,
        }
    else:
        assert found == {
            "own": [((0, 8), (0, 8), Band(None, 0))],
            "earlier": [((0, 8), (0, 4), Band())],
            "later": [((4, 8), (0, 8), Band())],
        }


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_offset_is_the_shift_from_the_bottom_right(band):
    """Where kernels align the last query with the last key, which a record of varlen does."""
    draw = random.Random(2)
    for _ in range(20):
        held = random_layout(3, draw).segments
        for one, other in product(range(3), repeat=2):
            for call in calls_of(held[one], held[other], band, own=one == other):
                rows, keys = np.arange(*call.q)[:, None], np.arange(*call.k)[None]
                distance = (keys - call.k[1]) - (rows - call.q[1]) - call.offset
                assert (in_band(distance, call.window) == seen_by(call)).all()


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_packs_have_each_call_once_and_no_row_twice(band):
    draw = random.Random(3)
    shared = 0
    for _ in range(40):
        layout = random_layout(3, draw)
        for one, other in product(range(3), repeat=2):
            calls = calls_of(layout.segments[one], layout.segments[other], band, own=one == other)
            found = packs(calls, False)
            assert sorted(call for pack in found for call in pack.calls) == sorted(calls)
            for pack in found:
                shared += len(pack.calls) > 1
                assert {(call.window, call.offset) for call in pack.calls} == {pack[:2]}
                assert len({call.is_own for call in pack.calls}) == 1
                for a, b in combinations([call.q for call in pack.calls], 2):
                    assert a[1] <= b[0] or b[1] <= a[0]
            assert [pack.calls for pack in packs(calls, True)] == [(call,) for call in calls]
            assert packs(calls, False) is found
    assert shared


def test_a_step_of_many_documents_is_a_call_or_two():
    """Documents cut each: halves see halves whole; an odd token is a pack of its own."""
    layout = Layout.zigzag_documents([64, 128, 8, 16], ranks=2)
    for one, other, number in ((0, 0, 2), (1, 1, 1), (0, 1, 1), (1, 0, 1)):
        held = layout.segments[one], layout.segments[other]
        calls = calls_of(*held, Band(None, 0), own=one == other)
        assert len(packs(calls, False)) <= number + 1


def test_calls_are_hashed_once_and_equal_tuples():
    call = pair(Segment(0, 0, 4), 0, Segment(0, 0, 4), 0, Band(None, 0), True)
    calls = Calls([call])
    assert calls == (call,) and hash(calls) == hash((call,)) == hash(calls)


def test_band_of_options():
    assert Band.of(True, (-1, -1)) == Band(None, 0)
    assert Band.of(False, (None, 3)) == Band(None, 3)
    assert Band.of(True, (7, 3)) == Band(7, 0)
