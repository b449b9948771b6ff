"""Rotary embeddings as machine code: all in registers, 16 bytes at once, loads before stores."""

import itertools

import pytest

from bench.machine_code.kernels import kernels
from numflash.configs import RotaryConfig, Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import ARCHITECTURES, architecture
from numflash.runtime.errors import UnsupportedError
from numflash.selection.rules import force
from tests.support.covering import some

VARIANTS = [
    ("w4h4", "float16-d128-dv128-vec"),
    ("w4h4-interleaved-narrow", "bfloat16-d128-dv128-vec"),
    ("w4h4-interleaved", "float32-d256-dv256-vec"),
    ("w4h4-interleaved", "float16-d64-dv64-vec"),
    ("w4h4-narrow", "bfloat16-d96-dv96"),
    ("w4h4", "float32-d32-dv32"),
]
# Every GPU, every variant, and some of both twice.
CASES = list(zip(ARCHITECTURES, itertools.cycle(VARIANTS), strict=False))


@pytest.mark.parametrize(("arch", "variant"), some(CASES, every=12), ids=lambda part: str(part))
def test_everything_stays_in_registers(arch, variant):
    config, traits = parse_config("rotary", variant[0]), Traits.parse(variant[1])
    report = inspect_kernel(config, traits, architecture(arch))
    assert report.faults == ()
    # Many warps hide each other's waits for memory.
    assert report.blocks_per_sm * report.threads >= 512


TABLES = ("float16", 4), ("bfloat16", 4), ("float32", 2)


@pytest.mark.parametrize(("dtype", "tables"), some(TABLES, TABLES[0]), ids=str)
def test_a_thread_loads_all_of_its_heads_before_it_stores_one(dtype, tables):
    """`tables` are 16-byte loads of cosines and sines; each head takes two."""
    config, traits = RotaryConfig(interleaved=dtype == "float32"), Traits(dtype, 128, 128)
    code = get_cubin(config, traits, architecture("sm_90a")).code
    memory = [name for name in opcodes(disassemble(code)) if name.startswith(("LDG", "STG"))]
    before = memory[: next(i for i, name in enumerate(memory) if name.startswith("STG"))]
    assert sum("128" in name for name in before) == 2 * config.num_heads + tables
    assert all("128" in name for name in memory if name.startswith("STG"))


def test_the_net_and_the_rules_have_it():
    assert {k.arch for k in kernels(["rotary"])} >= {"sm_75", "sm_80", "sm_90a", "sm_120"}
    limits, traits = architecture("sm_80"), Traits("float32", 64, 64, tf32=True)
    choice = force("rotary", "w8h2", traits, limits)
    assert (choice.config, choice.traits.tf32) == (RotaryConfig(8, 2), False)
    with pytest.raises(UnsupportedError, match="are the dtype of rows of float32 anyhow"):
        force("rotary", "w4h4-narrow", Traits("float32", 64, 64), limits)
