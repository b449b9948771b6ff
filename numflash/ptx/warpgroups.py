"""Instructions for specialised warps: fences between proxies, one elected lane, registers.

Four consecutive warps are a warpgroup; its number in the block begins at a multiple of four.
"""

from functools import cache

import numpy as np

from numflash.ptx.instruction import instruction
from numflash.ptx.scalars import TensorMap, u32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.engine import current_thread
    from numflash.simulator.mbarriers import Mbarriers
    from numflash.simulator.proxies import AsyncProxy
    from numflash.simulator.register_pool import RegisterPool


@instruction("fence.mbarrier_init.release.cluster;", sm=90)
def fence_mbarrier_init():
    """Make this thread's `mbarrier_init` visible to copies. PTX ISA 9.7.13.4."""
    current_thread().block.part(Mbarriers).fence_init()


@instruction("fence.proxy.async.shared::cta;", sm=90)
def fence_proxy_async():
    """Make this thread's stores to shared memory visible to bulk copies and `wgmma`.

    To its own ones also what others have stored, and it knows of. PTX ISA 9.7.13.4.
    """
    thread = current_thread()
    thread.block.part(AsyncProxy).fence(thread)


@instruction(
    "fence.proxy.tensormap::generic.acquire.gpu [<tensor_map>], 128;",
    sm=90,
)
def fence_proxy_tensormap(tensor_map: TensorMap):
    """See a tensor map as it was last written on the device. PTX ISA 9.7.13.4.

    It must lie in global memory, where kernel parameters do not; those need no fence.
    """


@instruction(
    "{ .reg .pred elected; elect.sync _|elected, 0xffffffff; selp.u32 <ret>, 1, 0, elected; }",
    sm=90,
    collective="warp",
    volatile=True,
)
def elect_sync() -> u32:
    """1 in one lane of the warp, 0 in the others. PTX ISA 9.7.13.13."""
    elected = np.zeros(32, u32)
    elected[current_thread().block.elected_lane] = 1
    return elected


@cache
def make_setmaxnreg(action: str, registers: int):
    """The instruction by which a warpgroup takes ("inc") or gives back ("dec") registers.

    `registers` are those per thread from then on: a multiple of 8 from 24 to 256. "inc" waits
    until the block's pool has enough. All four warps must execute it, each at its own time.
    PTX ISA 9.7.20.5.
    """
    if action not in ("inc", "dec") or registers % 8 or not 24 <= registers <= 256:
        raise ValueError(f"setmaxnreg.{action} {registers}: a multiple of 8 from 24 to 256")

    def setmaxnreg():
        current_thread().block.part(RegisterPool).set(action, registers)

    setmaxnreg.__name__ = f"setmaxnreg_{action}_{registers}"
    setmaxnreg.__doc__ = f"Have {registers} registers a thread from here on. PTX ISA 9.7.20.5."
    template = f"setmaxnreg.{action}.sync.aligned.u32 {registers};"
    return instruction(template, sm=90, newest=90)(setmaxnreg)
