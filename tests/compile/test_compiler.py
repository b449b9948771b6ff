"""From config to cubin: the caches, what decides their key, the log, and what may be missing."""

import gc
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from numflash.configs import DeltaConfig, Traits, parse_config
from numflash.kernels.kernel import Kernel
from numflash.machine_code import compiler, cubins, repeated_work
from numflash.machine_code.compiler import compile_kernel, get_cubin
from numflash.machine_code.sass import disassemble
from numflash.ptx import (
    INSTRUCTIONS,
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    i32,
    instruction,
)
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import Pointer

CONFIG, TRAITS, LIMITS = DeltaConfig(8), Traits("float16", 64, 64), ARCHITECTURES["sm_80"]
ELF = b"\x7fELF"
# The numbers in a cubin's header.
NUMBERS = (
    *("num_threads", "smem_bytes", "registers", "min_blocks"),
    *("spill_store_bytes", "spill_load_bytes", "stack_bytes"),
)

# Loads or compiles the kernel of this file in a process of its own, and says how that went.
CHILD = """
import json, sys, time
from numflash.machine_code.compiler import get_cubin
from numflash.configs import DeltaConfig, Traits
from numflash.runtime.devices import ARCHITECTURES
arguments = DeltaConfig(8), Traits("float16", 64, 64), ARCHITECTURES["sm_80"]
start = time.perf_counter()
cubin = get_cubin(*arguments)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "numba": "numba" in sys.modules,
    "code": cubin.code.hex(),
    "registers": cubin.registers,
}))
"""


@pytest.fixture
def cache_directory(tmp_path, monkeypatch):
    """An empty disk cache, and an empty one in memory."""
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    return tmp_path / "cubins"


@pytest.fixture(scope="module")
def good():
    """The cubin that this file compiles, and recompiles, all the time."""
    return compiler.compile_cubin(CONFIG, TRAITS, LIMITS)


@pytest.fixture
def compilations(monkeypatch, good):
    """Instead of compiling, note what would be compiled."""
    compiled = []

    def compile_cubin(config, traits, limits):
        compiled.append((config, traits, limits))
        return good

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    return compiled


def start(program, directory, **variables):
    environment = {**os.environ, "NUMFLASH_CACHE_DIR": str(directory), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])  # Numba may have printed before


def forget():
    """As a new process would: nothing in memory."""
    compiler._cubins.clear()


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
    assert pointers == [*named, "features.alibi.slopes", "features.sinks.data", "row_gradients"]
    assert good.parameters[1:4] == (("out.batch", "q"), ("out.row", "q"), ("out.head", "q"))
    assert {letter for _, letter in good.parameters} <= set("Pqif")


def test_it_is_compiled_once(cache_directory, compilations):
    first = get_cubin(CONFIG, TRAITS, LIMITS)
    assert get_cubin(CONFIG, TRAITS, LIMITS) is first
    forget()
    assert get_cubin(CONFIG, TRAITS, LIMITS) == first
    assert len(compilations) == 1
    assert len(list(cache_directory.iterdir())) == 1


def test_how_many_splits_is_no_matter_of_machine_code(cache_directory, compilations):
    for text in ("sm80-m16n16w1s1x2", "sm80-m16n16w1s1x7", "sm80-m16n16w1s1x64"):
        get_cubin(parse_config("forward", text), TRAITS, LIMITS)
    assert len(compilations) == 1
    # But parts are float32, whatever the result is.
    get_cubin(parse_config("forward", "sm80-m16n16w1s1"), TRAITS, LIMITS)
    assert len(compilations) == len(list(cache_directory.iterdir())) == 2


def test_a_warm_cache_needs_no_numba(cache_directory, good, compilations):
    get_cubin(CONFIG, TRAITS, LIMITS)
    loaded = finish(start(CHILD, cache_directory.parent))
    assert not loaded["numba"]
    assert loaded["seconds"] < 0.3
    assert bytes.fromhex(loaded["code"]) == good.code
    assert loaded["registers"] == good.registers


def test_two_processes_compile_at_once(cache_directory, good):
    children = [start(CHILD, cache_directory.parent) for _ in range(2)]
    for child in [finish(child) for child in children]:
        assert bytes.fromhex(child["code"]).startswith(ELF)
        assert child["registers"] == good.registers
    (file,) = cache_directory.iterdir()
    assert file.suffix == ".cubin"
    assert compiler._from_disk(key_of(CONFIG, TRAITS, LIMITS), LIMITS).registers == good.registers


