"""The block engine under Numba's CUDA simulator: what a kernel means, without a GPU.

`engine` schedules the threads of a block, `memory` poisons and checks what they touch, `cuda` is
the `cuda` module that a simulated kernel sees, `launch` runs grids and installs the engine.
"""

from numflash.simulator.cuda import cuda
from numflash.simulator.engine import DeadlockError, SimulationError
from numflash.simulator.launch import install, launch
from numflash.simulator.memory import GlobalPointer
from numflash.simulator.seed import SEED

__all__ = [
    "SEED",
    "DeadlockError",
    "GlobalPointer",
    "SimulationError",
    "cuda",
    "install",
    "launch",
]
