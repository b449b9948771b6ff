"""The offline model of Hopper's forward: what its switches are worth, how tiles are dealt."""

from dataclasses import replace

import pytest

from numflash.configs import Sm90ForwardConfig, parse_config
from numflash.problem.classes import ProblemClass
from numflash.selection.layout import persistent_walks, places
from tuner import model
from tuner.model import grid, hopper
from tuner.model.machine_code import Counts, Loop, MachineCode
from tuner.records import ResourceUsage
from tuner.space import machines

H100 = machines.find("H100")
BOTH = "m128n128w8s2-overlap-pingpong-persistent"
RESOURCES = ResourceUsage(168, 0, 200_000, 384, 1, "registers")


def problem_class(head_dim=128, mask="full", q=8192, k=8192, heads=32, group=1, features=""):
    traits = f"float16-d{head_dim}-dv{head_dim}{features}-vec"
    return ProblemClass.parse(f"forward {traits} {mask} q{q} k{k} bh{heads} g{group}")


def estimate(text, problem, machine=H100):
    return model.estimate(machine, problem, parse_config("forward", f"sm90-{text}"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_turns_and_overlap_each_gain(head_dim):
    problem = problem_class(head_dim)
    times = {
        switches: estimate(f"m128n128w8s2{switches}-persistent", problem).ms
        for switches in ("", "-overlap", "-pingpong", "-overlap-pingpong")
    }
    assert times["-overlap-pingpong"] < min(times["-overlap"], times["-pingpong"])
    assert times["-overlap"] < 0.99 * times[""] and times["-pingpong"] < 0.99 * times[""]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_overlap_is_worth_less_where_turns_hide_the_softmax_already(head_dim):
    problem = problem_class(head_dim)
    with_turns, without = (
        estimate(f"m128n64w8s2{turns}", problem).ms
        / estimate(f"m128n64w8s2-overlap{turns}", problem).ms
        for turns in ("-pingpong", "")
    )
    assert without > with_turns > 1


def turn_of(text):
    """(config, a tile of keys of it) at head_dim 128, where the L2 is no obstacle."""
    config, traits = parse_config("forward", f"sm90-{text}"), problem_class().traits
    return config, hopper._turn(H100, config, traits, hopper.by_formula(config, traits), 1e6)


def test_a_warpgroup_by_itself_does_one_thing_after_the_other():
    config, turn = turn_of("m64n128w4s2")
    alone = turn.products + turn.softmax
    assert hopper._clocks_of_turn(config, turn, 1) >= alone
    # Two blocks on an SM fill each other's gaps.
    assert hopper._clocks_of_turn(config, turn, 2) < 1.9 * alone


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # K has half of a turn of 1000 clocks until it must be there, less with more to read it.
        ("m64n128w4s1", 2 * (1600 - 500)),
        ("m64n128w4s1-overlap", 1600 - 500 + 1600),
        ("m128n128w8s1", 2 * (1600 - 250)),
        ("m64n128w4s2-overlap", 1600 - 1500 + 1600 - 1000),
        ("m64n128w4s3-overlap", 0),
        # Of K and V, each by its own stages.
        ("m64n128w4s2-v3-overlap", 1600 - 1500),
        ("m64n128w4s3-v2-overlap", 1600 - 1000),
        ("m64n128w4s1-v2", 1600 - 500 + 1600 - 1500),
    ],
)
def test_buffers_are_waited_for(text, expected):
    config, turn = turn_of(text)
    found = hopper._stall(config, replace(turn, loads=1000.0), clocks=1000.0, latency=600.0)
    assert found == expected


def test_each_tile_of_rows_begins_and_ends(monkeypatch):
    many, machine = problem_class(q=512, k=512, heads=1024), replace(H100, memory_gbps=1e5)
    before = estimate(BOTH, many, machine).ms
    monkeypatch.setattr(hopper, "_ISSUED_PER_PLACE", hopper._ISSUED_PER_PLACE + 183)
    # 32 tiles of rows a block, of two warpgroups each.
    assert estimate(BOTH, many, machine).ms - before > 0.8 * 32 * 2 * 183 / 1830e3


