"""Every instruction's PTX passes the assembler: NVVM does not look inside inline assembly."""

import re

import pytest

from numflash.kernels.kernel import Kernel
from numflash.machine_code import sass
from numflash.machine_code.compiler import compile_kernel
from numflash.ptx import INSTRUCTIONS, cuda, device_function, f32, instruction, u32
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.views import Pointer
from numflash.tiles.quantize.conversions import make_encode
from tests.support.compilations import kept
from tests.support.covering import FULL, thorough
from tests.support.instruction_cases import CASES

_CASES = [case for cases in CASES.values() for case in cases]


def _compile(case, arch):
    kernel = Kernel(case.instruction, case.kernel, case.block, case.smem_bytes)
    return kept(str(case), lambda: kernel, arch, case.min_blocks)


def _compile_together(cases, arch):
    name = " ".join(map(str, cases))
    return kept(name, lambda: _one_kernel_of(cases), arch)


def _oldest(case) -> str:
    return f"sm_{INSTRUCTIONS[case.instruction].sm}".replace("sm_90", "sm_90a")


def _variants(cases) -> list:
    """Of what needs a kernel of its own one case for each instruction: others differ in data."""
    seen, found = set(), []
    for case in cases:
        if FULL or not _is_alone(case) or case.instruction not in seen:
            found.append(case)
            seen.add(case.instruction)
    return found


def _is_alone(case) -> bool:
    """Whether a case needs a kernel of its own: for its launch bounds, or its parameters.

    Tensor maps are parameters by value, which `grid_constants` writes as NVVM for Hopper reads
    them.
    """
    return case.min_blocks is not None or bool(case.tensor_maps)


def _alike(cases) -> list[list]:
    """The cases that one kernel can hold, in lists: a front end for each takes the most time."""
    found = {}
    for number, case in enumerate(cases):
        own = number if _is_alone(case) else None
        found.setdefault((case.block, case.smem_bytes, own), []).append(case)
    return list(found.values())


_ON_OLDEST = [
    (arch, together)
    for arch in sorted(set(map(_oldest, _CASES)))
    for together in _alike(_variants(case for case in _CASES if _oldest(case) == arch))
]


@pytest.mark.parametrize(
    ("arch", "together"),
    _ON_OLDEST,
    ids=[f"{arch}-{together[0]}-{len(together)}" for arch, together in _ON_OLDEST],
)
def test_they_assemble_for_the_oldest_gpu_that_has_them(arch, together):
    if len(together) == 1:
        cubin = _compile(together[0], arch)
    else:
        cubin = _compile_together(together, arch)
    assert cubin.warnings == (), [str(case) for case in together]
    assert cubin.stack_bytes == cubin.spill_store_bytes == 0


def _one_kernel_of(cases) -> Kernel:
    """A kernel that does what those of several cases do, one after the other."""
    parameters, calls, scope = {}, [], {}
    for number, case in enumerate(cases):
        own = {f"{name}_{number}": t for name, t in case.kernel.__annotations__.items()}
        scope[f"case_{number}"] = device_function(case.kernel)
        calls.append(f"    case_{number}({', '.join(own)})")
        parameters |= own
    exec("\n".join([f"def kernel({', '.join(parameters)}):", *calls]), scope)
    scope["kernel"].__annotations__ = parameters
    return Kernel("instructions", scope["kernel"], cases[0].block, cases[0].smem_bytes)


@thorough
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
def test_it_assembles_for_newer_gpus(arch):
    """Nearly all instructions in a few kernels."""
    major, minor = ARCHITECTURES[arch].compute_capability
    sm = 10 * major + minor
    # Variants differ in their data and the types around the instruction: one is enough. What this
    # is the oldest GPU of has been assembled above.
    cases = [
        found[0]
        for found in CASES.values()
        if INSTRUCTIONS[found[0].instruction].runs_on(sm)
        and INSTRUCTIONS[found[0].instruction].sm < sm
        and not found[0].tensor_maps
    ]
    for together in _alike(cases):
        if _is_alone(together[0]):
            cubin = _compile(together[0], arch)
        else:
            cubin = _compile_together(together, arch)
        assert cubin.warnings == (), [str(case) for case in together]


def _opcodes(kernel, arch):
    cubin = kept(f"opcodes of {kernel.family}", lambda: kernel, arch)
    return [opcode.split(".")[0] for opcode in sass.opcodes(sass.disassemble(cubin.code))]


@pytest.mark.parametrize("arch", ["sm_89", "sm_120"])
def test_a_product_of_e4m3_is_one_instruction(arch):
    case = CASES["mma_m16n8k32_e4m3"][0]
    opcodes = _opcodes(Kernel(case.instruction, case.kernel, case.block, 0), arch)
    assert opcodes.count("QMMA") == 1 and not {"HMMA", "F2FP"} & set(opcodes)


def test_on_hopper_a_product_of_e4m3_is_two_of_float16_and_an_addition():
    """As `numflash.runtime.sums` says: even pairs of k from zero, then odd ones, then d."""
    case = CASES["mma_m16n8k32_e4m3"][0]
    cubin = _compile(case, "sm_90a")
    lines = sass.disassemble(cubin.code).splitlines()
    products = [line.split("HMMA.16816.F32 ")[1] for line in lines if "HMMA" in line]
    operands = [re.findall(r"R\w+", product) for product in products]
    (first, a_even, b_even, zero), (_, a_odd, b_odd, c) = operands
    assert (zero, c) == ("RZ", first)
    halves = {}
    for line in lines:
        if match := re.search(r"UNPACK_B (R\d+), R\d+(?:\.reuse)?(\.H1)?", line):
            halves[match[1]] = match[2]
    assert [halves[x] for x in (a_even, b_even, a_odd, b_odd)] == [None, None, ".H1", ".H1"]
    opcodes = [opcode.split(".")[0] for opcode in sass.opcodes("\n".join(lines))]
    assert opcodes.count("FADD") == 4


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120"])
def test_four_codes_are_two_instructions(arch):
    encode = make_encode("e4m3", "sm89")

    def kernel(x: Pointer(f32), y: Pointer(u32)):
        t = cuda.threadIdx.x
        y[t] = encode(x[4 * t], x[4 * t + 1], x[4 * t + 2], x[4 * t + 3])

    opcodes = _opcodes(Kernel("encode", kernel, 32, 0), arch)
    assert opcodes.count("F2FP") == 2 and "PRMT" not in opcodes


def test_a_wrong_template_is_refused_by_the_assembler():
    @instruction("ex2.approx.nonsense.f32 <ret>, <x>;", sm=75)
    def nonsense(x: f32) -> f32:
        """No such instruction."""

    INSTRUCTIONS.pop("nonsense")

    def kernel(x: Pointer(f32)):
        x[0] = nonsense(x[0])

    with pytest.raises(Exception, match=r"(?i)nvjitlink|ptx"):
        compile_kernel(lambda: Kernel("nonsense", kernel, 32, 0), ARCHITECTURES["sm_80"])
