"""Lists of tiles and appending to caches as machine code: all in registers, 16 bytes at once."""

import itertools

import pytest

from bench.machine_code.kernels import kernels
from numflash.configs import PrepareConfig, Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import ARCHITECTURES, architecture
from tests.support.covering import some, thorough

VARIANTS = [
    ("w8h4", "float16-d128-dv128-vec"),
    ("w8h4-interleaved-narrow", "bfloat16-d128-dv64-vec"),
    ("w8h4-interleaved", "float32-d256-dv256-vec"),
    ("w8h4-narrow", "bfloat16-d96-dv96"),
]
CASES = list(zip(ARCHITECTURES, itertools.cycle(VARIANTS), strict=False))


@pytest.mark.parametrize(("arch", "variant"), some(CASES, every=12), ids=lambda part: str(part))
def test_everything_stays_in_registers(arch, variant):
    config, traits = parse_config("prepare", variant[0]), Traits.parse(variant[1])
    report = inspect_kernel(config, traits, architecture(arch))
    assert report.faults == ()
    assert report.blocks_per_sm * report.threads >= 256


@thorough
def test_a_thread_loads_all_of_its_heads_before_it_stores_one():
    """Two chunks of each head, and four loads of cosines and sines."""
    config = PrepareConfig()
    code = get_cubin(config, Traits("float16", 128, 128), architecture("sm_90a")).code
    memory = [name for name in opcodes(disassemble(code)) if name.startswith(("LDG", "STG"))]
    runs = itertools.groupby(memory, lambda name: name.startswith("LDG"))
    wide = [sum("128" in name for name in run) for is_load, run in runs if is_load]
    assert max(wide) >= 2 * config.num_heads + 4


def test_the_net_has_it():
    assert {k.arch for k in kernels(["prepare"])} >= {"sm_75", "sm_80", "sm_90a", "sm_120"}