def test_persistent_blocks_start_once(monkeypatch):
    many, texts = problem_class(q=512, k=512, heads=1024), (BOTH, BOTH.removesuffix("-persistent"))
    before = [estimate(text, many).ms for text in texts]
    assert before[0] < before[1]
    monkeypatch.setattr(hopper, "BLOCK_LATENCY", hopper.BLOCK_LATENCY + 1830)
    after = [estimate(text, many).ms for text in texts]
    # A microsecond once, and in each of 4096 / 132 waves.
    assert after[0] - before[0] == pytest.approx(0.001, rel=0.25)
    assert after[1] - before[1] > 0.025


def test_with_fewer_stages_blocks_wait_for_keys():
    times = [estimate(f"m128n64w8s{s}-overlap-persistent", problem_class()).ms for s in (1, 2, 3)]
    assert times[0] > 1.1 * times[1] and times[1] >= times[2]
    plain = [estimate(f"m128n64w8s{s}-persistent", problem_class()).ms for s in (1, 2)]
    # Without overlap V may come later.
    assert plain[0] / plain[1] < times[0] / times[1]


def test_more_rows_of_a_block_read_keys_less_often():
    parts = [estimate(f"m{64 * g}n64w{4 * g}s2-overlap", problem_class()).parts for g in (1, 2, 3)]
    assert parts[0]["L2"] == pytest.approx(2 * parts[1]["L2"], rel=0.02)
    assert parts[0]["L2"] == pytest.approx(3 * parts[2]["L2"], rel=0.02)
    assert parts[0]["matrix"] == pytest.approx(parts[1]["matrix"])


def test_results_in_the_place_of_q_delay_the_next_rows(monkeypatch):
    problem, times = problem_class(q=512, k=512, heads=1024), []
    for is_apart in (True, False):
        monkeypatch.setattr(Sm90ForwardConfig, "o_is_apart", lambda *_, x=is_apart: x)
        times.append(estimate(BOTH, problem).ms)
    # Each of 32 tiles of rows waits for Q, 300 clocks at least.
    assert times[1] - times[0] > 0.8 * 32 * 300 / 1830e3


@pytest.mark.parametrize("mask", ["full", "causal", "window1024"])
@pytest.mark.parametrize("in_flight", [1, 3, 5, 16])
def test_persistent_blocks_walk_as_the_kernel_does(mask, in_flight):
    problem = problem_class(mask=mask, q=4096, k=4096, heads=16)
    laid = grid.lay(problem, parse_config("forward", f"sm90-{BOTH}"))
    found = places(laid.launch._replace(in_flight=in_flight)).tiles
    assert len(found) == laid.blocks
    busiest = max(sum(found[own]) + len(own) for own in persistent_walks(len(found), 132))
    tiles, walks = grid.dealt_out(laid, in_flight, 132)
    assert tiles + walks == busiest


def test_many_rounds_are_about_even():
    laid = grid.lay(
        problem_class(mask="causal", heads=2048), parse_config("forward", "sm90-" + BOTH)
    )
    tiles, walks = grid.dealt_out(laid, 3, 132)
    assert tiles == pytest.approx(laid.walks.total * 2048 / 132, rel=0.02) and walks == 993


def test_heads_in_flight_are_those_of_the_call():
    config = parse_config("forward", f"sm90-{BOTH}")
    for heads, keys, expected in ((32, 16384, 16), (32, 1024, 32), (2, 65536, 2)):
        problem = problem_class(q=keys, k=keys, heads=heads)
        laid = grid.lay(problem, config)
        assert grid.heads_in_flight(problem, laid, config, H100) == expected
        four = replace(config, heads_in_flight=4)
        assert grid.heads_in_flight(problem, laid, four, H100) == min(4, heads)


def test_heads_that_do_not_divide_a_warpgroup_are_not_packed():
    problem = problem_class(q=64, k=8192, heads=128, group=128)
    hopper_config = parse_config("forward", "sm90-m64n128w4s2-packed")
    assert grid.lay(problem, hopper_config).packed == 1
    assert grid.lay(problem, parse_config("forward", "sm80-m64n64w4s1-packed")).packed == 128


CONFIGS = [BOTH, "m64n64w4s2b2-overlap", "m192n128w12s1", "m128n128w8s2x4-overlap", "m64n256w4s1"]


