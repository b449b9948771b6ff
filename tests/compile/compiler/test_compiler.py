"""From config to cubin: what the compiler makes, its log, and what it does about spills."""

import logging
import re
from dataclasses import replace
from functools import partial
from importlib import metadata

import pytest

from numflash.configs import Traits, parse_config
from numflash.kernels.kernel import Kernel
from numflash.machine_code import compiler, linker
from numflash.machine_code.compiler import compile_kernel, get_cubin
from numflash.machine_code.sass import disassemble
from numflash.ptx import INSTRUCTIONS, cuda, f32, fma_rn_f32, i32, instruction
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.views import Pointer
from tests.support.compilations import CONFIG, ELF, LIMITS, TRAITS, finish, forget, start
from tests.support.covering import some, thorough


def test_a_cubin(good):
    assert good.code.startswith(ELF)
    assert good.entry.encode() in good.code
    assert good.num_threads == 256
    assert good.smem_bytes == 0
    assert 0 < good.registers < 64
    assert good.spill_store_bytes == good.spill_load_bytes == good.stack_bytes == 0
    assert good.warnings == ()
    pointers = [name for name, letter in good.parameters if letter == "P"]
    named = "out.data", "do.data", "lse", "delta", "lse_log2"
    of_features = (f"features.{name}" for name in ("alibi.slopes", "sinks.data", "dropout.seed"))
    assert pointers == [*named, *of_features, "row_gradients"]
    assert good.parameters[1:4] == (("out.batch", "q"), ("out.row", "q"), ("out.head", "q"))
    assert {letter for _, letter in good.parameters} <= set("Pqif")


def test_only_what_says_fma_is_fused():
    """Not in machine code and not in PTX: what the simulator rounds twice, a GPU rounds twice."""

    def make(fused):
        def multiply_and_add(x: Pointer(f32), y: Pointer(f32), scale: f32):
            i = cuda.threadIdx.x
            if fused:
                y[i] = fma_rn_f32(x[i], scale, -y[i])
            else:
                y[i] = x[i] * scale - y[i]

        return Kernel("multiply-and-add", multiply_and_add, 32, 0)

    limits = ARCHITECTURES["sm_90a"]
    apart, fused = (
        disassemble(compile_kernel(partial(make, fused), limits).code) for fused in (False, True)
    )
    assert "FMUL" in apart and "FADD" in apart and "FFMA" not in apart
    assert "FFMA" in fused and "FADD" not in fused
    apart, fused = (
        compiler._front_end(partial(make, fused), limits, "ptx")[1] for fused in (False, True)
    )
    assert "fma.rn.f32" not in apart and "fma.rn.f32" in fused


def test_the_log(cache_directory, caplog):
    with caplog.at_level(logging.INFO, logger="numflash"):
        get_cubin(CONFIG, TRAITS, LIMITS)
        forget()
        get_cubin(CONFIG, TRAITS, LIMITS)
    what = "delta w8 float16-d64-dv64-vec for sm_80"
    begun, ended = [record.getMessage() for record in caplog.records]
    assert begun == f"compiling {what} ..."
    assert ended.startswith(f"compiled {what} in ")
    assert ended.endswith(" s")


@thorough
def test_a_kernel_compiles_quickly():
    # About 3 s on a quiet machine, once Numba is imported; the bound is for a busy one.
    program = (
        "import json\n"
        "from numba import cuda\n"
        "from numflash.machine_code.compiler import compile_cubin\n"
        "from numflash.configs import ForwardConfig, Traits\n"
        "from numflash.runtime.devices import ARCHITECTURES\n"
        "config = ForwardConfig.parse('m64n64w4')\n"
        "cubin = compile_cubin(config, Traits('float16', 64, 64), ARCHITECTURES['sm_80'])\n"
        "print(json.dumps(cubin.compile_ms))"
    )
    assert finish(start(program, "unused")) < 20_000


