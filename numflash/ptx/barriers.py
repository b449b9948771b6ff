"""Named barriers: 16 per block, each for a part of the block's warps. PTX ISA 9.7.13.1.

`cuda.syncthreads()` is barrier 0 with all threads. Producers and consumers meet at another one:
a thread that announces its data arrives and goes on, a thread that needs the data waits.
"""

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import i32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.engine import current_thread


@instruction("bar.sync <barrier>, <count>;", sm=75)
def bar_sync(barrier: i32, count: i32):
    """Wait at `barrier` until `count` threads, a multiple of 32, have come or arrived."""
    current_thread().sync_named(int(barrier), int(count))


@instruction("bar.arrive <barrier>, <count>;", sm=75)
def bar_arrive(barrier: i32, count: i32):
    """Arrive at `barrier` without waiting."""
    current_thread().sync_named(int(barrier), int(count), wait=False)
