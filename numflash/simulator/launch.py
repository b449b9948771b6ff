"""Run a kernel in the simulator, all its blocks; and put the engine under Numba's simulator."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable

import numpy as np
from numba import cuda as numba_cuda
from numba.cuda.simulator import api as numba_api
from numba.cuda.simulator import kernel as numba_kernel

from numflash.simulator.clusters import MOST_BLOCKS
from numflash.simulator.cuda import Dim3, SimulatedCuda, cuda
from numflash.simulator.engine import Block
from numflash.simulator.memory import GlobalPointer
from numflash.simulator.resident import Grid, ResidentBlock, num_resident, talks
from numflash.simulator.seed import SEED
from numflash.simulator.writes import WatchedPointer

# The engine keeps the running thread in a global: one launch at a time in a process.
_one_launch = threading.RLock()


def launch(
    kernel: Callable,
    grid,
    block,
    args,
    dynamic_smem_bytes: int = 0,
    blocks_per_sm: int = 1,
    cluster: int = 1,
) -> None:
    """Run `kernel(*args)` for every thread of every block.

    Blocks run one after the other, or several together: see `simulator.resident`.

    Args:
        kernel: a plain Python function in the style of `numflash.kernels`.
        grid, block: extents, one to three integers each.
        args: what every thread gets; arrays as `GlobalPointer` for `Pointer` parameters.
        dynamic_smem_bytes: size of the dynamic shared memory.
        blocks_per_sm: blocks that share the registers of an SM.
        cluster: blocks of a cluster, with neighbouring blockIdx.x.

    Raises:
        ValueError: the grid has no blocks or does not consist of such clusters.
    """
    grid, block = _three(grid), _three(block)
    if 0 in grid:
        raise ValueError(f"a grid of {grid} blocks: the driver refuses a launch without blocks")
    if not 1 <= cluster <= MOST_BLOCKS or grid[0] % cluster:
        raise ValueError(
            f"a grid of {grid[0]} blocks in x and clusters of {cluster}: the grid must be a "
            f"multiple of the cluster, which has 1 to {MOST_BLOCKS} blocks"
        )
    positions = _positions(grid)
    talking = talks(kernel)
    resident = num_resident(talking, len(positions), SEED.value)
    # Kernels compute with infinities on purpose; NumPy would warn of each. Numba's own device
    # functions, which a kernel may be given, ask for the context of the launch.
    with _one_launch, np.errstate(all="ignore"), _numba_context():
        if resident > 1 or talking or cluster > 1:
            of_block = kernel, grid, block, dynamic_smem_bytes, blocks_per_sm
            watched = [_watched(arg) for arg in args]
            _run_together(*of_block, positions, resident, watched, cluster)
            return
        for position in positions:
            run_block(kernel, grid, block, position, args, dynamic_smem_bytes, blocks_per_sm)


def _run_together(
    kernel, grid, block, dynamic_smem_bytes, blocks_per_sm, positions, resident, args, cluster
) -> None:
    threads = [Dim3(*p) for p in _positions(block)]

    def make(number: int, of: Grid) -> ResidentBlock:
        made = ResidentBlock(
            *(number, of, args, kernel, threads, Dim3(*positions[number])),
            *(dynamic_smem_bytes, blocks_per_sm),
        )
        made.gridDim, made.blockDim = Dim3(*grid), Dim3(*block)
        return made

    Grid(make, positions, resident, SEED.value, cluster).run()


def _watched(argument):
    """An argument whose pointers tell the launch what is read and written through them."""
    if isinstance(argument, GlobalPointer):
        return WatchedPointer(argument)
    if not isinstance(argument, tuple):
        return argument
    fields = [_watched(each) for each in argument]
    return type(argument)(*fields) if hasattr(argument, "_fields") else tuple(fields)


@contextlib.contextmanager
def _numba_context():
    outer, numba_kernel._kernel_context = numba_kernel._kernel_context, cuda
    try:
        yield
    finally:
        numba_kernel._kernel_context = outer


def run_block(
    kernel, grid, block, position, args, dynamic_smem_bytes: int, blocks_per_sm: int = 1
) -> None:
    """Run one block of a launch."""
    threads = [Dim3(*p) for p in _positions(block)]
    simulated = Block(kernel, threads, Dim3(*position), dynamic_smem_bytes, blocks_per_sm)
    simulated.gridDim, simulated.blockDim = Dim3(*grid), Dim3(*block)
    simulated.run(*args)


def _three(extents) -> tuple[int, int, int]:
    extents = (extents,) if np.isscalar(extents) else tuple(extents)
    return (*(int(e) for e in extents), *(1,) * (3 - len(extents)))


def _positions(extents):
    """All (x, y, z), x running fastest, as hardware numbers threads."""
    nx, ny, nz = extents
    return [(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]


class _BlockManager:
    """Stands in for Numba's class of this name: one block of a plain `@cuda.jit` kernel."""

    def __init__(self, f, grid_dim, block_dim, debug):
        self._launch = (f, tuple(grid_dim), tuple(block_dim))
        self._errors = {"divide": "raise"} if debug else {}

    def run(self, grid_point, *args):
        context = numba_kernel._get_kernel_context()
        with np.errstate(**self._errors):
            run_block(*self._launch, grid_point, args, context.dynamic_smem_bytes)


def _lenient_jit(numba_jit):
    """`cuda.jit` that accepts the options of the compiler, which mean nothing here."""
    known = set(inspect.signature(numba_jit).parameters)

    @functools.wraps(numba_jit)
    def jit(*args, **options):
        return numba_jit(*args, **{k: v for k, v in options.items() if k in known})

    return jit


def install() -> None:
    """Run every kernel of this process's Numba simulator, ours or not, on the block engine."""
    if numba_kernel.BlockManager is _BlockManager:
        return
    numba_kernel.BlockManager = _BlockManager
    numba_kernel.FakeCUDAModule = SimulatedCuda
    numba_cuda.jit = numba_api.jit = _lenient_jit(numba_api.jit)
