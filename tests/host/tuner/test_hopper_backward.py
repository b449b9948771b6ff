"""The offline model of Hopper's backward: what binds it, what turns cost, what more work costs."""

import heapq
import itertools
from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.lengths import sequences_of
from tuner.model import hopper_backward, turns
from tuner.model.grid import walks_in_turn
from tuner.model.hopper_backward import make_form, product
from tuner.model.machine_code import Counts, Loop, MachineCode
from tuner.records import ResourceUsage
from tuner.space import machines

H100 = machines.find("H100")
ONE = "m64n128w8s2"
FITS = ResourceUsage(168, 0, 200_000, 384, 1, "registers")
CONFIGS = {
    "backward-dq": ("m128n128w8s1", "m64n64w4s2", "m128n64w8s2"),
    "backward-dkdv": ("m64n128w8s2", "m64n192w12s1", "m32n64w4s2"),
}


def problem_class(
    family, head_dim=128, mask="full", q=4096, k=4096, heads=32, group=1, more="", ragged=""
):
    traits = f"float16-d{head_dim}-dv{head_dim}{more}-vec{ragged}"
    return ProblemClass.parse(f"{family} {traits} {mask} q{q} k{k} bh{heads} g{group}")


def estimate(family, text, machine=H100, **sizes):
    config = parse_config(family, f"sm90-{text}")
    return model.estimate(machine, problem_class(family, **sizes), config)


