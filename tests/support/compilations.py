"""The kernel that tests of the compiler compile, and processes that compile it."""

import json
import os
import subprocess
import sys

import pytest

from numflash.configs import DeltaConfig, Traits
from numflash.machine_code import compiler
from numflash.machine_code.compiler import get_cubin
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