@pytest.mark.parametrize("mask", ["full", "causal", "window256"])
@pytest.mark.parametrize(("q", "k", "heads"), [(4096, 4096, 32), (64, 16384, 8), (128, 128, 1)])
def test_nothing_is_faster_than_the_floor_or_than_any_part(mask, q, k, heads):
    problem = problem_class(64, mask, q, k, heads)
    floor = model.floor_ms(H100, problem)["floor"]
    for text in CONFIGS:
        found = estimate(text, problem)
        assert found.ms >= floor, text
        assert all(0 <= part < found.ms for part in found.parts.values()), text
        assert found.parts[found.bound_by] == max(found.parts.values())


@pytest.mark.parametrize(
    "rate",
    [
        "memory_gbps",
        "clock_mhz",
        "l2_bytes_per_clock",
        "wgmma_f16",
        "fp32_lanes",
        "alu_lanes",
        "sfu_lanes",
        "smem_bytes_per_clock",
    ],
)
def test_a_faster_machine_is_never_slower(rate):
    faster, gains = replace(H100, **{rate: 2 * getattr(H100, rate)}), []
    for text in CONFIGS:
        for q, heads in ((64, 8), (512, 512), (4096, 64)):
            problem = problem_class(64, q=q, k=4096, heads=heads)
            before, after = (estimate(text, problem, m).ms for m in (H100, faster))
            assert after <= before * 1.0001, (text, q)
            gains.append(before / after)
    assert max(gains) > 1.001


def test_more_to_do_never_takes_less_time():
    for text in CONFIGS:
        for mask in ("full", "causal"):
            times = [
                estimate(text, problem_class(64, mask, s, s, 64)).ms for s in (256, 1024, 4096)
            ]
            assert times == sorted(times), (text, mask)
        full, causal = (
            estimate(text, problem_class(64, m, 8192, 8192)).ms for m in ("full", "causal")
        )
        assert 0.48 * full < causal < full, text


def test_softcap_alibi_and_spills_cost():
    plain = estimate(BOTH, problem_class()).ms
    assert estimate(BOTH, problem_class(features="-softcap-alibi")).ms > 1.5 * plain
    # 144 keys are 72 registers of S and 36 of P beside 64 of O: more than 160.
    fits, spills = ("m192n80w12s2-overlap", "m192n144w12s2-overlap")
    assert estimate(spills, problem_class()).ms > 1.5 * estimate(fits, problem_class()).ms


def test_kernels_of_warpgroups_win_on_hopper_and_run_nowhere_else():
    problem = problem_class()
    older = parse_config("forward", "sm80-m128n64w4s1")
    assert estimate(BOTH, problem).ms < 0.7 * model.estimate(H100, problem, older).ms
    config = parse_config("forward", f"sm90-{BOTH}")
    with pytest.raises(ValueError, match="has no wgmma"):
        estimate("m128n64w8s1", problem_class(64), machines.find("A100"))
    with pytest.raises(ValueError, match=r"no block of .* fits"):
        estimate("m192n256w12s2", problem)
    with pytest.raises(ValueError, match=r"no block of .* fits"):
        model.predict(H100, problem, config, replace(RESOURCES, blocks_per_sm=0), None)


def test_the_floor_is_that_of_wgmma():
    forward = model.floor_ms(H100, problem_class())["matrix"]
    assert forward == pytest.approx(4 * 8192**2 * 128 * 32 / 989.4e9, rel=0.01)
    backward = replace(problem_class(), family="backward")
    assert model.floor_ms(H100, backward)["matrix"] == pytest.approx(2.5 * forward, rel=0.01)


def test_machine_code_takes_the_place_of_formulas():
    problem, config = problem_class(), parse_config("forward", f"sm90-{BOTH}")
    formula = hopper.by_formula(config, problem.traits)
    plain = model.predict(H100, problem, config, RESOURCES, None)
    assert plain.ms == pytest.approx(estimate(BOTH, problem).ms)
    main = Loop(formula.tile.plus(Counts(issued=1000), 1), Counts(), ())
    code = MachineCode((), main, Counts(), around=Counts(issued=3000))
    slower = model.predict(H100, problem, config, RESOURCES, code)
    assert slower.parts["issue"] > 2 * plain.parts["issue"] and slower.ms > plain.ms
    work = hopper.from_machine_code(code)
    # A tile of keys is multiplied outside of the loop.
    assert work.place.issued == 3000 - main.counts.issued
