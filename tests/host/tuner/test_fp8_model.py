"""The offline model of the forward on 8-bit floats: rates, counts, and what they say."""

from dataclasses import replace

import pytest

from numflash.configs import Traits, parse_config
from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.model import counts, errors, hopper
from tuner.pipeline.programs import program_of
from tuner.pipeline.rates import rates_of
from tuner.space import machines

OVERLAP = "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent"
TURNS = "fp8-sm90-m128n128w8s2-pingpong-persistent"
CODES, HALF = "fp8-sm89-m64n64w4s1", "fp8-sm89-m64n64w4s1-half"
# (config, head_dim, whether keys have scales of their own) -> instructions issued by a warp for a
# tile, products, special functions and conversions: by disassembly, CUDA 13.
DISASSEMBLED = {
    (CODES, 64, False): (421, 32, 34, 16),
    (CODES, 128, False): (547, 64, 34, 16),
    (CODES, 128, True): (740, 64, 34, 17),
    ("fp8-sm89-m64n64w4s2", 256, False): (781, 128, 34, 16),
    ("fp8-sm89-m128n128w8s1", 64, False): (619, 64, 66, 32),
    ("fp8-sm80-m128n64w4s1", 64, False): (1297, 128, 68, 32),
    ("fp8-sm80-m64n64w4s1", 128, True): (1582, 128, 34, 17),
    (OVERLAP, 64, False): (447, 6, 66, 32),
    (OVERLAP, 128, False): (491, 8, 66, 32),
    (TURNS, 128, False): (487, 8, 66, 32),
}


def problem_class(head_dim=128, more="-fp8", mask="full", seqlen=4096, heads=64):
    text = f"forward float16-d{head_dim}-dv{head_dim}-vec{more}"
    return ProblemClass.parse(f"{text} {mask} q{seqlen} k{seqlen} bh{heads} g1")


def estimate(gpu, text, problem=None):
    machine = gpu if isinstance(gpu, machines.Machine) else machines.find(gpu)
    return model.estimate(machine, problem or problem_class(), parse_config("forward", text))


@pytest.mark.parametrize("case", DISASSEMBLED, ids=lambda case: "-".join(map(str, case)))
def test_counts_by_formula_are_those_of_machine_code(case):
    (text, head_dim, key_scales), (issued, *others) = case, DISASSEMBLED[case]
    traits = Traits("float16", head_dim, head_dim, fp8=True, key_scales=key_scales)
    of = hopper if "sm90" in text else counts
    tile = of.by_formula(parse_config("forward", text), traits).tile
    assert tile.issued == pytest.approx(issued, rel=0.035)
    assert [tile.matrix, tile.special, tile.conversions] == pytest.approx(others, abs=1)
    assert (tile.multiply_adds_e4m3 > 0) == ("sm80" not in text)


@pytest.mark.parametrize(
    ("name", "rate", "tflops"),
    [
        ("NVIDIA L4", "mma_e4m3", 242),
        ("NVIDIA GeForce RTX 4090", "mma_e4m3", 330.3),
        ("NVIDIA GeForce RTX 5090", "mma_e4m3", 419),
        ("NVIDIA H100 80GB HBM3", "wgmma_e4m3", 1979),
        ("NVIDIA H200", "wgmma_e4m3", 1979),
    ],
)
def test_rates_times_clock_are_the_published_peak(name, rate, tflops):
    machine = machines.find(name)
    found = 2 * getattr(machine, rate) * machine.num_sms * machine.clock_mhz / 1e6
    assert found == pytest.approx(tflops, rel=0.02)


def test_only_ada_and_small_blackwells_have_mma_of_e4m3():
    having = {m.arch for m in map(machines.find, machines.names()) if m.mma_e4m3}
    assert having == {"sm_89", "sm_120"}
    assert {m.arch for m in map(machines.find, machines.names()) if m.wgmma_e4m3} == {"sm_90a"}


