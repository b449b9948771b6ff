"""Functions of programs as machine code: float32 only, no subroutines, nothing in local memory."""

import re

import pytest

from numflash import masks
from numflash.functions.trace import trace
from numflash.machine_code import sass
from tests.support.compilations import kept
from tests.support.program_kernel import kernel_of, kernel_of_many
from tests.support.program_values import metadata
from tests.support.score_functions import SCORES


def text_of(name):
    function, aux = SCORES[name]
    return trace(function, masks.causal, tuple(map(metadata, aux))).program.text


def compiled(make, texts, arch, **options):
    name = repr((make.__name__, texts, options))
    cubin = kept(name, lambda: make(texts, **options), arch)
    opcodes = sass.opcodes(sass.disassemble(cubin.code))
    assert cubin.stack_bytes == cubin.spill_store_bytes == 0 and not cubin.warnings
    return opcodes


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_no_function_needs_float64_or_a_subroutine(arch):
    opcodes = compiled(kernel_of_many, list(map(text_of, SCORES)), arch)
    wide = [o for o in opcodes if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*F64", o)]
    assert not wide and not [o for o in opcodes if o.startswith("CALL")]


def test_a_derivative_of_tanh_is_made_of_tanh():
    """tanh is two instructions of the function unit, its derivative no more."""
    opcodes = compiled(kernel_of, text_of("softcap of a number"), "sm_80")
    assert sum(o == "MUFU.EX2" for o in opcodes) == sum(o == "MUFU.RCP" for o in opcodes) - 1


@pytest.mark.parametrize("name", ["T5", "bias"])
def test_partials_compile(name):
    function, aux = SCORES[name]
    text = trace(function, aux=tuple(map(metadata, aux))).program.text
    opcodes = compiled(kernel_of, text, "sm_80", with_partials=True)
    assert not [o for o in opcodes if "F64" in o or o.startswith("CALL")]
