"""Each instruction's template, executed, against its body; and that every template is known."""

import numpy as np
import pytest

import numflash
from numflash.executor.bodies import read_template
from numflash.executor.one_lane import is_one_lane
from numflash.executor.program import Program
from numflash.executor.text import parse
from numflash.ptx import INSTRUCTIONS, TensorMap
from numflash.ptx.operands import Global, Regs, Shared
from numflash.ptx.scalars import f32, i32, i64, u16, u32, u64
from numflash.ptx.warpgroups import make_setmaxnreg
from numflash.ptx.wgmma import make_wgmma, make_wgmma_wait_group
from tests.support.covering import whole

_REGISTERS = {f32: "f32", i32: "b32", u32: "b32", u16: "b16", i64: "b64", u64: "b64"}
# Kernels ask for these when they are made.
for _make in (
    lambda: make_wgmma(64, "float16", "shared"),
    lambda: make_wgmma(128, "bfloat16", "registers", "mn"),
    lambda: make_wgmma(32, "e4m3", "registers", accumulates=False),
    lambda: make_wgmma(64, "float16", "shared", "mn", a_major="mn"),
    lambda: make_wgmma_wait_group(1, 32),
    lambda: make_setmaxnreg("dec", 40),
):
    _make()


def _module(parameters: str, body: str, registers: str) -> str:
    return (
        ".version 8.6\n.target sm_90a\n.address_size 64\n"
        f".visible .entry kernel({parameters})\n{{\n{registers}\n{body}\nret;\n}}\n"
    )


def _with_registers(instruction) -> tuple[str, str, dict[str, list[str]]]:
    """(declarations, the template with registers in its placeholders, registers by name)."""
    declared, names = [], {}
    operands = dict(instruction.operands)
    if instruction.result is not None:
        operands["ret"] = instruction.result
    text = instruction.template.replace("<uid>", "1")
    for name, annotation in operands.items():
        if f"<{name}>" not in text:
            continue
        count = annotation.n if isinstance(annotation, Regs) else 1
        if isinstance(annotation, Regs):
            type_ = _REGISTERS[annotation.type]
        elif isinstance(annotation, Shared):
            type_ = "b32"
        elif isinstance(annotation, Global) or annotation is TensorMap:
            type_ = "b64"
        else:
            type_ = _REGISTERS[annotation]
        names[name] = [f"%{name}{i}" for i in range(count)]
        declared.append(f".reg .{type_} {', '.join(names[name])};")
        own = ", ".join(names[name])
        text = text.replace(f"<{name}>", f"{{{own}}}" if isinstance(annotation, Regs) else own)
    return "\n".join(declared), text, names


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_executor_knows_every_template(name):
    declared, text, _ = _with_registers(INSTRUCTIONS[name])
    program = Program(parse(_module("", text, declared)), 0)
    assert sum(len(piece) for piece in program.pieces) >= 2  # with ret


def _is_scalar(instruction) -> bool:
    """Whether an instruction only computes with registers of one lane."""
    template = read_template(instruction)
    if template is None or not is_one_lane(template.opcode) or "%" in instruction.template:
        return False
    return not any(isinstance(o, Regs | Shared | Global) for o in instruction.operands.values())


SCALAR = [name for name, instruction in INSTRUCTIONS.items() if _is_scalar(instruction)]
_SPECIAL = np.array(
    [
        *(0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000),
        *(0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
        *(0x3F801000, 0x3F803000, 0x477FF000, 0x33000000, 0x387FE000, 0x43E00000, 0x43F00000),
    ],
    np.uint32,
)


def _bits(n: int, seed: int) -> np.ndarray:
    """n words: half of them numbers of moderate size, a quarter special, a quarter random."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, n, np.uint32)
    words[: n // 2] = (
        (rng.standard_normal(n // 2) * 2.0 ** rng.integers(-20, 20, n // 2))
        .astype("f4")
        .view("u4")
    )
    words[n // 2 : n // 2 + n // 4] = rng.choice(_SPECIAL, n // 4)
    return rng.permutation(words)


def test_there_are_scalar_instructions():
    assert {"fma_rn_f32", "ex2_approx_ftz_f32", "prmt_b32", "cvt_rna_tf32_f32"} <= set(SCALAR)
    assert len(SCALAR) >= 19


@whole
@pytest.mark.parametrize("name", SCALAR)
def test_a_one_lane_instruction_computes_what_its_body_does(name):
    instruction = INSTRUCTIONS[name]
    declared, text, names = _with_registers(instruction)
    annotations = {**instruction.operands, "ret": instruction.result}
    size = {n: np.dtype(t).itemsize for n, t in annotations.items()}
    n = 4096
    inputs = {
        parameter: _bits(n, seed).view(np.uint16)[::2].copy()
        if size[parameter] == 2
        else _bits(n, seed)
        for seed, parameter in enumerate(instruction.operands)
    }
    if name == "fma_rn_f32":
        # Sums that float64 rounds, and such as lie halfway between two float32.
        inputs["a"][:512] = (1 + np.arange(512) * 2.0**-23).astype("f4").view("u4")
        inputs["b"][:512] = (1 + np.arange(512)[::-1] * 2.0**-12).astype("f4").view("u4")
        inputs["c"][:512] = (
            (2.0 ** np.arange(-60, -28)[np.arange(512) % 32]).astype("f4").view("u4")
        )
    output = np.zeros(n, f"u{size['ret']}")
    arrays = {**inputs, "ret": output}
    parameters = ", ".join(f".param .u64 p_{p}" for p in arrays)
    body = ["mov.u32 %i, %tid.x; mov.u32 %b, %ctaid.x; mad.lo.u32 %i, %b, 128, %i;"]
    for p in arrays:
        body.append(
            f"ld.param.u64 %at_{p}, [p_{p}]; mad.wide.u32 %at_{p}, %i, {size[p]}, %at_{p};"
        )
    body += [f"ld.global.b{8 * size[p]} {names[p][0]}, [%at_{p}];" for p in inputs]
    body += [text, f"st.global.b{8 * size['ret']} [%at_ret], {names['ret'][0]};"]
    registers = (
        declared + "\n.reg .b32 %i, %b; .reg .b64 " + ", ".join(f"%at_{p}" for p in arrays) + ";"
    )
    numflash.run_ptx(
        _module(parameters, "\n".join(body), registers), None, n // 128, 128, list(arrays.values())
    )
    with np.errstate(all="ignore"):
        typed = [inputs[p].view(np.dtype(t)) for p, t in instruction.operands.items()]
        expected = np.array(
            [instruction.body(*x) for x in zip(*typed, strict=True)], instruction.result
        )
    expected = expected.view(output.dtype)
    wrong = np.flatnonzero(expected != output)
    shown = [
        (hex(expected[i]), hex(output[i]), [hex(a[i]) for a in inputs.values()]) for i in wrong[:4]
    ]
    assert not wrong.size, shown