@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_where_there_is_no_such_instruction_float16_is_multiplied_behind_conversions(gpu):
    machine, traits = machines.find(gpu), problem_class().traits
    config = parse_config("forward", CODES)
    own, found = (
        work.tile
        for work in (counts.by_formula(config, traits), counts.on_machine(machine, config, traits))
    )
    assert (found.matrix, found.multiply_adds_e4m3) == (2 * own.matrix, 0)
    assert found.multiply_adds == own.multiply_adds_e4m3
    assert found.conversions == own.conversions + 12 * own.matrix
    assert found.issued == own.issued + 13 * own.matrix
    # Decoding once, on the way to shared memory, is faster than for each warp and fragment.
    assert estimate(machine, HALF).ms < estimate(machine, CODES).ms
    ada = machines.find("RTX 4090")
    assert counts.on_machine(ada, config, traits) == counts.by_formula(config, traits)
    assert estimate(ada, CODES).ms < 0.75 * estimate(ada, HALF).ms


def test_twice_the_rate_of_products_counts_where_products_bind():
    for text, gpu, rate in ((TURNS, "H100", "wgmma_e4m3"), (CODES, "L40S", "mma_e4m3")):
        machine, problem = machines.find(gpu), problem_class(128)
        slow = replace(machine, **{rate: getattr(machine, rate) / 2})
        fast, slower = (estimate(each, text, problem) for each in (machine, slow))
        assert slower.ms > 1.3 * fast.ms
        assert slower.parts["matrix"] == pytest.approx(2 * fast.parts["matrix"])


def test_codes_are_read_as_bytes():
    problem = problem_class(seqlen=512, heads=4096)
    of_codes, in_16_bits = (
        estimate("H100", text, each).parts["memory"]
        for text, each in (
            (TURNS, problem),
            (TURNS[4:], problem_class(128, "", "full", 512, 4096)),
        )
    )
    assert of_codes == pytest.approx(5 / 8 * in_16_bits, rel=0.02)


def test_on_hopper_8_bits_are_faster_and_exponentials_bind_at_small_head_dims():
    narrow = "fp8-sm90-m128n64w8s2-pingpong-persistent"
    for head_dim, text, least in ((64, OVERLAP, 1.0), (128, OVERLAP, 1.25), (256, narrow, 1.3)):
        of_codes = estimate("H200", text, problem_class(head_dim)).ms
        in_16_bits = estimate("H200", text[4:], problem_class(head_dim, "")).ms
        assert in_16_bits > least * of_codes
    assert estimate("H200", OVERLAP, problem_class(64)).bound_by in ("exponential", "latency")


def test_a_stage_of_two_tiles_is_waited_for_half_as_often():
    """At head_dim 256 a stage holds 128 keys, and a tile 64: loads are late by the stage."""
    problem = problem_class(256, mask="causal")
    slow = replace(machines.find("H200"), l2_bytes_per_clock=machines.find("H200").num_sms * 4.0)
    narrow, wide = (
        estimate(slow, f"fp8-sm90-m128n{n}w8s1-pingpong-persistent", problem).ms for n in (64, 128)
    )
    assert narrow == pytest.approx(wide, rel=0.25)


def test_errors_of_8_bits_are_their_own():
    h200, config = machines.find("H200"), parse_config("forward", TURNS)
    long, short = (errors.error(h200, problem_class(seqlen=n), config) for n in (4096, 2048))
    assert long == errors.ERRORS["sm90 forward fp8"] < short
    codes = parse_config("forward", CODES)
    ada = machines.find("RTX 4090")
    assert errors.error(ada, problem_class(), codes) == errors.UNKNOWN_ON_8_BITS
    # What is unknown of 16 bits does not become worse by them.
    assert errors.ERRORS["sm80 few queries"] == errors.UNKNOWN


@pytest.mark.parametrize(
    ("gpu", "text", "rate"),
    [("H200", TURNS, 4096), ("RTX 4090", CODES, 512 * 0.95), ("B200", CODES, 1024 * 0.95)],
)
def test_the_events_of_an_sm_have_the_same_rates(gpu, text, rate):
    config, traits = parse_config("forward", text), problem_class().traits
    program = program_of(config, traits, 8)
    found = rates_of(program, machines.find(gpu), config, traits)
    rows, columns, depth = program.shapes["S"]
    assert found.products["S"] == rows * columns * depth / rate
