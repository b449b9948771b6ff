"""Kernels on caches of e4m3 codes as machine code: no spills, and codes copied 16 at a time."""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import ARCHITECTURES, architecture
from numflash.selection.rules import choose
from tests.support.covering import some, thorough

# (traits, rows of a head): of prompts, and of decoding.
FORWARDS = [
    ("float16-d128-dv128-vec-ragged-paged-codes", 1024),
    ("float16-d128-dv128-vec-ragged-paged-codes", 8),
    ("float16-d256-dv256-vec-ragged-codes", 1024),
    ("float16-d64-dv64-ragged-paged-codes", 1024),
    ("bfloat16-d128-dv128-vec-ragged-codes", 1024),
]
PREPARES = [
    ("w8h4", "float16-d128-dv128-vec-codes"),
    ("w8h4-interleaved-narrow", "bfloat16-d128-dv64-vec-codes"),
    ("w8h4", "bfloat16-d96-dv96-codes"),
]
# A kernel for each GPU.
ONE_EACH = list(zip(ARCHITECTURES, itertools.cycle(FORWARDS), strict=False))


@thorough
@pytest.mark.parametrize(("arch", "asked"), ONE_EACH, ids=str)
def test_the_forward_stays_in_registers(arch, asked):
    (text, rows), limits = asked, architecture(arch)
    traits = Traits.parse(text.replace("bfloat16", "float16") if arch == "sm_75" else text)
    choice = choose("forward", traits, limits, rows)
    report = inspect_kernel(replace(choice.config, num_splits=2), choice.traits, limits)
    assert report.faults == ()


OF_PREPARES = list(zip(("sm_75", "sm_90a", "sm_120"), PREPARES, strict=True))


@thorough
@pytest.mark.parametrize(("arch", "kernel"), some(OF_PREPARES, OF_PREPARES[0]), ids=str)
def test_prepare_stays_in_registers(arch, kernel):
    config, traits = parse_config("prepare", kernel[0]), Traits.parse(kernel[1])
    report = inspect_kernel(config, traits, architecture(arch))
    assert report.faults == ()
    assert report.blocks_per_sm * report.threads >= 256


@thorough
def test_codes_are_copied_16_at_a_time_ahead_of_the_products():
    config, traits = parse_config("forward", "sm80-m64n64w4s1"), Traits.parse(FORWARDS[4][0])
    names = list(opcodes(disassemble(get_cubin(config, traits, architecture("sm_80")).code)))
    copies = [name for name in names if name.startswith("LDGSTS")]
    # Q once, K twice and V once: a thread has 8 chunks of Q, 4 of a tile of codes.
    assert len(copies) == 8 + 3 * 4 and all("128" in name for name in copies)
    assert not [name for name in names if name.startswith("LDG.") and "128" in name]