def key_of(*arguments):
    """The key under which `get_cubin` looks for a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        keys = []
        patch.setattr(compiler, "_cubins", {})
        patch.setattr(compiler.cubins, "read", lambda key: keys.append(key))
        patch.setattr(compiler, "_compile_logged", lambda *_: None)
        get_cubin(*arguments)
    return keys[0]


def cut_short(data):
    return data[: len(data) // 2]


def one_bit_flipped(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def one_bit_of_the_header_flipped(data):
    at = data.index(b'"registers"') + 14
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def empty(data):
    return b""


def magic_only(data):
    return data[: data.index(b"\n") + 1]


def foreign(data):
    return b"PK\x03\x04 not a cubin"


@pytest.mark.parametrize(
    "damage",
    [cut_short, one_bit_flipped, one_bit_of_the_header_flipped, empty, magic_only, foreign],
)
def test_a_damaged_file_is_compiled_again(damage, cache_directory, compilations, good):
    get_cubin(CONFIG, TRAITS, LIMITS)
    (file,) = cache_directory.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    forget()
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert len(compilations) == 2
    assert file.read_bytes() == intact


@pytest.mark.parametrize(
    "header",
    [{}, {"registers": 1}, {"surprise": 1, "parameters": [], "warnings": []}, {"parameters": 3}],
)
def test_a_header_of_another_version_is_compiled_again(
    header, cache_directory, compilations, good
):
    cubins.write(key_of(CONFIG, TRAITS, LIMITS), header, good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NUMBERS for value in (-1, 10**9, 10**400, 1.5, True, "1", [])),
        ("num_threads", 0),
        ("num_threads", 1025),
        ("smem_bytes", LIMITS.max_smem_per_block + 1),
        ("registers", 256),
        ("min_blocks", 0),
        ("min_blocks", 33),
        ("entry", ""),
        ("entry", "no such symbol"),
        ("entry", "\ud800"),
        ("entry", None),
        ("parameters", [["x", "Z"]]),
        ("parameters", [["x", "PP"]]),
        ("parameters", [[1, "P"]]),
        ("parameters", [["x", {}]]),
        ("parameters", ["P"]),
        ("warnings", [3]),
        ("warnings", None),
        ("compile_ms", math.nan),
        ("compile_ms", "1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_header_that_no_kernel_has_is_compiled_again(
    name, value, cache_directory, compilations, good
):
    key = key_of(CONFIG, TRAITS, LIMITS)
    header = {field: text for field, text in asdict(good).items() if field != "code"}
    cubins.write(key, {**header, name: value}, good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good and len(compilations) == 1


def test_what_is_no_machine_code_is_compiled_again(cache_directory, compilations, good):
    key = key_of(CONFIG, TRAITS, LIMITS)
    header = {field: text for field, text in asdict(good).items() if field != "code"}
    cubins.write(key, header, b"#!/bin/sh " + good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good and len(compilations) == 1


def test_a_file_under_another_kernels_name_is_not_taken(cache_directory, compilations):
    get_cubin(CONFIG, TRAITS, LIMITS)
    (file,) = cache_directory.iterdir()
    other = DeltaConfig(4)
    shutil.copy(file, cubins._path(key_of(other, TRAITS, LIMITS)))
    get_cubin(other, TRAITS, LIMITS)
    assert compilations[-1][0] == other


def test_a_cache_that_is_a_file(tmp_path, monkeypatch, compilations, good, caplog):
    occupied = tmp_path / "occupied"
    occupied.write_text("not a folder")
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(occupied))
    monkeypatch.setattr(compiler, "_cubins", {})
    with caplog.at_level(logging.INFO, logger="numflash"):
        assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert "cannot write" in caplog.text
    assert occupied.read_text() == "not a folder"
    assert cubins.contents() == (0, 0)


@pytest.mark.parametrize("call", ["os.replace", "tempfile.mkstemp", "os.fdopen"])
def test_a_cache_that_cannot_be_written(call, cache_directory, compilations, good, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    module, _, function = call.partition(".")
    monkeypatch.setattr(getattr(cubins, module), function, refuse)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert list(cache_directory.iterdir()) == []


def test_a_cache_that_cannot_be_read(cache_directory, compilations, good):
    # A folder in the file's place: neither read nor replaced.
    cubins._path(key_of(CONFIG, TRAITS, LIMITS)).mkdir(parents=True)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good


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


def test_what_the_key_depends_on():
    keys = [
        key_of(CONFIG, TRAITS, LIMITS),
        key_of(DeltaConfig(4), TRAITS, LIMITS),
        key_of(CONFIG, replace(TRAITS, dtype="bfloat16"), LIMITS),
        key_of(CONFIG, replace(TRAITS, head_dim=96), LIMITS),
        key_of(CONFIG, replace(TRAITS, head_dim_v=96), LIMITS),
        key_of(CONFIG, replace(TRAITS, features=("softcap",)), LIMITS),
        key_of(CONFIG, replace(TRAITS, features=("alibi",)), LIMITS),
        key_of(CONFIG, replace(TRAITS, vectorized=False), LIMITS),
        key_of(CONFIG, TRAITS, ARCHITECTURES["sm_86"]),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(CONFIG, TRAITS, LIMITS) == keys[0]


def test_the_key_depends_on_the_compilers(monkeypatch):
    before = key_of(CONFIG, TRAITS, LIMITS)
    real = compiler._version
    monkeypatch.setattr(compiler, "_version", lambda n: "99" if n == "numba-cuda" else real(n))
    compiler._toolchain.cache_clear()
    assert key_of(CONFIG, TRAITS, LIMITS) != before
    compiler._toolchain.cache_clear()


def test_the_key_depends_on_what_no_argument_decides(monkeypatch):
    def key():
        compiler._toolchain.cache_clear()
        return key_of(CONFIG, TRAITS, LIMITS)

    real, before = compiler._version, key()
    # Numba compiles bytecode, and cuda-bindings choose between linkers that are both installed.
    monkeypatch.setattr(sys, "version_info", (4, 0))
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "_version", lambda n: "9" if n == "cuda-bindings" else real(n))
    assert key() != before
    # A toolkit that pip has not installed is asked.
    monkeypatch.setattr(compiler, "_version", lambda n: None)
    keys = []
    for version in ((13, 0), (13, 5)):
        monkeypatch.setattr("cuda.bindings.nvjitlink.version", lambda v=version: v)
        keys.append(key())
    missing(monkeypatch, "cuda.bindings.nvjitlink")
    monkeypatch.delattr("cuda.bindings.nvjitlink")
    keys.append(key())
    assert len(set(keys)) == 3
    monkeypatch.undo()
    assert key() == before


def numbas_switches():
    """All switches that Numba reads from the environment, on."""
    import numba

    folders = Path(numba.__file__).parent / "core", Path(numba.cuda.__file__).parent
    files = [file for folder in folders for file in folder.rglob("*.py")]
    switch = re.compile(r'_readenv\(\s*"(NUMBA_\w+)",\s*(?:int|bool)\b')
    names = {name for file in files for name in switch.findall(file.read_text())}
    assert "NUMBA_CUDA_DEBUGINFO" in names and "NUMBA_CUDA_ENABLE_NRT" in names
    # Where the simulator is meant, and what breaks Numba's own printing.
    return dict.fromkeys(
        names - {"NUMBA_ENABLE_CUDASIM", "NUMBA_HIGHLIGHT_DUMPS", "NUMBA_TRACE"}, "1"
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The output of a process whose environment says nothing of Numba."""
    return finish(start(CHILD, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(
    "variables",
    [
        {"NUMBA_CUDA_DEBUGINFO": "1"},
        {"NUMBA_OPT": "0"},
        {"NUMBA_FORCE_CUDA_CC": "9.0a"},
        numbas_switches(),
    ],
    ids=["debug information", "unoptimised", "another GPU", "all switches"],
)
def test_numbas_environment_does_not_change_the_machine_code(variables, plain, tmp_path):
    assert finish(start(CHILD, tmp_path, **variables))["code"] == plain["code"]


def test_numbas_settings_do_not_change_the_machine_code(good, monkeypatch):
    import numba

    for name, value in (("CUDA_DEBUGINFO_DEFAULT", 1), ("FORCE_CUDA_CC", (9, 0, "a"))):
        monkeypatch.setattr(numba.config, name, value)
    # Numba has its settings from the environment again, as soon as that has changed.
    monkeypatch.setenv("NUMBA_DEBUG_JIT", "1")
    cubin = compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    without_names = [
        [line.partition("`")[0] for line in instructions(each)] for each in (cubin, good)
    ]
    assert without_names[0] == without_names[1]
    assert numba.config.DEBUG_JIT == 1
    monkeypatch.delenv("NUMBA_DEBUG_JIT")
    numba.config.reload_config()


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
    assert compiler.compile_cubin(CONFIG, TRAITS, LIMITS).code == bytes([kept])
    assert len(made) == calls


def test_min_blocks_reaches_the_assembler():
    def directives(min_blocks):
        make = partial(compiler._make, CONFIG, TRAITS)
        _, ptx = compiler._front_end(make, LIMITS, "ptx", min_blocks)
        return set(re.findall(r"\.(?:maxntid|minnctapersm) \d+", ptx))

    assert directives(None) == {".maxntid 256"}
    assert directives(1) == {".maxntid 256", ".minnctapersm 1"}


@pytest.mark.parametrize(
    ("min_blocks", "spills", "directive"), [(0, 0, None), (0, 8, 1), (1, 0, 1), (2, 8, 2)]
)
def test_the_ptx_is_that_of_the_cubin(min_blocks, spills, directive, cache_directory, monkeypatch):
    """The config's promise to the assembler, or the one that was made because of spills."""
    link = compiler._link

    def link_and_spill(ltoir, arch):
        code, log = link(ltoir, arch)
        roomy = len(linked) == 1
        linked.append(code)
        return code, log if roomy else re.sub(r"\d+ (bytes spill)", rf"{spills} \1", log)

    linked = []
    monkeypatch.setattr(compiler, "_link", link_and_spill)
    config = replace(parse_config("forward", "sm80-m16n16w1s1"), min_blocks=min_blocks)
    assert get_cubin(config, TRAITS, LIMITS).min_blocks == directive
    forget()  # as inspecting in another process: from the cubin on disk
    ptx = compiler.compile_ptx(config, TRAITS, LIMITS)
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


def make_exponentials():
    """A small kernel whose device function no other compilation has compiled."""

    @device_function
    def exponentials(array, scale):
        for i in range(8):
            array[i] = ex2_approx_ftz_f32(array[i] * scale + i)

    def kernel(x: Pointer(f32), n: i32):
        array = cuda.local.array(8, f32)
        for i in range(8):
            array[i] = x[i * n]
        exponentials(array, x[n])
        total = x[n + 1]
        for i in range(8):
            total += array[i] if i < n else x[i]
        x[n // 2] = total

    return Kernel("exponentials", kernel, 32, 0)


def numbas_own():
    """The functions that `without_repeated_work` replaces."""
    from numba import types
    from numba.cuda.core.postproc import PostProcessor

    return types.Function.get_call_type, PostProcessor.run


@pytest.fixture
def numbas_work(monkeypatch):
    """Counts Numba's own answers to what `without_repeated_work` saves."""
    from numba import types
    from numba.cuda.core import analysis

    work = {"signatures": 0, "live variables": 0}

    def count(owner, name, what):
        own = getattr(owner, name)

        def counted(*args):
            work[what] += 1
            return own(*args)

        monkeypatch.setattr(owner, name, counted)

    count(types.Function, "get_call_type", "signatures")
    count(analysis, "compute_live_variables", "live variables")
    monkeypatch.setattr(repeated_work, "_signatures", WeakKeyDictionary())
    return work


def instructions(cubin):
    """The machine code without its symbols, in which Numba counts what it has compiled."""
    lines = disassemble(cubin.code).splitlines()
    return [line for line in lines if line.lstrip().startswith("/*")]


def test_less_work_makes_the_same_machine_code(numbas_work, monkeypatch):
    def work_of(context):
        numbas_work.update(dict.fromkeys(numbas_work, 0))
        monkeypatch.setattr(repeated_work, "without_repeated_work", context)
        return instructions(compile_kernel(make_exponentials, LIMITS)), dict(numbas_work)

    less = repeated_work.without_repeated_work
    code, everything = work_of(nullcontext)
    first_code, first = work_of(less)
    second_code, second = work_of(less)
    assert len(code) > 50
    assert code == first_code == second_code
    assert everything["live variables"] > 0 == first["live variables"]
    assert 0 < first["signatures"] < everything["signatures"] / 2
    # Function types that nothing holds, like that of cuda.local.array, are asked again.
    assert second["signatures"] < first["signatures"] / 4


def test_what_is_remembered_does_not_grow():
    def kernel(x: Pointer(f32), n: i32):
        x[n] = f32(n) + f32(1)

    def remembered():
        compile_kernel(lambda: Kernel("conversions", kernel, 32, 0), LIMITS)
        gc.collect()
        return sum(map(len, repeated_work._signatures.values()))

    assert 0 < remembered() == remembered() == remembered()


def test_numba_is_left_as_it_was(good, monkeypatch):
    from numba import cuda as numba_cuda

    own, during = numbas_own(), []

    def compile_all(*args, **kwargs):
        during.append(numbas_own())
        raise ZeroDivisionError

    monkeypatch.setattr(numba_cuda, "compile_all", compile_all)
    with pytest.raises(ZeroDivisionError):
        compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    assert during[0][0] is not own[0]
    assert during[0][1] is not own[1]
    assert numbas_own() == own


def test_numba_with_other_internals_is_only_slower(numbas_work, monkeypatch):
    def refuse():
        raise ImportError("no module named so")

    monkeypatch.setattr(repeated_work, "_KNOWN_NAMES", {"something", "else"})
    monkeypatch.setattr(repeated_work, "_remember_signatures", refuse)
    own = numbas_own()
    with repeated_work.without_repeated_work():
        assert numbas_own() == own
    assert compile_kernel(make_exponentials, LIMITS).stack_bytes == 0
    assert numbas_work["live variables"] > 0


def missing(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_numba_is_missing(monkeypatch, cache_directory):
    missing(monkeypatch, "numba")
    with pytest.raises(UnsupportedError, match=r'Numba .* pip install "numflash\[cu13\]"'):
        get_cubin(CONFIG, TRAITS, LIMITS)


def test_numba_cuda_is_missing(monkeypatch, cache_directory):
    # Numba then offers the CUDA target that it once had itself.
    from numba import cuda as numba_cuda

    monkeypatch.delattr(numba_cuda, "compile_all")
    with pytest.raises(UnsupportedError, match=r'without numba-cuda\. .* pip install "numflash'):
        get_cubin(CONFIG, TRAITS, LIMITS)


def test_nvjitlink_is_missing(monkeypatch):
    import cuda.bindings

    missing(monkeypatch, "cuda.bindings.nvjitlink")
    monkeypatch.delattr(cuda.bindings, "nvjitlink", raising=False)
    with pytest.raises(UnsupportedError, match=r'nvJitLink .* pip install "numflash\[cu13\]"'):
        compiler._link(b"", "sm_80")


class DynamicLibNotFoundError(RuntimeError):
    """Named like the one of cuda-pathfinder."""


def not_found(*args, **kwargs):
    raise DynamicLibNotFoundError('Failure finding "libnvrtc.so.13"\n  No such file\n')


def test_a_library_of_the_front_end_is_missing(monkeypatch, cache_directory):
    from numba import cuda as numba_cuda

    monkeypatch.setattr(numba_cuda, "compile_all", not_found)
    with pytest.raises(UnsupportedError, match=r"libnvrtc.so.13.* pip install") as raised:
        get_cubin(CONFIG, TRAITS, LIMITS)
    assert "\n" not in str(raised.value)
    assert not cache_directory.exists()


def test_a_library_of_the_linker_is_missing(monkeypatch):
    from cuda.bindings import nvjitlink

    monkeypatch.setattr(nvjitlink, "create", not_found)
    with pytest.raises(UnsupportedError, match=r"libnvrtc.so.13.* pip install"):
        compiler._link(b"", "sm_80")


def test_errors_of_ones_own_are_not_disguised(monkeypatch):
    from numba import cuda as numba_cuda

    ask_driver = compiler_asks()
    monkeypatch.setattr(numba_cuda, "compile_all", lambda *a, **k: [][0])
    with pytest.raises(IndexError):
        compiler.compile_cubin(CONFIG, TRAITS, LIMITS)
    assert compiler_asks() is ask_driver


def compiler_asks():
    """The function by which Numba learns the current device; compiling borrows it."""
    from numba.cuda import dispatcher

    return dispatcher.get_current_device


def test_versions():
    versions = compiler.versions()
    assert versions["numba-cuda"] == metadata.version("numba-cuda")
    assert None not in versions.values()
