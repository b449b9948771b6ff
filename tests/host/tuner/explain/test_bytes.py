"""FLOP, bytes and memory against counts made here."""

import numpy as np
import pytest

from numflash.problem.fp8 import Fp8Recipe
from tuner.drawing.document import document
from tuner.drawing.figures import arranged
from tuner.explain.asked import NotShownError
from tuner.explain.facts import bytes as bytes_facts
from tuner.explain.sections import bytes as section
from tuner.space import machines

from ....support.pages import page_faults

CALLS = {
    "causal": ("H200", (2, 300, 4, 128), {"causal": True}),
    "decode": ("A100", (1, 1, 8, 128), {"k": (1, 4096, 2, 128)}),
    "float32": ("T4", (1, 256, 2, 64), {"dtype": "float32"}),
    "long": ("H200", (1, 65536, 16, 64), {"causal": True}),
    "one": ("A100", (1, 1, 1, 64), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_sections_are_whole(name, asked):
    gpu, q, options = CALLS[name]
    facts = bytes_facts.find(asked(gpu, q, **options))
    page = document("bytes", arranged(section.figures(facts)))
    assert page_faults(page, 100_000) == []


def test_counts(asked):
    facts = bytes_facts.find(asked("H200", (2, 300, 4, 64), causal=True))
    least, standard, ours = (facts.ways[name] for name in ("least", "standard", "this call"))
    scores, arrays = 2 * 4 * 300 * 300, 4 * 2 * 300 * 4 * 64 * 2 + 2 * 300 * 4 * 4
    assert least.flop.value == 4 * 64 * 2 * 4 * sum(range(1, 301))
    assert standard.flop.value == 4 * 64 * scores
    assert standard.bytes.value == 4 * 2 * scores + arrays
    assert standard.memory.value == 2 * 2 * scores + arrays
    assert least.bytes.value == least.memory.value == arrays == ours.memory.value
    assert least.flop.value <= ours.flop.value and arrays <= ours.bytes.value


def test_codes_are_bytes_and_their_making_counts(asked):
    shape = 2, 512, 4, 128
    elements = 2 * 512 * 4 * 128
    moved = {}
    for granularity, reads in (("block", 1), ("token", 1), ("head", 2)):
        recipe = Fp8Recipe(granularity)
        facts = bytes_facts.find(asked("A100", shape, precision="fp8", fp8=recipe))
        moved[granularity] = facts.ways["this call"].bytes.value
        least = facts.ways["least"].bytes.value
        assert least == (3 + 2) * elements + 2 * 512 * 4 * 4
        assert moved[granularity] >= least + 3 * elements * (2 * reads + 1)
    assert moved["head"] - moved["block"] == 3 * elements * 2


def test_tiles_are_counted(asked):
    found = asked("A100", (1, 256, 1, 64), causal=True, config="sm80-m64n64w4s1")
    ours = bytes_facts.find(found).ways["this call"]
    # 1 + 2 + 3 + 4 tiles of 64 x 64 scores.
    assert ours.flop.value == 10 * 64 * 64 * 4 * 64


def test_splits_store_parts(asked):
    whole = asked("A100", (1, 1, 8, 128), k=(1, 8192, 8, 128))
    facts, splits = bytes_facts.find(whole), whole.forward.config.num_splits
    assert splits > 1
    more = facts.ways["this call"].memory.value - facts.ways["least"].memory.value
    assert more >= splits * 8 * 129 * 4


def test_growth(asked):
    growth = bytes_facts.find(asked("H200", (1, 512, 4, 64))).growth
    assert [round(slope.value, 2) for slope in growth.slopes] == [1, 2]
    available = machines.find("H200").memory_bytes
    assert available == growth.available.value == 141 * 2**30
    n = growth.standard_fits.value
    sizes = [4 * (4 * m * 64 * 2) + 4 * m * 4 + 2 * 4 * m * m * 2 for m in (n, n + 1)]
    assert sizes[0] <= available < sizes[1]
    assert growth.ours_fits.value > 500 * n


def test_keys_alone_grow_with_slope_1(asked):
    growth = bytes_facts.find(asked("A100", (1, 1, 8, 128), k=(1, 4096, 8, 128))).growth
    assert growth.of == "keys"
    assert [round(slope.value, 2) for slope in growth.slopes] == [1, 1]


def test_a_gpu_whose_memory_nobody_said(asked, monkeypatch):
    found = asked("H200", (1, 512, 4, 64))
    object.__setattr__(found.machine, "memory_bytes", 0)
    try:
        growth = bytes_facts.find(found).growth
    finally:
        object.__setattr__(found.machine, "memory_bytes", 141 * 2**30)
    assert growth.available is growth.ours_fits is growth.standard_fits is None
    facts = bytes_facts.BytesFacts(bytes_facts.find(found).ways, growth, None)
    assert page_faults(document("bytes", arranged(section.figures(facts)))) == []


def test_the_backward(asked):
    found = asked("A100", (1, 512, 4, 64))
    backward = bytes_facts.find(found).backward
    assert [n.value for n in backward.products] == [7, 4]
    assert backward.kept.memory.value == 4 * 512 * 512 * 2
    assert backward.again.memory.value == 4 * 512 * (64 * 2 + 4)
    assert backward.kept.bytes.value > backward.again.bytes.value


def test_nothing_to_count(asked):
    with pytest.raises(NotShownError, match="no scores"):
        bytes_facts.find(asked("A100", (1, 0, 4, 64), k=(1, 8, 4, 64)))


def test_sizes_of_gpus_are_known():
    sizes = [machines.find(name).memory_bytes / 2**30 for name in machines.names()]
    assert np.all(np.array(sizes) >= 8) and max(sizes) < 300
