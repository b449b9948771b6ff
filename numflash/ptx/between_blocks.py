"""What blocks say to each other through global memory.

Who reads by an acquire what another has written by a release sees all that the other had done
before (PTX ISA 8.8). Bulk copies have a way of their own to global memory: those of a thread that
has acquired need `fence_proxy_async_global` before them, and those of a thread that releases must
be complete (`cp_async_bulk_wait_group`).
"""

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Global
from numflash.ptx.scalars import i64, u32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.bulk_copies import BulkCopies
    from numflash.simulator.engine import current_thread
    from numflash.simulator.proxies import AsyncProxy


@instruction("ld.acquire.gpu.global.u32 <ret>, [<source>];", sm=75, volatile=True)
def ld_acquire_gpu_u32(source: Global(u32, "offset"), offset: i64) -> u32:
    """source[offset], and what its writer had done before `st_release_gpu_u32`.

    For loops that wait for it, too: other threads run before it returns. PTX ISA 9.7.9.8.
    """
    thread = current_thread()
    thread.block.poll()
    thread.block.part(AsyncProxy).acquire(thread)
    return source.acquire(offset)


@instruction("st.release.gpu.global.u32 [<target>], <x>;", sm=75)
def st_release_gpu_u32(target: Global(u32, "offset"), offset: i64, x: u32):
    """target[offset] = x, after all that this thread has done. PTX ISA 9.7.9.12.

    And after what others have done that it has met at a barrier.
    """
    block = current_thread().block
    block.part(BulkCopies).check_written("st_release_gpu_u32")
    block.patience.polls = 0
    target.release(offset, x)


@instruction("atom.relaxed.gpu.global.inc.u32 <ret>, [<target>], <last>;", sm=75)
def atom_inc_gpu_u32(target: Global(u32, "offset"), offset: i64, last: u32) -> u32:
    """target[offset], which is one more afterwards, or 0 where it was `last` or more.

    Until it is 0 again no two threads get the same number. It says nothing of what others have
    done before. PTX ISA 9.7.13.5.
    """
    thread = current_thread()
    thread.block.patience.polls = 0
    held = target.block(offset, 4, access="none").view(u32)
    before = u32(held[0])
    held[0] = 0 if before >= last else before + u32(1)
    return before


@instruction("fence.proxy.async.global;", sm=90)
def fence_proxy_async_global():
    """Have this thread's bulk copies see global memory as it sees it. PTX ISA 9.7.13.4."""
    thread = current_thread()
    thread.block.part(AsyncProxy).fence_global(thread)