@pytest.mark.parametrize(
    ("spills", "calls", "kept"), [((0, 0), 1, 0), ((8, 0), 2, 1), ((8, 8), 2, 0), ((8, 12), 2, 0)]
)
def test_a_kernel_that_spills_gets_more_registers(spills, calls, kept, good, monkeypatch):
    made = []

    def compile_once(make, limits, min_blocks=None):
        assert min_blocks == (1 if made else None)
        cubin = replace(good, spill_load_bytes=spills[len(made)], code=bytes([len(made)]))
        made.append(cubin)
        return cubin

    monkeypatch.setattr(compiler, "_compile", compile_once)
    # Which numbers of blocks are promised is test_promised_blocks.py's matter.
    monkeypatch.setattr(compiler, "_numbers_of_blocks", lambda cubin, limits: [1])
    assert compiler.compile_cubin(CONFIG, TRAITS, LIMITS).code == bytes([kept])
    assert len(made) == calls


def test_min_blocks_reaches_the_assembler():
    def directives(min_blocks):
        make = partial(compiler._make, CONFIG, TRAITS)
        _, ptx = compiler._front_end(make, LIMITS, "ptx", min_blocks)
        return set(re.findall(r"\.(?:maxntid|minnctapersm) \d+", ptx))

    assert directives(None) == {".maxntid 256"}
    assert directives(1) == {".maxntid 256", ".minnctapersm 1"}


PROMISES = (0, 0, None), (0, 8, 1), (1, 0, 1), (2, 8, 2)


@thorough
@pytest.mark.parametrize(("min_blocks", "spills", "directive"), some(PROMISES, PROMISES[1]))
def test_the_ptx_is_that_of_the_cubin(min_blocks, spills, directive, cache_directory, monkeypatch):
    """The config's promise to the assembler, or the one that was made because of spills."""
    link = linker.link

    def link_and_spill(ltoir, arch):
        code, log = link(ltoir, arch)
        roomy = len(linked) == 1
        linked.append(code)
        return code, log if roomy else re.sub(r"\d+ (bytes spill)", rf"{spills} \1", log)

    linked = []
    monkeypatch.setattr(linker, "link", link_and_spill)
    monkeypatch.setattr(compiler, "_numbers_of_blocks", lambda cubin, limits: [1])
    config = replace(parse_config("forward", "sm80-m16n16w1s1"), min_blocks=min_blocks)
    traits = Traits("float16", 32, 32)  # a small kernel: each is compiled twice
    assert get_cubin(config, traits, LIMITS).min_blocks == directive
    forget()  # as inspecting in another process: from the cubin on disk
    ptx = compiler.compile_ptx(config, traits, LIMITS)
    assert re.findall(r"\.minnctapersm (\d+)", ptx) == ([str(directive)] if directive else [])


def test_the_assemblers_complaint_is_quoted():
    @instruction("ex2.approx.nonsense.f32 <ret>, <x>;", sm=75)
    def nonsense(x: f32) -> f32:
        """No such instruction."""

    INSTRUCTIONS.pop("nonsense")

    def kernel(x: Pointer(f32)):
        x[0] = nonsense(x[0])

    with pytest.raises(RuntimeError, match=r"for sm_80: .*\.nonsense"):
        compile_kernel(lambda: Kernel("nonsense", kernel, 32, 0), LIMITS)


def test_local_memory_is_reported():
    def kernel(x: Pointer(f32), n: i32):
        array = cuda.local.array(64, f32)
        for i in range(n):
            array[i * i % 64] += x[i]
        x[0] = array[n]

    cubin = compile_kernel(lambda: Kernel("local", kernel, 32, 0), LIMITS)
    assert cubin.stack_bytes >= 256
    assert cubin.parameters == (("x", "P"), ("n", "i"))


def test_versions():
    versions = compiler.versions()
    assert versions["numba-cuda"] == metadata.version("numba-cuda")
    assert None not in versions.values()
