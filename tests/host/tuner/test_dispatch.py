"""Blocks played through: none is lost, none overlaps, all get the clocks that they need."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import parse_config
from numflash.selection.layout import Launch, Tiling, persistent_walks, places, taken_by
from tests.host.tuner.test_model import A100, problem_class
from tuner import model
from tuner.model import BlockClocks, dispatch, grid, hopper, hopper_backward, prediction
from tuner.records import ResourceUsage
from tuner.space import machines

RNG = np.random.default_rng(4)


def crowded(tiles, together):
    """Two on an SM take 1.6 times as long, three 2.2 times."""
    return (10.0 * tiles + 3.0) * (0.4 + 0.6 * together)


def expect_consistent(found, tiles, clocks, num_sms, resident):
    """No overlap in a slot, and each block has had the whole of its work."""
    for sm in range(num_sms):
        on_sm = np.flatnonzero(found.sm == sm)
        start, end = found.start[on_sm], found.end[on_sm]
        for slot in range(resident):
            own = on_sm[found.slot[on_sm] == slot]
            own = own[np.argsort(found.start[own])]
            assert (found.start[own][1:] >= found.end[own][:-1]).all()
        edges = np.unique(np.concatenate([start, end]))
        done = dict.fromkeys(on_sm.tolist(), 0.0)
        for low, high in itertools.pairwise(edges.tolist()):
            live = on_sm[(start <= low) & (end >= high)].tolist()
            assert len(live) <= resident
            for n in live:
                done[n] += (high - low) / clocks(int(tiles[found.number[n]]), len(live))
        assert list(done.values()) == pytest.approx([1.0] * len(done))


@pytest.mark.parametrize(("num_sms", "resident"), [(1, 1), (4, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("blocks", [0, 1, 6, 14, 100])
def test_work_is_conserved_and_nothing_overlaps(num_sms, resident, blocks):
    tiles = RNG.integers(0, 9, blocks)
    found = dispatch.dispatched(tiles, crowded, num_sms, resident)
    assert found.number.tolist() == list(range(blocks))
    expect_consistent(found, tiles, crowded, num_sms, resident)
    # Blocks begin in order, and no room stays empty while one waits.
    assert (np.diff(found.start) >= 0).all()
    if blocks:
        mean = sum(crowded(n, resident) for n in tiles.tolist()) / num_sms / resident
        longest = crowded(int(tiles.max()), 1)
        assert found.clocks >= max(longest, mean) * (1 - 1e-9)
        assert found.clocks <= mean + crowded(int(tiles.max()), resident) * (1 + 1e-9)


def test_blocks_go_breadth_first_to_the_sm_with_the_most_room():
    found = dispatch.dispatched(np.full(6, 2), crowded, 4, 2)
    assert found.sm.tolist() == [0, 1, 2, 3, 0, 1] and found.slot.tolist() == [0, 0, 0, 0, 1, 1]
    # Of blocks that end at once each SM gets one before any gets a second.
    found = dispatch.dispatched(np.full(11, 2), crowded, 4, 2)
    assert found.sm.tolist()[8:] == [0, 1, 2]


def test_neighbours_slow_each_other_only_while_both_are_there():
    # 23 clocks alone, 33 clocks alone: together 1.6 times as long until the shorter has ended.
    found = dispatch.dispatched(np.array([2, 3]), crowded, 1, 2)
    assert found.end[0] == pytest.approx(1.6 * 23)
    assert found.end[1] == pytest.approx(1.6 * 23 + (1 - 23 / 33) * 33)


def test_of_very_many_blocks_the_first_and_the_last_are_played():
    tiles = np.tile(np.arange(40, 0, -1), 50)
    whole = dispatch.dispatched(tiles, crowded, 7, 2)
    ends = dispatch.dispatched(tiles, crowded, 7, 2, most_played=100)
    assert len(ends.number) == 2 * 3 * 14 and ends.number[-1] == len(tiles) - 1
    assert ends.clocks == pytest.approx(whole.clocks, rel=0.02)
    assert (np.diff(ends.start) >= 0).all()
    few = dispatch.dispatched(tiles[:84], crowded, 7, 2, most_played=10)
    assert len(few.number) == 84


@pytest.mark.parametrize(("num_sms", "resident"), [(1, 1), (4, 2), (5, 1)])
@pytest.mark.parametrize("count", [0, 3, 23, 200])
def test_persistent_blocks_go_through_their_own_places(num_sms, resident, count):
    tiles = RNG.integers(0, 9, count)
    found = dispatch.persistent(tiles, crowded, num_sms, resident, start=50.0)
    assert found.number.tolist() == list(range(count))
    blocks = num_sms * resident
    assert (found.slot * num_sms + found.sm).tolist() == taken_by(count, blocks).tolist()
    expect_consistent(found, tiles, crowded, num_sms, resident)
    for own in persistent_walks(count, blocks):
        if len(own):
            assert (
                found.start[own[0]] == 50 and (found.start[own][1:] == found.end[own][:-1]).all()
            )


def test_blocks_that_draw_take_the_next_place_when_they_are_free():
    launch = Launch(Tiling(512, 512, 128, 128, -512, 0), "last keys first", 1)
    found = places(launch)
    clocks = BlockClocks(50.0, lambda tiles, _: 10.0 * tiles, 1, persistent=True)
    dealt, drawn = (each.schedule(found, 2) for each in (clocks, replace(clocks, drawn=True)))
    assert found.tiles.tolist() == [4, 3, 2, 1]
    assert drawn.end.tolist() == [90, 80, 100, 100] and dealt.end.tolist() == [90, 80, 100, 100]
    uneven = np.array([4, 1, 1, 1])
    assert clocks.played(uneven, 2).clocks == 100
    assert replace(clocks, drawn=True).played(uneven, 2).clocks == 90


CALLS = [
    (gpu, family, text, mask, seqlen, heads)
    for gpu, family, text in (
        ("A100", "forward", "sm80-m128n64w4s1"),
        ("A100", "forward", "sm80-m64n64w4s2x2"),
        ("A100", "forward", "m64n32w4"),
        ("A100", "backward-dq", "sm80-m64n64w4s1"),
        ("A100", "backward-dkdv", "sm80-m64n64w4s1-apart"),
        ("A100", "backward", "sm80-m32n64w4s1x4"),
        ("H100", "forward", "sm90-m128n128w8s2-overlap"),
        ("H100", "forward", "sm90-m128n128w8s2-overlap-pingpong-persistent"),
        ("H100", "backward-dkdv", "sm90-m64n128w8s2"),
    )
    for mask, seqlen, heads in (
        ("causal", 2048, 16),
        ("causal", 4096, 64),
        ("window512", 4096, 32),
        ("full", 1024, 24),
    )
]


def played_and_predicted(gpu, family, text, mask, seqlen, heads):
    """Clocks of a launch, by formula: played through, and as predictions have them."""
    machine, config = machines.find(gpu), parse_config(family, text)
    problem = problem_class(family, "float16-d64-dv64-vec", mask, seqlen, seqlen, heads)
    resources = ResourceUsage(128, 0, 0, 128, 1 if gpu == "H100" else 3, "registers")
    clocks = model.block_clocks(machine, problem, config, resources, None)
    laid = grid.lay(problem, config)
    in_flight = laid.launch.in_flight
    if laid.launch.order == "in bundles":
        in_flight = grid.heads_in_flight(problem, laid, config, machine)
    found = places(laid.launch._replace(in_flight=in_flight))
    played = clocks.schedule(found, machine.num_sms).clocks
    if clocks.persistent:
        dealt = grid.dealt_out(laid, in_flight, machine.num_sms * clocks.resident)
        return played, clocks.start + clocks.places(*dealt)
    return played, dispatch.closed_form(laid, machine.num_sms, clocks.resident, clocks.place)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(map(str, call)))
def test_a_prediction_is_near_what_is_played(call):
    played, predicted = played_and_predicted(*call)
    mask = call[3]
    assert 0.9 * played < predicted < 1.05 * played
    assert mask != "full" or predicted == pytest.approx(played)


def test_the_longest_block_shares_its_sm_while_others_last():
    """256 blocks on 216 slots: of an A100 that two blocks share, alone it would take 0.6 of it."""
    call = "A100", "forward", "sm80-m128n64w4s1", "causal", 2048, 16
    played, predicted = played_and_predicted(*call)
    assert predicted == pytest.approx(played, rel=0.05)


def test_predictions_are_made_of_the_clocks_of_blocks(monkeypatch):
    resources, used = ResourceUsage(128, 0, 0, 128, 1, "registers"), []

    def spied(laid, num_sms, resident, place):
        used.append((resident, place(3, 1)))
        return place(3, 1)

    for module in (prediction, hopper, hopper_backward):
        monkeypatch.setattr(module, "closed_form", spied)
    for gpu, family, text in sorted({call[:3] for call in CALLS}):
        machine, config = machines.find(gpu), parse_config(family, text)
        problem = problem_class(family, "float16-d64-dv64-vec", "full", 1024, 1024, 8)
        clocks = model.block_clocks(machine, problem, config, resources, None)
        assert clocks.persistent == getattr(config, "persistent", False)
        assert 0 < clocks.turn < clocks.place(2, 1)
        assert 0 < clocks.start < clocks.place(16, 1) + clocks.start * clocks.persistent
        used.clear()
        model.predict(machine, problem, config, resources, None)
        assert used == ([] if clocks.persistent else [(1, clocks.place(3, 1))])


def test_kernels_that_stream_rows_have_no_tiles():
    problem, config = problem_class("delta"), parse_config("delta", "w8")
    with pytest.raises(ValueError, match="w8 of delta has no tiles"):
        model.block_clocks(A100, problem, config, ResourceUsage(32, 0, 0, 256, 8, "threads"), None)


def test_a_schedule_of_many_blocks_is_fast():
    tiles = np.tile(np.arange(64, 0, -1), 256)
    began = time.process_time()
    found = dispatch.dispatched(tiles, crowded, 108, 2)
    assert len(found.number) == 16384 and time.process_time() - began < 3
