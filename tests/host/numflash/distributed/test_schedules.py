"""What each rank sends, receives and computes: against dense masks, and played through."""

import random
from itertools import product

import numpy as np
import pytest

from numflash.distributed.layouts import Layout
from numflash.distributed.pairs import Band
from numflash.distributed.steps import balance, gathering, regrouping, ring, ring_of_queries
from tests.support.layouts import BANDS, dense, random_layout, seen_by

# Ranks: how many layouts of so many; large schedules take longer.
CASES = {**dict.fromkeys(range(1, 5), 6), **dict.fromkeys(range(5, 9), 2)}
CASES |= dict.fromkeys(range(9, 17), 1)


def layouts(ranks: int, seed: int):
    draw = random.Random(100 * seed + ranks)
    for _ in range(CASES[ranks]):
        yield random_layout(ranks, draw, tokens=40)


@pytest.mark.parametrize("ranks", CASES)
def test_rings(ranks):
    for layout, band in product(layouts(ranks, 1), BANDS.values()):
        for schedule, by_position in product((ring, ring_of_queries), (False, True)):
            steps = schedule(layout, band, by_position)
            assert len(steps) == ranks and len({len(of_rank) for of_rank in steps}) == 1
            _expect_all_pairs_once(layout, band, steps, schedule is ring)
            for number in range(len(steps[0])):
                _expect_sends_meet_receives([of_rank[number].fetch for of_rank in steps])
                _expect_sends_meet_receives([of_rank[number].give for of_rank in steps])
            _expect_nothing_travels_unread(steps)
            _play(layout, steps)


def _expect_all_pairs_once(layout, band, steps, keys_travel):
    got = np.zeros((layout.seqlen, layout.seqlen), int)
    own = np.zeros(layout.seqlen, int)
    indices = [layout.indices(rank) for rank in range(layout.ranks)]
    for rank, of_rank in enumerate(steps):
        for step in of_rank:
            here = (rank, step.owner) if keys_travel else (step.owner, rank)
            queries, keys = (indices[side] for side in here)
            for call in step.calls:
                rows = queries[slice(*call.q)]
                got[np.ix_(rows, keys[slice(*call.k)])] += seen_by(call)
                own[rows] += call.is_own
            assert step.scores == sum(seen_by(call).sum() for call in step.calls)
    assert (got == dense(layout, band)).all()
    assert (own == 1).all()


def _expect_sends_meet_receives(exchanges):
    """Between each two ranks: as many, as large, in the same order, and of the same owner."""
    for one, exchange in enumerate(exchanges):
        assert not {message.peer for message in sum(exchange, ())} & {one}
        for other, opposite in enumerate(exchanges):
            sent = [m for m in exchange.sends if m.peer == other]
            received = [m for m in opposite.receives if m.peer == one]
            assert [_kind(m) for m in sent] == [_kind(m) for m in received]


def _kind(message):
    size = message.rows[1] - message.rows[0]
    assert size > 0
    return message.owner, size


def _expect_nothing_travels_unread(steps):
    """What a rank receives, it or a later rank of its ring computes with."""
    for number in range(len(steps[0])):
        used = {s.owner for of_rank in steps for s in of_rank[number + 1 :] if s.calls}
        for of_rank in steps:
            assert {message.owner for message in of_rank[number].fetch.receives} <= used


def _play(layout, steps):
    """Move the tokens, and sums of what was added to them, as the messages say."""
    ranks = range(layout.ranks)
    held = [{rank} for rank in ranks]
    sums: list[dict[int, list]] = [{} for _ in ranks]
    arriving: list[dict[int, list]] = [{} for _ in ranks]
    for number in range(len(steps[0])):
        now = [of_rank[number] for of_rank in steps]
        for rank, step in enumerate(now):
            if step.calls:
                assert step.owner in held[rank]
                sums[rank].setdefault(step.owner, []).append(rank)
        # Sums of the step before have arrived: they come before this rank's own part.
        for rank in ranks:
            _add(sums[rank], arriving[rank])
        arriving = [{} for _ in ranks]
        following = [set() for _ in ranks]
        for rank, step in enumerate(now):
            for peer, rows, owner in step.fetch.sends:
                assert owner in held[rank] and rows == (0, layout.tokens(owner))
                following[peer].add(owner)
            for peer, rows, owner in step.give.sends:
                assert rows == (0, layout.tokens(owner))
                assert owner not in arriving[peer]
                arriving[peer][owner] = sums[rank].pop(owner, [])
        held = following
    for rank in ranks:
        _add(sums[rank], arriving[rank])
        # All at home, added in the order of the steps.
        assert set(sums[rank]) <= {rank}
        visitors = [r for now in zip(*steps, strict=True) for r in ranks if _uses(now[r], rank)]
        assert sums[rank].get(rank, []) == visitors


def _add(sums, arrived):
    """What arrives comes before this rank's own part."""
    for owner, parts in arrived.items():
        sums[owner] = parts + sums.get(owner, [])


def _uses(step, owner):
    return bool(step.calls) and step.owner == owner


