"""Special registers. PTX ISA 10."""

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import u32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.engine import current_thread


@instruction("mov.u32 <ret>, %tid.x;", sm=75, volatile=True)
def mov_tid_x() -> u32:
    """threadIdx.x, read again at each call.

    The compiler keeps values computed from `cuda.threadIdx.x` in registers through a loop; values
    from this it computes where they are needed. PTX ISA 10.1.
    """
    return u32(current_thread().threadIdx.x)


@instruction("mov.u32 <ret>, %ctaid.x;", sm=75, volatile=True)
def mov_ctaid_x() -> u32:
    """blockIdx.x, read again at each call, as `mov_tid_x`. PTX ISA 10.6."""
    return u32(current_thread().block.blockIdx.x)


@instruction("mov.u32 <ret>, %nctaid.x;", sm=75, volatile=True)
def mov_nctaid_x() -> u32:
    """gridDim.x, read again at each call, as `mov_tid_x`. PTX ISA 10.7."""
    return u32(current_thread().block.gridDim.x)
