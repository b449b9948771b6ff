"""Where the time goes: roofs, turns and shares against counts made here."""

import pytest

from numflash.problem.fp8 import Fp8Recipe
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.facts import resources
from tuner.explain.sections import resources as section
from tuner.space import machines

from ....support.pages import page_faults

CALLS = {
    "wgmma": ("H200", (1, 512, 4, 128), {"causal": True}),
    "mma": ("A100", (1, 512, 4, 64), {}),
    "window": ("A100", (2, 700, 3, 96), {"window_size": (100, 0)}),
    "packed": ("A100", (1, 1, 8, 128), {"k": (1, 4096, 2, 128)}),
    "float32": ("T4", (1, 256, 2, 64), {"dtype": "float32"}),
    "codes": ("H200", (1, 512, 4, 128), {"precision": "fp8"}),
    "keys": ("H200", (1, 512, 4, 128), {"precision": "fp8", "fp8": Fp8Recipe("token")}),
}


def call(asked, name):
    gpu, q, options = CALLS[name]
    return asked(gpu, q, **options)


@pytest.mark.parametrize("name", CALLS)
def test_sections_are_whole(name, asked):
    found = call(asked, name)
    for kernel in filter(lambda each: each.is_tiled, found.kernels.values()):
        facts = resources.find(found, kernel)
        page = document("resources", arranged(section.figures(facts)))
        assert page_faults(page, 100_000) == []


def test_roofs(asked):
    found = asked("H200", (2, 300, 4, 64), causal=True)
    machine, kernel = machines.find("H200"), found.forward
    facts = resources.find(found, kernel)
    roof, clocks = facts.roofline, machine.num_sms * machine.clock_mhz * 1e6
    assert roof.flop.value == 4 * 64 * 2 * 4 * sum(range(1, 301))
    assert roof.tensor.value == pytest.approx(2 * machine.wgmma_f16 * clocks / 1e12)
    # 4 head_dim FLOP of both products go with an exponential, 16 a clock.
    assert roof.exponential.value == pytest.approx(4 * 64 * 16 * clocks / 1e12)
    assert roof.reached.value == pytest.approx(roof.flop.value / kernel.prediction.ms / 1e9)
    matrix = 2 * 4 * 300 * 300 * 2
    moved = 4 * matrix + 4 * 2 * 300 * 4 * 64 * 2 + 2 * 300 * 4 * 4
    assert roof.standard_intensity.value == pytest.approx(roof.flop.value / moved)
    assert roof.standard.value == pytest.approx(roof.flop.value / moved * 4.8)
    assert facts.floor.value < facts.predicted.value
    assert facts.parts.keys() == kernel.prediction.parts.keys()
    assert list(facts.parts.values()) == sorted(facts.parts.values(), key=lambda ms: -ms.value)


def test_a_turn_by_formula(asked):
    config = "sm80-m128n64w4s1"
    found = asked("A100", (1, 512, 4, 128), config=config)
    turn = resources.turn_of(machines.find("A100"), found.forward)
    # 128 x 64 scores, two products of depth 128, 1024 multiply-adds and 16 exponentials a clock.
    assert turn.clocks["products"].value == 2 * 128 * 64 * 128 / 1024
    assert turn.clocks["exponentials"].value == 128 * 64 / 16
    assert turn.instructions["exponentials"].value == 128 * 64 / 4 / 32
    assert turn.of == "a block" and turn.overlapped is None
    assert {number.origin for number in turn.clocks.values()} == {"model"}


@pytest.mark.parametrize("name", CALLS)
def test_buffers_fill_the_shared_memory_of_a_block(name, asked):
    found = call(asked, name)
    for kernel in filter(lambda each: each.is_tiled, found.kernels.values()):
        share = resources.share_of(kernel, found.machine.limits)
        assert sum(b.bytes.value for b in share.buffers) == share.smem_bytes.value
        names = [b.name for b in share.buffers]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "config, buffers",
    [
        ("sm90-m128n128w8s2v3-overlap-pingpong", {"Q": 2, "K": 2, "V": 3}),
        ("sm80-m64n64w4s2", {"Q": 1, "K": 2, "V": 2}),
    ],
)
def test_buffers_of_a_ring(config, buffers, asked):
    try:
        found = asked("H200", (1, 512, 4, 64), config=config)
    except ValueError:
        config = config.replace("s2v3", "s2-v3")
        found = asked("H200", (1, 512, 4, 64), config=config)
    share = resources.share_of(found.forward, found.machine.limits)
    names = [buffer.name.split()[0] for buffer in share.buffers]
    assert {name: names.count(name) for name in buffers} == buffers


def test_buffers_of_kernels_that_walk_over_queries(asked):
    found = asked("A100", (1, 512, 4, 64))
    kernel = found.kernels["backward-dkdv"]
    names = [b.name.split()[0] for b in resources.share_of(kernel, found.machine.limits).buffers]
    stages = kernel.config.num_stages
    assert names.count("Q") == names.count("do") == stages and names.count("K") == 1


def test_codes_have_a_time_roofs_and_a_turn_of_their_own_rates(asked):
    found = call(asked, "codes")
    facts = resources.find(found, found.forward)
    assert facts.predicted.value > facts.floor.value > 0 and facts.share.buffers
    # The roof of the tensor cores is that of e4m3.
    machine = found.machine
    peak = 2 * machine.wgmma_e4m3 * machine.num_sms * machine.clock_mhz / 1e6
    assert facts.roofline.tensor.value == pytest.approx(peak)
    config, traits = found.forward.config, found.forward.traits
    terms = 16 * config.tile_n * (traits.head_dim + traits.head_dim_v)
    assert facts.turn.clocks["products"].value == pytest.approx(
        config.num_warps * terms / machine.wgmma_e4m3
    )


def test_gradients_of_long_calls_in_one_kernel_are_predicted_too(asked):
    found = asked("H200", (1, 131072, 2, 128), causal=True)
    assert found.kernels["backward"].prediction.ms > 10
