"""Kernels for gradients of arrays that scores read stay in registers, on each generation."""

import pytest

from numflash.configs import Traits, parse_config
from numflash.functions.arrays import Array
from numflash.functions.nodes import LEAF, apply, const, load
from numflash.functions.program import Program
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import choose
from tests.support.covering import some, thorough

S, B, H, I, J = (LEAF[name] for name in "sbhij")
BIAS = Program((Array("float16", 4, True),), apply("add", S, load(0, "f", [B, H, I, J]))).text
GATED = Program(
    (Array("float32", 2, True),),
    apply("mul", apply("tanh", S), load(0, "f", [const(0), J])),
).text
TABLE = Program(
    (Array("float32", 2, True),), apply("add", S, load(0, "f", [H, apply("sub", J, I)]))
).text
FAMILIES = {
    "backward-rows": TABLE,
    "backward-tiles": BIAS,
    "backward-columns": GATED,
    "backward-scatter": TABLE,
}
# The GPU, and what its kernels compute on.
WHERE = {
    "sm75": ("sm_75", "float16", 64),
    "sm80": ("sm_80", "bfloat16", 128),
    "large tiles": ("sm_80", "float16", 64),
    "blackwell": ("sm_120", "float16", 64),
    "portable": ("sm_86", "float32", 64),
}


@thorough
@pytest.mark.parametrize("where", some(WHERE, "sm80"))
@pytest.mark.parametrize("family", some(FAMILIES, "backward-scatter"))
def test_nothing_spills(family, where):
    arch, dtype, head_dim = WHERE[where]
    # Of rows the bound of what scatter adds up.
    more = {"program": FAMILIES[family], "read": "0", "absolute": family == "backward-rows"}
    traits = Traits(dtype, head_dim, head_dim, **more)
    choice = choose(family, traits, ARCHITECTURES[arch])
    report = inspect_kernel(choice.config, choice.traits, ARCHITECTURES[arch])
    assert not report.faults, f"{choice.config}: {report.faults}"
    # A sum in memory by one instruction, not by a loop that tries.
    text = disassemble(get_cubin(choice.config, choice.traits, ARCHITECTURES[arch]).code)
    atomics = {opcode.split(".")[0] for opcode in opcodes(text) if opcode[:3] in ("RED", "ATO")}
    assert atomics <= {"RED", "REDG"}
    assert bool(atomics) == (family == "backward-scatter")


@pytest.mark.parametrize(
    "text", some(["array-sums w8", "clear-sums w8", "round-sums w8"], "array-sums w8")
)
def test_sums_take_few_registers(text):
    family, config = text.split()
    limits = ARCHITECTURES["sm_80"]
    report = inspect_kernel(parse_config(family, config), Traits("bfloat16", 32, 32), limits)
    assert not report.faults and report.registers <= 40
