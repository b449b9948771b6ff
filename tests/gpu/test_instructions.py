"""Every instruction on a GPU gives what its simulator body gives; that tests the simulator."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numflash.compiler import compile_kernel
from numflash.kernels.kernel import Kernel
from numflash.launch import DriverLaunch, limits_of_device
from numflash.ptx import INSTRUCTIONS
from tests.instruction_cases import CASES

_CASES = [case for cases in CASES.values() for case in cases]
_SIMULATE = """
import sys
import numpy as np
from tests.instruction_cases import CASES
from tests.instruction_harness import run_simulated
outputs = {}
for case in (case for cases in CASES.values() for case in cases):
    for number, output in enumerate(run_simulated(case)):
        outputs[f"{case}/{number}"] = output
np.savez(sys.argv[1], **outputs)
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The outputs of all cases in the simulator, which needs a process of its own."""
    path = tmp_path_factory.mktemp("simulated") / "outputs.npz"
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(root)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    command = [sys.executable, "-c", _SIMULATE, str(path)]
    subprocess.run(command, check=True, cwd=root, env=environment)
    return np.load(path)


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_hardware_agrees_with_the_simulator(case, simulated):
    import cupy

    from numflash.arrays import _CuPy

    limits = limits_of_device(0)
    major, minor = limits.compute_capability
    declared = INSTRUCTIONS[case.instruction]
    if case.tensor_maps and major > 9:
        pytest.skip("tensor maps are passed as Hopper's compiler reads them")
    if not declared.runs_on(10 * major + minor):
        pytest.skip(f"{case.instruction} is of sm_{declared.sm}, this GPU is {limits.arch}")
    kernel = Kernel(case.instruction, case.kernel, case.block, case.smem_bytes)
    cubin = compile_kernel(lambda: kernel, limits, case.min_blocks)
    inputs = [cupy.asarray(a) for a in case.inputs]
    outputs = [cupy.asarray(a) for a in case.new_outputs()]
    library = _CuPy()
    operands = [library.operand(array) for array in (*inputs, *outputs)]
    arrays = dict(zip(kernel.parameters, operands, strict=True))
    stream = cupy.cuda.get_current_stream().ptr
    maps = {n: layout for n, layout in zip(arrays, case.layouts, strict=True) if layout}
    DriverLaunch(cubin, 0, 1, maps).bind(arrays)(stream)
    got = [output.get() for output in outputs]
    expected = [simulated[f"{case}/{number}"] for number in range(len(got))]
    assert (difference := case.difference(expected, got)) is None, difference
