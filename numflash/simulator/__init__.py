"""The block engine under Numba's CUDA simulator: what a kernel means, without a GPU.

`engine` schedules the threads of a block, which run on `stacks`; `memory` poisons and checks what
they touch, `cuda` is the `cuda` module that a simulated kernel sees, `launch` runs grids and
installs the engine. The `parts` of a block are those that only some kernels need: `async_copies`,
`mbarriers`, `bulk_copies`, `warpgroup`, `proxies`, `register_pool`. How products add up is in
`numflash.runtime.sums`.
"""

from numflash.simulator.cuda import cuda
from numflash.simulator.errors import DeadlockError, SimulationError
from numflash.simulator.launch import install, launch
from numflash.simulator.memory import GlobalPointer
from numflash.simulator.seed import SEED
from numflash.simulator.tensor_maps import SimulatedTensorMap

__all__ = [
    "SEED",
    "DeadlockError",
    "GlobalPointer",
    "SimulatedTensorMap",
    "SimulationError",
    "cuda",
    "install",
    "launch",
]
