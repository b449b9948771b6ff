"""Every instruction on a GPU gives what its simulator body gives; that tests the simulator."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numflash.kernels.kernel import Kernel
from numflash.machine_code.compiler import compile_kernel
from numflash.runtime.driver import limits_of_device
from tests.support.instruction_cases import CASES
from tests.support.instruction_harness import refusal, run_on_gpu

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

    limits = limits_of_device(0)
    if (why := refusal(case, limits)) is not None:
        pytest.skip(why)
    kernel = Kernel(case.instruction, case.kernel, case.block, case.smem_bytes)
    cubin = compile_kernel(lambda: kernel, limits, case.min_blocks)
    got = run_on_gpu(case, cubin, cupy.asarray, cupy.asnumpy, 0)
    expected = [simulated[f"{case}/{number}"] for number in range(len(got))]
    assert (difference := case.difference(expected, got)) is None, difference
