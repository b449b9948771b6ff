"""Tiles and turns of Hopper's backward, compiled to PTX and executed."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.machine_code import compiler, cubins, sources
from numflash.simulator import SimulationError
from tests.support import backward_tiles, bulk_row_cases
from tests.support.bulk_row_cases import BULK_ROW_CASES, ROW, expected_sums
from tests.support.covering import thorough

_FORM = ("bfloat16", 2, 96)
# The same kernels, compiled by a process that does not simulate.
_WORKER = """
import sys
from numflash.kernels.kernel import Kernel
from numflash.machine_code import compiler
from numflash.runtime.devices import ARCHITECTURES
from tests.support import backward_tiles, bulk_row_cases
make = {
    "tile": lambda: backward_tiles.make_kernel("bfloat16", 2, 96),
    "turns": lambda: Kernel("turns", bulk_row_cases.make_take_turns(), 64, 8 * bulk_row_cases.ROW),
}[sys.argv[1]]
_, ptx = compiler._front_end(make, ARCHITECTURES["sm_90a"], "ptx")
sys.stdout.buffer.write(ptx.encode() if isinstance(ptx, str) else ptx)
"""


def compiled(name: str) -> str:
    """The PTX of a kernel, kept like other kernels that tests compile."""
    digest = hashlib.sha256(_WORKER.encode())
    for module in (backward_tiles, bulk_row_cases):
        digest.update(Path(module.__file__).read_bytes())
    key = "|".join([name, digest.hexdigest(), sources.source_hash(), compiler._toolchain()])
    if (stored := cubins.read(key)) is not None:
        return stored[1].decode()
    environment = dict(os.environ, NUMBA_ENABLE_CUDASIM="0")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    worker = [sys.executable, "-c", _WORKER, name]
    done = subprocess.run(worker, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0
    cubins.write(key, {}, done.stdout)
    return done.stdout.decode()


def dq(mutate=lambda ptx: ptx):
    ds, k, expected = backward_tiles.arrays(*_FORM)
    kernel = backward_tiles.make_kernel(*_FORM)
    got = np.full(expected.size, np.nan, np.float32)
    ptx, shared = mutate(compiled("tile")), kernel.smem_bytes
    numflash.run_ptx(ptx, None, 1, kernel.num_threads, [ds, k, got], shared_bytes=shared)
    return expected, got


def sums(mutate=lambda ptx: ptx):
    case = BULK_ROW_CASES[1]
    y, turn = np.full(ROW, np.nan, np.float32), np.zeros(1, np.uint32)
    arguments = [case.inputs[0], y, turn]
    ptx = mutate(compiled("turns"))
    numflash.run_ptx(ptx, None, 1, 64, arguments, shared_bytes=case.smem_bytes)
    return y, turn


def without(pattern: str):
    """Leaves out the last statement that matches."""

    def mutate(ptx: str) -> str:
        *_, last = re.finditer(pattern, ptx)
        return ptx[: last.start()] + ptx[last.end() :]

    return mutate


@thorough
def test_dq_of_a_tile_is_exact():
    expected, got = dq()
    assert (expected == got).all()


@thorough
def test_a_tile_without_its_fence_is_found():
    with pytest.raises(SimulationError, match="without a fence_proxy_async"):
        dq(without(r"fence\.proxy\.async\.shared::cta;"))


def test_a_tile_that_is_not_transposed_is_wrong():
    expected, got = dq(lambda ptx: ptx.replace(".x4.trans.shared", ".x4.shared"))
    assert not (expected == got).all()


@thorough
def test_rows_are_added_in_turn():
    y, turn = sums()
    assert (y == expected_sums(*BULK_ROW_CASES[1].inputs)).all() and turn == 2


@thorough
def test_a_row_without_its_fence_is_found():
    with pytest.raises(SimulationError, match="without a fence_proxy_async"):
        sums(without(r"fence\.proxy\.async\.shared::cta;"))
