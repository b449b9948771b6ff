"""The merge in place as machine code: all in registers, 16 bytes at once, loads before stores."""

import itertools

import pytest

from bench.machine_code.kernels import kernels
from numflash.configs import MergeOntoConfig, Traits
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import ARCHITECTURES, architecture
from tests.support.covering import some

VARIANTS = [
    "float32-d128-dv128-vec",
    "float16-d128-dv128-vec",
    "bfloat16-d256-dv256-vec",
    "float16-d96-dv96",
]
# Every GPU, every variant, and some of both twice.
CASES = list(zip(ARCHITECTURES, itertools.cycle(VARIANTS), strict=False))


@pytest.mark.parametrize(("arch", "traits"), some(CASES, every=12), ids=str)
def test_everything_stays_in_registers(arch, traits):
    report = inspect_kernel(MergeOntoConfig(), Traits.parse(traits), architecture(arch))
    assert report.faults == ()
    # Many warps hide each other's waits for memory.
    assert report.blocks_per_sm * report.threads >= 1024


@pytest.mark.parametrize(
    ("dtype", "loads"), some([("float16", 3), ("float32", 2)], ("float16", 3))
)
def test_a_thread_loads_both_sides_before_it_stores(dtype, loads):
    code = get_cubin(MergeOntoConfig(), Traits(dtype, 128, 128), architecture("sm_90a")).code
    memory = [name for name in opcodes(disassemble(code)) if name.startswith(("LDG", "STG"))]
    before = memory[: next(i for i, name in enumerate(memory) if name.startswith("STG"))]
    assert sum("128" in name for name in before) == loads
    # The lse of a row is one number.
    assert sum("128" not in name for name in memory if name.startswith("STG")) == 1


def test_the_net_has_it():
    assert {k.arch for k in kernels(["merge-onto"])} >= {"sm_75", "sm_80", "sm_90a", "sm_120"}
