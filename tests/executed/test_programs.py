"""Functions of programs, compiled to PTX and executed, against the simulator's run of them.

The simulator knows what NumPy makes of int32 and float32; here it is Numba that gives the types.
"""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash import masks
from numflash.functions.trace import trace
from numflash.machine_code import compiler, cubins, sources
from tests.host.numflash.functions.test_program import random_program
from tests.support import program_kernel
from tests.support.covering import ALL
from tests.support.program_kernel import SHAPE, THREADS, run, values_of
from tests.support.program_values import metadata
from tests.support.score_functions import SCORES

# The same kernel, compiled by a process that does not simulate.
_WORKER = """
import pickle, sys
from numflash.machine_code import compiler
from numflash.runtime.devices import ARCHITECTURES
from tests.support.program_kernel import kernel_of_many
texts = pickle.load(sys.stdin.buffer)
_, ptx = compiler._front_end(lambda: kernel_of_many(texts), ARCHITECTURES["sm_80"], "ptx")
sys.stdout.buffer.write(ptx.encode() if isinstance(ptx, str) else ptx)
"""
RANDOM = {f"random {seed}": random_program(seed) for seed in range(12 if ALL else 3)}


def program_and_aux(name):
    if name in SCORES:
        function, aux = SCORES[name]
        return trace(function, masks.causal, tuple(map(metadata, aux))).program, aux
    rng = np.random.default_rng(0)
    half = rng.standard_normal((3, 13)).astype(np.float16)
    counts = rng.integers(-9, 9, 13).astype(np.int32)
    flags = rng.integers(0, 2, 13).astype(np.bool_)
    return RANDOM[name], (half, counts, flags, 1.5, 5, np.array(7, np.uint8))


def compiled(texts) -> str:
    """The PTX of a kernel of all programs, kept like other kernels that tests compile."""
    asked = pickle.dumps(texts)
    digest = hashlib.sha256(asked + Path(program_kernel.__file__).read_bytes()).hexdigest()
    key = "|".join(["programs", digest, sources.source_hash(), compiler._toolchain()])
    if (stored := cubins.read(key)) is not None:
        return stored[1].decode()
    environment = dict(os.environ, NUMBA_ENABLE_CUDASIM="0")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    worker = [sys.executable, "-c", _WORKER]
    done = subprocess.run(worker, input=asked, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0
    cubins.write(key, {}, done.stdout)
    return done.stdout.decode()


@pytest.fixture(scope="module")
def executed(request):
    """Name -> (scores, slopes, kept) of programs asked for, and the scores that they got."""
    of_here = (item for item in request.session.items if item.path == request.path)
    names = list(dict.fromkeys(item.callspec.params["name"] for item in of_here))
    programs = [program_and_aux(name) for name in names]
    ptx = compiled([program.text for program, _ in programs])
    x = (np.random.default_rng(1).standard_normal(SHAPE) * 2).astype(np.float32)
    results = [np.full((len(names), *SHAPE), -7, dtype) for dtype in ("f4", "f4", "i4")]
    given = [value for program, aux in programs for value in values_of(program, aux).values()]
    numflash.run_ptx(ptx, None, SHAPE[0] * SHAPE[1], THREADS, [x, *results, *given])
    return x, dict(zip(names, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("name", [*SCORES, *RANDOM])
def test_what_is_executed_is_what_is_simulated(executed, name):
    x, found = executed
    program, aux = program_and_aux(name)
    expected = run(program, aux, x)
    np.testing.assert_array_equal(found[name][2], expected[2])
    for got, wanted in zip(found[name][:2], expected[:2], strict=True):
        # tanh is libdevice's on one side.
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