@pytest.mark.parametrize("ranks", CASES)
def test_gathering(ranks):
    for layout, band in product(layouts(ranks, 2), BANDS.values()):
        want, found = dense(layout, band), gathering(layout, band)
        for exchange in ("fetch", "give"):
            _expect_sends_meet_receives([getattr(of_rank, exchange) for of_rank in found])
        got, own = np.zeros(want.shape, int), np.zeros(layout.seqlen, int)
        for rank, of_rank in enumerate(found):
            mine = layout.indices(rank)
            whole = np.full(layout.seqlen, -1)
            for (begin, end), place in of_rank.own:
                whole[slice(*place)] = mine[begin:end]
            for peer, place, owner in of_rank.fetch.receives:
                assert owner == peer and (whole[slice(*place)] == -1).all()
                rows = [m.rows for m in found[peer].fetch.sends if m.peer == rank]
                places = [m.rows for m in of_rank.fetch.receives if m.peer == peer]
                (begin, end) = rows[places.index(place)]
                whole[slice(*place)] = layout.indices(peer)[begin:end]
                # Somebody here sees it.
                assert want[mine][:, slice(*place)].any()
            # Each row is at its place, or is seen by nobody here.
            there = whole == np.arange(layout.seqlen)
            assert ((whole == -1) | there).all() and of_rank.is_whole == there.all()
            assert not want[mine][:, ~there].any()
            assert of_rank.give == (of_rank.fetch.receives, of_rank.fetch.sends)
            for call in of_rank.calls:
                rows, keys = mine[slice(*call.q)], slice(*call.k)
                got[rows, keys] += seen_by(call)
                own[rows] += call.is_own
                # Tiles of keys begin where they do on one GPU.
                assert call.k[0] == layout.starts[call.document] and call.origin[1] == 0
        assert (got == want).all() and (own == 1).all()


@pytest.mark.parametrize("ranks", CASES)
def test_regrouping(ranks):
    for layout, size in product(layouts(ranks, 3), range(1, ranks + 1)):
        if ranks % size:
            continue
        found, merged = regrouping(layout, size), layout.merged(size)
        for group in range(ranks // size):
            members = range(group * size, group * size + size)
            of_group = [found[rank] for rank in members]
            for exchange in ("there", "back"):
                _expect_sends_meet_receives([getattr(r, exchange) for r in of_group])
            for me, (rank, of_rank) in enumerate(zip(members, of_group, strict=True)):
                assert of_rank.tokens == merged.tokens(group)
                whole = np.full(of_rank.tokens, -1)
                for rows, place in of_rank.own:
                    whole[slice(*place)] = layout.indices(rank)[slice(*rows)]
                for peer, place, owner in of_rank.there.receives:
                    assert owner == members[peer] and (whole[slice(*place)] == -1).all()
                    rows = [m.rows for m in of_group[peer].there.sends if m.peer == me]
                    places = [m.rows for m in of_rank.there.receives if m.peer == peer]
                    (begin, end) = rows[places.index(place)]
                    whole[slice(*place)] = layout.indices(owner)[begin:end]
                assert whole.tolist() == merged.indices(group).tolist()
                there = of_rank.there
                assert of_rank.back == (there.receives, there.sends)


def test_what_nobody_sees_stays_at_home():
    """A window that reaches one rank back: one hop, and none for the last rank's keys."""
    steps = ring(Layout.contiguous(32, 4), Band(5, 0))
    assert [len(of_rank) for of_rank in steps] == [2] * 4
    assert [len(of_rank[0].fetch.sends) for of_rank in steps] == [1, 1, 1, 0]
    assert [len(of_rank[1].give.sends) for of_rank in steps] == [0, 1, 1, 1]
    # The last chunk of a causal zigzag is seen by its own rank alone.
    layout = Layout.zigzag(32, 4)
    sent = {m.rows for m in gathering(layout, Band(None, 0))[0].fetch.sends}
    assert sent == {(0, 4)}


def test_the_schedule_of_many_documents_is_made_in_seconds():
    """For the rank that asks; what another needs to know of it is not made."""
    draw = random.Random(0)
    layout = Layout.zigzag_documents([draw.randint(1, 400) for _ in range(250)], 16)
    steps = ring(layout, Band(None, 0))
    assert sum(len(step.calls) for step in steps[3]) > 16 * 250 / 2
    assert sum(made is not None for made in steps._made) == 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_balance_is_that_of_the_table(ranks):
    """DISTRIBUTED.md, section 1; busiest rank, and ranks in lockstep."""
    causal, window = Band(None, 0), Band(1000, 0)
    zigzag, contiguous = Layout.zigzag(8192, ranks), Layout.contiguous(8192, ranks)
    assert balance(ring(zigzag, causal)) == pytest.approx((1, 1), abs=0.005)
    assert balance(ring(contiguous, Band())) == pytest.approx((1, 1), abs=1e-9)
    assert max(balance(ring(contiguous, window))) <= (1.1 if ranks <= 8 else 1.12)
    draw = random.Random(4)
    documents = Layout.zigzag_documents([draw.randint(20, 6900) for _ in range(38)], ranks)
    assert balance(ring(documents, causal)) == pytest.approx((1, 1), abs=0.005)


@pytest.mark.parametrize(
    "layout, band, lockstep",
    [
        (Layout.contiguous(8192, 4), Band(None, 0), 1.75),
        (Layout.contiguous(8192, 8), Band(None, 0), 1.875),
        (Layout.contiguous(8192, 4), Band(1000, 0), 1.07),
        (Layout.contiguous(8192, 8), Band(1000, 0), 1.07),
        (Layout.zigzag(8192, 4), Band(1000, 0), 1.33),
        (Layout.zigzag(8192, 8), Band(1000, 0), 1.59),
    ],
)
def test_what_other_layouts_cost_is_that_of_the_table(layout, band, lockstep):
    assert balance(ring(layout, band)).busiest <= lockstep + 0.005
    assert balance(ring(layout, band)).lockstep == pytest.approx(lockstep, abs=0.005)


def test_ranks_without_work_are_balanced():
    assert balance(ring(Layout.zigzag(0, 4), Band(None, 0))) == (1, 1)
