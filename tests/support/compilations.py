"""The kernel that tests of the compiler compile, and processes that compile it.

`kept` is for kernels of the tests' own, which every run compiles otherwise.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from numflash.configs import DeltaConfig, Traits
from numflash.kernels.kernel import Kernel
from numflash.machine_code import compiler, cubins, sources
from numflash.machine_code.compiler import Cubin, get_cubin
from numflash.machine_code.sass import disassemble
from numflash.runtime.devices import ARCHITECTURES

CONFIG, TRAITS, LIMITS = DeltaConfig(8), Traits("float16", 64, 64), ARCHITECTURES["sm_80"]
ELF = b"\x7fELF"


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


def kept(name: str, make: Callable[[], Kernel], arch: str, min_blocks=None) -> Cubin:
    """As `compile_kernel`, or what an earlier run made of the same sources with this compiler.

    Args:
        name: of the kernel, unlike those of other kernels of the tests.
        make: it, of sources in numflash and tests.
        arch: the GPU.
        min_blocks: as `compile_kernel` takes it.
    """
    limits = ARCHITECTURES[arch]
    hashes = sources.source_hash(), _hash_of_tests(), compiler._toolchain()
    key = "|".join(["tests", name, arch, str(min_blocks), *hashes])
    cubin = compiler._from_disk(key, limits)
    if cubin is None:
        cubin = compiler.compile_kernel(make, limits, min_blocks)
        header = {name: value for name, value in asdict(cubin).items() if name != "code"}
        cubins.write(key, header, cubin.code)
    return cubin


@cache
def _hash_of_tests() -> str:
    """Of the files that kernels of tests are made of."""
    folders = Path(__file__).parent, Path(__file__).parents[1] / "compile"
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


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


def key_of(*arguments):
    """The key under which `get_cubin` looks for a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        keys = []
        patch.setattr(compiler, "_cubins", {})
        patch.setattr(compiler.cubins, "read", lambda key: keys.append(key))
        patch.setattr(compiler, "_compile_logged", lambda *_: None)
        get_cubin(*arguments)
    return keys[0]


def instructions(cubin):
    """The machine code without its symbols, in which Numba counts what it has compiled."""
    lines = disassemble(cubin.code).splitlines()
    return [line for line in lines if line.lstrip().startswith("/*")]


def missing(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
