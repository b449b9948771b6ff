"""Quantisation as machine code: all in registers, and the instructions that it is made of.

A sample of what `quantize_config` gives, over head dims, dtypes, variants and GPUs in turn.
"""

import re
from collections import Counter

import pytest

from numflash.configs import (
    AmaxConfig,
    DequantizeConfig,
    QuantizeConfig,
    Traits,
    parse_config,
    quantize_config,
)
from numflash.machine_code.compiler import compile_ptx, get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import architecture
from tests.support.covering import some, thorough

GENERATIONS = {"sm_75": "sm75", "sm_80": "sm80", "sm_89": "sm89", "sm_90a": "sm89"}


def quantize_case(arch, dtype, head_dim, vectorized=True, **options):
    config = quantize_config(GENERATIONS.get(arch, "sm89"), head_dim, **options)
    return config, Traits(dtype, head_dim, head_dim, vectorized=vectorized), arch


CASES = [
    quantize_case("sm_75", "float16", 128, block=128, hadamard=True, transposed=True),
    quantize_case("sm_80", "float32", 192, block=128, transposed=True),
    quantize_case("sm_89", "bfloat16", 256, scale="token", hadamard=True, statistics=True),
    quantize_case("sm_90a", "float16", 256, block=128, hadamard=True, statistics=True),
    quantize_case("sm_120", "float32", 192, False, scale="given", hadamard=True, format="e5m2"),
    quantize_case("sm_75", "float16", 64, False, transposed=True, codes=True),
    quantize_case("sm_120", "bfloat16", 256, hadamard=True, measure=True),
    (DequantizeConfig("sm80", hadamard=True), Traits("float32", 128, 128), "sm_80"),
    (DequantizeConfig("sm89", transposed=True), Traits("float16", 64, 64), "sm_120"),
    (AmaxConfig(8), Traits("float16", 64, 64), "sm_75"),
]
# Loads are 16 bytes where rows are aligned, and 8 or 16 bytes are stored.
ROWS = quantize_case("sm_90a", "bfloat16", 128, block=128, hadamard=True)
COLUMNS = quantize_case("sm_90a", "float16", 128, block=128, transposed=True)


@pytest.mark.parametrize(
    ("config", "traits", "arch"), some(CASES, CASES[6]), ids=lambda part: str(part)
)
def test_everything_stays_in_registers(config, traits, arch):
    report = inspect_kernel(config, traits, architecture(arch))
    assert report.faults == ()
    if isinstance(config, QuantizeConfig):
        # Two blocks at least hide each other's waits, or one of many warps.
        assert report.blocks_per_sm * report.threads >= 256


def counts(config: QuantizeConfig, traits: Traits, arch: str) -> tuple[Counter, int]:
    """The number of each instruction, and elements of a thread."""
    cubin = get_cubin(config, traits, architecture(arch))
    full = opcodes(disassemble(cubin.code))
    names = Counter(name.split(".")[0] for name in full)
    names.update(name for name in full if ".128" in name or ".64" in name)
    return names, config.elements_per_thread(traits)


def test_a_rotation_is_butterflies_in_registers_and_two_shuffles_an_element():
    names, elements = counts(*ROWS)
    # Five strides of seven are a thread's own, two go over lanes: a shuffle and an fma.
    assert 5 * elements <= names["FADD"] <= 5 * elements + 8
    # One more where an infinity is left out of the maximum, and two divisions.
    assert 3 * elements <= names["FFMA"] <= 3 * elements + 32
    assert 2 * elements <= names["SHFL"] <= 2 * elements + 8
    assert names["F2FP"] == elements // 2
    assert sum(names[n] for n in ("LDG", "STG")) == 2 * elements // 8 + 1


@thorough
def test_transposed_codes_leave_in_16_bytes():
    names, elements = counts(*COLUMNS)
    assert names["LDG"] == elements // 8
    assert names["STS"] == elements // 4 + 1
    assert names["STG"] == elements // 16 + 1
    assert names["LDS"] <= elements // 16 + 2  # and the maxima of eight warps


WITH_SCALES = [
    ("quantize", "sm80-t32w1-hadamard"),
    ("quantize", "sm89-t32w2-token"),
    ("amax", "w1"),
]


@thorough
@pytest.mark.parametrize(("family", "text"), some(WITH_SCALES, WITH_SCALES[1]))
def test_scales_are_divided_as_ieee_says(family, text):
    ptx = compile_ptx(
        parse_config(family, text), Traits("float16", 64, 64), architecture("sm_90a")
    )
    divisions = set(re.findall(r"(?:div|rcp)[\w.]*\.f32", ptx))
    assert divisions == {"div.rn.f32"}
    assert not re.search(r"\.ftz|\.approx", ptx)


@thorough
def test_the_way_back_rounds_products_before_it_adds_them():
    config = DequantizeConfig("sm89", hadamard=True)
    traits = Traits("float32", 64, 64)
    names = Counter(opcodes(disassemble(get_cubin(config, traits, architecture("sm_90a")).code)))
    # 16 elements a thread: four strides of its own of six; two over lanes, which are exact.
    assert names["FADD"] == 4 * 16
    assert names["FFMA"] == 2 * 16
