"""The event simulation of one SM: what must hold of every timeline, and what timelines show.

`tests/sim/test_pipeline_order.py` has the order of steps; here steps take time.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from numflash_tuner.pipeline import programs, trace
from numflash_tuner.pipeline.engine import play
from numflash_tuner.pipeline.player import COPIES, EXPONENTIALS
from numflash_tuner.pipeline.programs import program_of
from numflash_tuner.pipeline.rates import Rates, rates_of
from numflash_tuner.pipeline.steps import Begin, Claim, Fetch, Multiply, Program, Walk
from numflash_tuner.space import machines

from numflash.configs import IMPLEMENTATIONS, Traits, parse_config

BOTH = "overlap-pingpong"
OF_16_BITS, WIDE = Traits("bfloat16", 128, 128), Traits("bfloat16", 256, 256)
NARROW, OF_FLOAT32 = Traits("bfloat16", 64, 64), Traits("float32", 64, 64)
OF_8_BITS = Traits("bfloat16", 128, 128, fp8=True)
# (GPU, family, config, traits, blocks)
KERNELS = {
    "forward": ("H100", "forward", f"sm90-m128n128w8s2-{BOTH}-persistent", OF_16_BITS, 1),
    "stages of V": ("H100", "forward", f"sm90-m128n128w8s2-v3-{BOTH}", OF_16_BITS, 1),
    "one stage": ("H100", "forward", "sm90-m128n128w8s1", OF_16_BITS, 1),
    "two blocks": ("H100", "forward", "sm90-m64n64w4s2b2-overlap", NARROW, 2),
    "8 bits": ("H100", "forward", f"fp8-sm90-m128n128w8s2-{BOTH}", OF_8_BITS, 1),
    "8 bits, halves": ("H100", "forward", "fp8-sm90-m128n64w8s2-pingpong", OF_8_BITS, 1),
    "one backward": ("H100", "backward", "sm90-m64n128w8s2", OF_16_BITS, 1),
    "dQ by one": ("H100", "backward", "sm90-m64n192w12s2", NARROW, 1),
    "dQ": ("H100", "backward-dq", "sm90-m128n64w8s2", OF_16_BITS, 1),
    "dK and dV": ("H100", "backward-dkdv", "sm90-m64n128w8s2", OF_16_BITS, 1),
    "roles": ("H100", "backward-dkdv", "sm90-m64n64w8s2-roles", WIDE, 1),
    "mma": ("A100", "forward", "sm80-m128n64w4s1", OF_16_BITS, 2),
    "mma, stages": ("A100", "forward", "sm80-m128n64w4s3", OF_16_BITS, 1),
    "mma, registers": ("T4", "forward", "sm75-m64n64w4s1", Traits("float16", 64, 64), 1),
    "mma, codes": ("A100", "forward", "sm80-m64n64w4s2", replace(NARROW, codes=True), 1),
    "mma, dQ": ("A100", "backward-dq", "sm80-m64n64w4s2", NARROW, 2),
    "mma, dK and dV": ("A100", "backward-dkdv", "sm80-m64n64w4s1", NARROW, 2),
    "mma, apart": ("A100", "backward-dkdv", "sm80-m64n64w4s1-apart", WIDE, 1),
    "mma, one backward": ("A100", "backward", "sm80-m64n64w4s2", NARROW, 1),
    "portable": ("A100", "forward", "m64n32w4", OF_FLOAT32, 2),
    "portable, dQ": ("A100", "backward-dq", "m32n32w4", OF_FLOAT32, 1),
    "portable, dK and dV": ("A100", "backward-dkdv", "m32n32w4", OF_FLOAT32, 1),
}
TILES = 12
# Of a warpgroup at head_dim 128 and 128 keys, in a round number of clocks.
ROUND = Rates(
    products={"S": 512.0, "PV": 512.0},
    work={"max": 196.0, "exp": 512.0, "pack": 64.0, "mask": 259.0, "finish": 64.0},
    copies={"Q": 512.0, "K": 1024.0, "V": 1024.0},
)


def played(name):
    """(program, rates, timeline) of a kernel."""
    gpu, family, text, traits, blocks = KERNELS[name]
    machine, config = machines.find(gpu), parse_config(family, text)
    program = program_of(config, traits, (Walk(TILES, masked=(TILES - 1,)),))
    rates = rates_of(program, machine, config, traits)
    return program, rates, play(program, rates, blocks)


def forward(text, tiles=40, traits=OF_16_BITS) -> Program:
    """A forward on Hopper."""
    return program_of(parse_config("forward", f"sm90-{text}"), traits, tiles)


@pytest.mark.parametrize("name", KERNELS)
def test_spans_of_a_lane_never_overlap(name):
    """So no buffer is filled while it is held, and no unit does two things at once."""
    timeline = played(name)[2]
    for lane in timeline.lanes:
        spans = timeline.of(lane.name)
        for before, after in pairwise(spans):
            assert before.end <= after.start, (before, after)
        assert all(span.clocks > 0 for span in spans)
        assert 0 <= timeline.busy[lane.name] <= 1 + 1e-9


@pytest.mark.parametrize("name", KERNELS)
def test_what_multiplies_works_exactly_for_the_products(name):
    program, rates, timeline = played(name)
    steps = [step for steps in program.roles.values() for step in steps()]
    for product, clocks in rates.products.items():
        count = sum(isinstance(x, Begin | Multiply) and x.product == product for x in steps)
        assert count >= TILES
        spans = [span for span in timeline.of(program.unit) if span.kind == product]
        total = KERNELS[name][4] * count * clocks
        assert sum(span.clocks for span in spans) == pytest.approx(total)


@pytest.mark.parametrize("name", KERNELS)
def test_a_tile_is_scored_before_its_softmax_and_that_before_its_product(name):
    program, _, timeline = played(name)
    last = "PV" if "PV" in program.shapes else "dQ" if "dV" not in program.shapes else "dV"
    for owner in timeline.owners(EXPONENTIALS):
        for span in timeline.of(EXPONENTIALS, owner):
            tile = span.label.split()[1]
            found = timeline.of(program.unit, owner)
            scored = [x.end for x in found if x.label == f"S {tile}"]
            multiplied = [x.start for x in found if x.label == f"{last} {tile}"]
            assert max(scored) <= span.start
            assert not multiplied or span.end <= min(multiplied)


FORWARDS = "forward", "stages of V", "one stage", "two blocks", "8 bits", "mma", "mma, stages"


@pytest.mark.parametrize("name", [*FORWARDS, "portable"])
def test_a_product_reads_what_has_come_and_is_still_held(name):
    program, _, timeline = played(name)
    lanes = [lane.name for lane in timeline.lanes if lane.group == "buffer"]
    spans = [span for lane in lanes for span in timeline.of(lane) if span.kind == "held"]
    held = {(span.owner, span.label): span for span in spans}
    for span in timeline.of(program.unit):
        block, tile = span.owner.rpartition(": ")[0], span.label.split()[1]
        read = held[block, f"{'K' if span.kind == 'S' else 'V'} {tile}"]
        assert read.start <= span.start < span.end <= read.end


def test_without_copies_and_softmax_the_tensor_cores_never_rest():
    free = replace(ROUND.with_copies(0), work=dict.fromkeys(ROUND.work, 0.0), latency=0)
    timeline = play(forward(f"m128n128w8s2-{BOTH}"), free)
    assert timeline.turn == 2 * (512 + 512)
    assert timeline.busy["tensor"] == pytest.approx(1)


def test_copies_bound_a_turn_at_their_own_rate():
    timeline = play(forward(f"m128n128w8s2-{BOTH}"), ROUND.with_copies(3000))
    assert timeline.turn == pytest.approx(2 * 3000, rel=0.01)
    assert timeline.busy[COPIES] == pytest.approx(1)


def test_turns_and_overlap_hide_the_softmax_at_head_dim_64():
    """The lesson on ping-pong: clocks of a turn of two warpgroups, with copies hidden."""
    found = [
        trace(
            machines.find("H100"),
            parse_config("forward", f"sm90-m128n128w8s2{text}"),
            *(NARROW, 40),
            copies=0,
        )
        for text in ("", "-pingpong", f"-{BOTH}")
    ]
    assert [timeline.turn for timeline in found] == [1788, 1276, 1244]
    busy = [timeline.busy["tensor"] for timeline in found]
    assert busy == pytest.approx([1024 / 1788, 1024 / 1276, 1024 / 1244], rel=0.02)


def test_the_next_k_must_be_fetched_before_this_v():
    """Fetched in the order K, V, K, V, with two buffers of V tensor cores idle a fifth."""

    def in_pairs(v_stages):
        for channel in ("K", "Q"):
            for buffer in range(1 if channel == "K" else 2):
                yield Claim(channel, buffer)
                yield Fetch(channel, buffer, 0)
        for tile in range(40):
            for channel, stages in (("K", 2), ("V", v_stages))[tile == 0 :]:
                yield Claim(channel, tile % stages)
                yield Fetch(channel, tile % stages, tile)

    busy = {}
    for text, v_stages in (("s2", 2), ("s2-v3", 3)):
        program = forward(f"m128n128w8{text}-{BOTH}")
        busy[text] = play(program, ROUND).busy["tensor"]
        producer = {"producer": lambda v_stages=v_stages: in_pairs(v_stages)}
        other = replace(program, roles={**program.roles, **producer})
        busy[text, "in pairs"] = play(other, ROUND).busy["tensor"]
    assert busy["s2"] == busy["s2-v3"] == pytest.approx(1)
    assert busy["s2", "in pairs"] == pytest.approx(0.81, abs=0.02)
    assert busy["s2-v3", "in pairs"] == pytest.approx(1, abs=0.01)


def test_warpgroups_leave_each_other_the_keys_that_they_do_not_see():
    walk = Walk(6, seen=((0, 4), (0, 6)), masked=(3, 5))
    config = parse_config("forward", f"sm90-m128n128w8s2-{BOTH}")
    timeline = play(program_of(config, OF_16_BITS, [walk]), ROUND)
    of_groups = [timeline.of("tensor", f"WG {group}") for group in range(2)]
    tiles = [len({x.label for x in found if x.kind == "S"}) for found in of_groups]
    assert tiles == [4, 6]
    masks = [[x.label for x in timeline.of(f"WG {g}") if x.kind == "mask"] for g in range(2)]
    assert masks == [["mask 3"], ["mask 3", "mask 5"]]


def test_a_persistent_block_fetches_the_next_k_while_it_finishes():
    config = parse_config("forward", f"sm90-m128n128w8s2-{BOTH}-persistent")
    timeline = play(program_of(config, OF_16_BITS, [Walk(5), Walk(3)]), ROUND)
    lanes = [lane.name for lane in timeline.lanes if lane.name.startswith("K ")]
    (k_5,) = (x for y in lanes for x in timeline.of(y) if (x.label, x.kind) == ("K 5", "copy"))
    (finish, *_) = (x for x in timeline.of("WG 1") if x.kind == "finish")
    assert k_5.start < finish.start


def test_blocks_on_an_sm_use_what_the_other_leaves():
    gpu, family, text, traits, _ = KERNELS["mma"]
    machine, config = machines.find(gpu), parse_config(family, text)
    alone, together = (trace(machine, config, traits, 24, blocks=n) for n in (1, 2))
    assert alone.turn < together.turn < 2 * alone.turn
    assert together.busy["tensor"] > alone.busy["tensor"] + 0.1
    assert together.lanes[0].name == "block 0: Q"


def test_roles_that_wait_for_ever_are_named():
    program = forward("m128n128w8s2", tiles=4)
    consume = program.roles["WG 1"]

    def forgetful():
        return (step for step in consume() if step[:2] != ("K", 1))

    broken = replace(program, roles={**program.roles, "WG 1": forgetful})
    with pytest.raises(RuntimeError, match="wait for ever: WG 0, WG 1, producer"):
        play(broken, ROUND)


def test_an_empty_walk_takes_no_turn():
    timeline = play(forward(f"m128n128w8s2-{BOTH}", tiles=0), ROUND)
    assert timeline.of("tensor") == []
    assert timeline.end > 0


def test_machine_code_says_how_long_the_softmax_takes():
    h100, config = machines.find("H100"), parse_config("forward", f"sm90-m128n128w8s2-{BOTH}")
    program = program_of(config, OF_16_BITS, 4)
    loop = SimpleNamespace(
        clocks={"tensor": 1024, "special": 528, "half_rate": 196},
        instructions={"fmnmx": 66, "conversions": 32},
        skipped={"mask": 259},
    )
    found = rates_of(program, h100, config, OF_16_BITS, SimpleNamespace(main_loop=loop))
    assert found.origin == "machine code"
    assert [found.work[x] for x in ("exp", "pack", "mask")] == [528, 64, 259]
    assert found.work["max"] == 2 * 66 + 60
    assert sum(found.products.values()) == loop.clocks["tensor"]
    unread = rates_of(program, h100, config, OF_16_BITS, SimpleNamespace(main_loop=None))
    assert unread.origin == "formula"
    assert unread.work["exp"] == 64 * 128 / 16


def test_few_blocks_get_more_of_the_l2():
    h100, config = machines.find("H100"), parse_config("forward", "sm90-m128n128w8s2")
    program = program_of(config, OF_16_BITS, 4)
    few, many = (rates_of(program, h100, config, OF_16_BITS, blocks=n) for n in (4, 4000))
    assert few.copies["K"] < many.copies["K"] == 128 * 128 * 2 / 24


def test_every_kernel_of_attention_has_a_program():
    families = "forward", "backward", "backward-dq", "backward-dkdv"
    kinds = {
        row.configs[family]
        for row in IMPLEMENTATIONS
        for family in families
        if family in row.configs
    }
    assert kinds == set(programs._PROGRAMS)


def test_bad_input():
    a100 = machines.find("A100")
    with pytest.raises(ValueError, match=r"no program is known for the kernel of delta w4"):
        program_of(parse_config("delta", "w4"), OF_16_BITS, 4)
    with pytest.raises(ValueError, match=r"A100.* has no products as sm90-m128n128w8s2 needs"):
        trace(a100, parse_config("forward", "sm90-m128n128w8s2"), OF_16_BITS)
    with pytest.raises(ValueError, match=r"sm80-m64n64w4s1 walks once, got 2 walks"):
        program_of(parse_config("forward", "sm80-m64n64w4s1"), NARROW, [Walk(1), Walk(2)])
