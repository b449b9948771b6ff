"""Barriers in shared memory that count arrivals and bytes. PTX ISA 9.7.13.15.

An mbarrier goes through phases. A phase ends when as many threads have arrived as `mbarrier_init`
said and as many bytes have been delivered as were announced; the next begins at once. A wait
names the parity of the phase that must have ended: 0 for the first. At a new barrier a wait for
parity 1 therefore passes at once, which is how a producer finds empty buffers.
"""

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Shared
from numflash.ptx.scalars import i32, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.bulk_copies import BulkCopies
    from numflash.simulator.engine import current_thread
    from numflash.simulator.mbarriers import Mbarriers


@instruction("mbarrier.init.shared::cta.b64 [<barriers>], <count>;", sm=90)
def mbarrier_init(barriers: Shared(u64, "index"), index: i32, count: u32):
    """Make element `index` of `barriers` an mbarrier for `count` arrivals. PTX ISA 9.7.13.15.9.

    Other threads see it after a barrier, copies after `fence_mbarrier_init`.
    """
    current_thread().block.part(Mbarriers).init(barriers, index, count)


@instruction("mbarrier.arrive.shared::cta.b64 _, [<barriers>];", sm=90)
def mbarrier_arrive(barriers: Shared(u64, "index"), index: i32):
    """Arrive once. PTX ISA 9.7.13.15.13."""
    current_thread().block.part(Mbarriers).arrive(barriers, index)


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [<barriers>], <n_bytes>;", sm=90)
def mbarrier_arrive_expect_tx(barriers: Shared(u64, "index"), index: i32, n_bytes: u32):
    """Announce n_bytes that copies will deliver in this phase, and arrive once.

    PTX ISA 9.7.13.15.13.
    """
    current_thread().block.part(Mbarriers).arrive(barriers, index, n_bytes)


@instruction(
    "{ .reg .pred done; again<uid>: mbarrier.try_wait.parity.shared::cta.b64 done, [<barriers>], "
    "<parity>; @!done bra again<uid>; }",
    sm=90,
)
def mbarrier_wait_parity(barriers: Shared(u64, "index"), index: i32, parity: u32):
    """Wait until the phase of this parity has ended: a loop of try_wait. PTX ISA 9.7.13.15.16.

    After it, bytes delivered in the phase, and stores before the arrivals, are visible.
    """
    current_thread().block.part(BulkCopies).wait(barriers, index, parity)