def fused(queries=64, keys=128, head_dim=128, **more):
    """Five products on two warpgroups, as FlashAttention-3's with a causal mask."""
    problem = problem_class(
        "backward", head_dim, mask=more.pop("mask", "full"), **more.pop("of", {})
    )
    scores, results = product(1, queries, head_dim), product(1, head_dim, queries, True)
    sums = 2 * [product(queries / 64, head_dim // 2, keys)]
    added = 4 * queries * head_dim
    stored = 2 * queries * keys + 2 * added
    products = [*4 * [scores], *4 * [results], *sums]
    more = {"added": added, "outputs": head_dim} | more
    tiles = keys, queries
    return problem, make_form(problem.traits, tiles, True, 2, products, stored, **more)


def test_clocks_and_bytes_of_a_tile_are_those_that_were_counted_by_hand():
    # 64 x 128 at head_dim 128: 2560 clocks of the tensor cores, 3008 of shared memory.
    _, form = fused()
    assert form.multiply_adds == 2560 * 2048 and form.shared == 3008 * 128
    # n = 64 with A in shared memory takes all of its 128 bytes a clock; from registers half.
    terms, read, steps = product(1, 64, 128)
    assert read / (terms / 2048) == 128 and steps == 8
    assert product(1, 64, 128, True).read == read / 2


@pytest.mark.parametrize(
    ("family", "text", "head_dim", "matrix", "shared"),
    [
        ("backward-dkdv", "m64n128w8s2", 128, 2048, 1856),
        ("backward-dq", "m128n128w8s1", 128, 3072, 2560),
        ("backward-dkdv", "m64n64w8s2-roles", 256, 2048, 2240),
        ("backward-dq", "m128n80w8s1", 256, 3840, 3584),
    ],
)
def test_two_kernels_are_counted_by_hand_too(family, text, head_dim, matrix, shared):
    config = parse_config(family, f"sm90-{text}")
    form = hopper_backward.form_of(H100, config, problem_class(family, head_dim))
    assert form.multiply_adds == matrix * 2048 and form.shared / 128 == pytest.approx(
        shared, rel=0.04
    )


def test_shared_memory_binds_where_it_is_slower_than_the_tensor_cores():
    problem, form = fused()
    ms = hopper_backward.predict_form(H100, problem, form).ms
    quick = replace(H100, smem_bytes_per_clock=256)
    assert hopper_backward.predict_form(quick, problem, form).ms < 0.95 * ms
    found = hopper_backward.predict_form(H100, problem, form)
    assert found.parts["shared memory"] > found.parts["matrix"]
    assert found.bound_by in ("shared memory", "latency")


def test_work_under_products_and_fewer_sums_gain():
    problem, form = fused()
    times = [
        hopper_backward.predict_form(H100, problem, each).ms
        for each in (replace(form, hidden=0.0), form, replace(form, added=0))
    ]
    assert times[0] > 1.02 * times[1] > 1.04 * times[2]


def test_machine_code_takes_the_place_of_formulas():
    family, text = "backward-dkdv", "m64n128w8s2"
    config, problem = parse_config(family, f"sm90-{text}"), problem_class(family)
    resources = ResourceUsage(168, 0, 200_000, 384, 1, "registers")
    form = hopper_backward.form_of(H100, config, problem)
    plain = model.predict(H100, problem, config, resources, None)
    assert plain.ms == pytest.approx(estimate(family, text).ms)
    more = form.counts.plus(Counts(issued=2000), 1)
    code = MachineCode((), Loop(more, form.rare, ()), Counts())
    assert model.predict(H100, problem, config, resources, code).ms > 1.3 * plain.ms
    with pytest.raises(ValueError, match=r"no block of .* fits"):
        model.predict(H100, problem, config, replace(resources, blocks_per_sm=0), None)


def test_what_does_not_fit_or_has_no_wgmma_is_refused():
    with pytest.raises(ValueError, match=r"no block of sm90-m128n128w8s3 fits"):
        estimate("backward-dq", "m128n128w8s3")
    with pytest.raises(ValueError, match="has no wgmma"):
        estimate("backward-dq", "m128n128w8s1", machines.find("A100"))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mask", ["full", "causal", "window256"])
@pytest.mark.parametrize(("q", "k", "heads"), [(4096, 4096, 32), (512, 8192, 8), (128, 128, 1)])
def test_nothing_is_faster_than_the_floor_or_than_any_part(family, mask, q, k, heads):
    sizes = {"head_dim": 64, "mask": mask, "q": q, "k": k, "heads": heads}
    floor = model.floor_ms(H100, problem_class(family, **sizes))["floor"]
    for text in CONFIGS[family]:
        found = estimate(family, text, **sizes)
        assert found.ms >= floor, text
        assert all(0 <= part < found.ms for part in found.parts.values()), text
        assert found.parts[found.bound_by] == max(found.parts.values())
        config = parse_config(family, f"sm90-{text}")
        assert model.at_best(H100, problem_class(family, **sizes), config).ms <= found.ms


@pytest.mark.parametrize(
    "rate",
    [
        *("memory_gbps", "clock_mhz", "l2_bytes_per_clock", "wgmma_f16", "sfu_lanes"),
        *("smem_bytes_per_clock", "num_sms"),
    ],
)
def test_a_faster_machine_is_never_slower(rate):
    faster = replace(H100, **{rate: 2 * getattr(H100, rate)})
    for family, texts in CONFIGS.items():
        for text in texts:
            before, after = (estimate(family, text, m, head_dim=64).ms for m in (H100, faster))
            assert after <= before * 1.0001, text


def test_more_to_do_never_takes_less_time():
    for family, texts in CONFIGS.items():
        for text in texts:
            times = [
                estimate(family, text, head_dim=64, q=s, k=s, heads=64).ms
                for s in (512, 1024, 4096)
            ]
            assert times == sorted(times), text
            full, causal = (
                estimate(family, text, head_dim=64, mask=m).ms for m in ("full", "causal")
            )
            assert 0.45 * full < causal < full, text
            bent = estimate(family, "m64n64w4s1", head_dim=64, more="-softcap-alibi").ms
            assert bent > 1.3 * estimate(family, "m64n64w4s1", head_dim=64).ms


def test_with_one_stage_each_tile_is_waited_for():
    for family, text in (("backward-dq", "m128n64w8"), ("backward-dkdv", "m64n128w8")):
        times = [estimate(family, f"{text}s{stages}", head_dim=64).ms for stages in (1, 2, 3)]
        assert times[0] > 1.1 * times[1] and times[1] == pytest.approx(times[2])


def test_one_kernel_has_what_its_config_says():
    problem = problem_class("backward", mask="causal")
    config = parse_config("backward", "sm90-m64n128w8s2")
    form = hopper_backward.form_of(H100, config, problem)
    # As was counted by hand: FlashAttention-3's, with two buffers of dQ.
    assert form.multiply_adds == 2560 * 2048 and form.shared == 3008 * 128
    assert (form.buffers, form.order, form.added) == (2, "last first", 64 * 128 * 4)
    assert 1 <= form.in_flight <= 32
    narrow = hopper_backward.form_of(
        H100, parse_config("backward", "sm90-m64n192w12s2"), problem_class("backward", 64)
    )
    assert narrow.multiply_adds == 1920 * 2048 and narrow.shared == 2208 * 128
    # One kernel has five products for seven, and pays for its turns.
    two = sum(
        estimate(family, text, mask="full").ms
        for family, text in (("backward-dq", "m128n128w8s2"), ("backward-dkdv", "m64n128w8s2"))
    )
    ms = model.estimate(H100, problem_class("backward"), config).ms
    assert 0.75 * two < ms < two


def test_registers_that_do_not_suffice_make_products_wait_for_each_other():
    wide = estimate("backward-dq", "m128n128w8s1", more="-softcap").ms
    assert wide > 1.5 * estimate("backward-dq", "m128n64w8s2", more="-softcap").ms


def test_blocks_that_draw_places_begin_once():
    """With a place for each SM as long; with more all but the way of K and V is hidden."""
    times = []
    for heads in (1, 8, 32):
        problem, form = fused(order="last first", of={"heads": heads, "q": 16384, "k": 16384})
        pair = [replace(form, persistent=x) for x in (False, True)]
        times.append([hopper_backward.predict_form(H100, problem, x).ms for x in pair])
    assert times[0][1] == pytest.approx(times[0][0])
    gained = [alone - drawn for alone, drawn in times]
    # 1,024 and 4,096 places on 132 SMs: 7 and 31 times less.
    assert 0 < 4 * gained[1] < gained[2] < 5 * gained[1]
    clocks = [
        model.block_clocks(H100, problem, parse_config("backward", f"sm90-{ONE}{x}"), FITS, None)
        for x in ("", "-persistent")
    ]
    assert [each.drawn for each in clocks] == [False, True]
    stored = 2 * (hopper_backward._ISSUED_PER_BLOCK + 2 * 128)
    # K and V come while dK and dV are stored, which takes less.
    between = [each.place(0, 1) for each in clocks]
    assert stored < between[1] < between[0] - 1000


# Turns


def played(walks, heads=1, sms=132, order="last first", turn=0.0, complete=0.0, buffers=2, **more):
    times = more.pop("tile", 100.0), more.pop("around", 0.0), turn, complete, 0.0
    walks = tuple(walks)[::-1] if order == "last first" else tuple(walks)
    return turns.clocks_of(in_one_list(walks), 1, heads, sms, *times, buffers, **more)


def in_one_list(walks):
    """Walks of one run each, for all heads."""
    return (tuple((run,) for run in walks),)


def test_without_turns_blocks_follow_each_other_on_the_first_free_sm():
    assert played([(0, 4)] * 6, sms=3) == 800
    assert played([(0, 4), (0, 2), (0, 2)], sms=2, order="first first") == 400
    # The longest starts last.
    assert played([(0, 4), (0, 2), (0, 2)], sms=2) == 600
    assert played([(0, 4)] * 6, sms=3, around=50.0) == 900


def test_a_block_waits_for_the_one_before_it_at_each_tile():
    # Three blocks at the same tile: the second adds 30 after the first, the third after that.
    assert played([(0, 1)] * 3, turn=30.0) == 160
    # Behind each other by a tile from the start, as below a diagonal, nobody waits.
    stairs = [(n, 8) for n in range(4)]
    assert played(stairs, turn=90.0) == played(stairs)
    assert played(stairs, turn=90.0, order="first first") > played(stairs, order="first first")


def test_a_block_that_adds_longer_than_it_computes_waits_for_itself():
    assert played([(0, 10)], complete=250.0) == pytest.approx(100 + 10 * 250)


def test_one_buffer_waits_until_it_is_free():
    walks = in_one_list([(0, 10)])
    two, one = (
        turns.clocks_of(walks, 1, 1, 1, 100.0, 0.0, 0.0, 0.0, 150.0, buffers) for buffers in (2, 1)
    )
    assert one > 1.5 * two


def test_heads_that_are_not_played_count_as_much_as_the_others():
    walks = tuple((2 * n, 256) for n in range(128))
    times = [played(walks, heads=heads, turn=20.0) for heads in (8, 16, 32, 64)]
    steps = [b - a for a, b in itertools.pairwise(times)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.05)
    assert steps[2] == pytest.approx(4 * steps[0], rel=0.05)


def tile_by_tile(walks, repeats, heads, sms, tile, around, turn, complete, until_free, buffers):
    """As `turns.clocks_of` of heads in turn, one tile after another."""
    free, last = [0.0] * sms, 1 + max(m for each in walks for of in each for m in of)
    ready = [[0.0] * (repeats * last) for _ in range(heads)]
    for block, head in itertools.product(range(len(walks[0])), range(heads)):
        done = heapq.heappop(free) + around / 2
        added, empty = done, [done] * buffers
        walk = walks[head * len(walks) // heads][block]
        visited = (h + m for h in range(0, repeats * last, last) for m in walk)
        for number, m in enumerate(visited):
            done = max(done + tile, empty[number % buffers] + turns._AFTER * tile)
            start = max(done, added, ready[head][m])
            ready[head][m], added = start + turn, start + complete
            empty[number % buffers] = start + until_free
        heapq.heappush(free, max(done, added) + around / 2)
    return max(free)


def tiles_of(walks):
    """The tiles of each walk of each list."""
    return [[[m for run in walk for m in range(*run)] for walk in each] for each in walks]


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("until_free", [0.0, 70.0, 160.0, 400.0])
@pytest.mark.parametrize("complete", [0.0, 60.0, 250.0])
def test_the_tiles_of_a_block_at_once_are_those_one_after_another(complete, until_free, buffers):
    rng = np.random.default_rng([int(complete), int(until_free), buffers])
    for repeats, heads, sms in ((1, 1, 3), (3, 2, 2), (2, 4, 5)):
        edges = np.sort(rng.integers(0, 20, (9, 2)), axis=1)
        listed = np.stack([edges, np.sort(rng.integers(20, 40, (9, 2)), axis=1)], axis=1)
        lists = [
            tuple(tuple(map(tuple, walk)) for walk in each) for each in (listed, listed[::-1])
        ]
        whole = in_one_list([*map(tuple, edges.tolist()), (0, 20)])
        for walks, turn in itertools.product((whole, tuple(lists[:heads])), (0.0, 90.0)):
            times = 100.0, 50.0, turn, complete, until_free, buffers
            found = turns.clocks_of(walks, repeats, heads, sms, *times, heads)
            every = tile_by_tile(tiles_of(walks), repeats, heads, sms, *times)
            assert found == pytest.approx(every)


def test_fewer_heads_on_fewer_sms_stand_for_all_of_a_list(monkeypatch):
    """Of a list all heads take turns at each record."""
    runs = ((32 * n + min(m, 24), 32 * n + 32) for n in range(16) for m in range(0, 32, 2))
    walks = in_one_list(runs)
    times = 3500.0, 4000.0, 2562.0, 1464.0, 1098.0, 2
    few = turns.clocks_of(walks, 1, 32, 132, *times, 32)
    monkeypatch.setattr(turns, "_MOST_BLOCKS", 10**6)
    turns.clocks_of.cache_clear()
    assert few == pytest.approx(turns.clocks_of(walks, 1, 32, 132, *times, 32), rel=0.02)
    turns.clocks_of.cache_clear()


def test_blocks_of_a_list_add_in_its_order():
    problem = problem_class("backward", mask="causal", q=512, k=512, heads=64, ragged="-ragged")
    queries, keys = sequences_of(problem)
    walks = walks_in_turn(problem, 128, 64)
    assert len(walks) == sum(-(-k // 128) for k in keys)
    tiles = -(-np.array(queries) // 64)
    before = np.cumsum(tiles) - tiles
    sequence = [int(np.searchsorted(before, first, "right")) - 1 for first, _ in walks]
    # The longest first; of each the blocks follow each other, the last keys first.
    runs = [(n, [walks[i] for i in at]) for n, at in runs_of(sequence)]
    assert sorted(n for n, _ in runs) == list(range(len(keys)))
    assert [len(of) for _, of in runs] == sorted((len(of) for _, of in runs), reverse=True)
    for n, of_sequence in runs:
        begins = [first for first, _ in of_sequence]
        assert begins == sorted(begins, reverse=True) and begins[-1] == before[n]
        assert {end for _, end in of_sequence} == {before[n] + tiles[n]}


def runs_of(numbers):
    """(number, places) of each run of equal numbers."""
    for number, group in itertools.groupby(enumerate(numbers), key=lambda each: each[1]):
        yield number, [place for place, _ in group]


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_sequences_with_lengths_of_their_own_wait_for_turns_too(mask):
    config = parse_config("backward", "sm90-m64n128w8s2")
    problem = problem_class(
        "backward", mask=mask, q=8192, k=8192, heads=64, group=8, ragged="-ragged"
    )
    form = hopper_backward.form_of(H100, config, problem)
    waiting = model.estimate(H100, problem, config).ms
    without = hopper_backward.predict_form(H100, problem, replace(form, order=None)).ms
    assert 1.05 * without < waiting < 1.5 * without


def test_a_call_of_very_many_tokens_goes_on_as_shorter_ones():
    config = parse_config("backward", "sm90-m64n128w8s2")
    times = [
        model.estimate(
            H100, problem_class("backward", mask="causal", q=n, k=n, heads=4), config
        ).ms
        for n in (2**15, 2**16, 2**17)
    ]
    for shorter, longer in itertools.pairwise(times):
        assert longer == pytest.approx(4 * shorter, rel=0.07)


def test_orders_of_a_causal_mask_are_worth_what_they_are_said_to_be():
    sizes = {"q": 8192, "k": 8192, "heads": 32}
    problem, form = fused(mask="causal", of=sizes)
    ms = {
        order: hopper_backward.predict_form(H100, problem, replace(form, order=order)).ms
        for order in (None, *turns.ORDERS)
    }
    assert ms[None] < ms["last first"] < 1.2 * ms[None] < ms["first first"]
