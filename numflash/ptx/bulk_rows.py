"""Bulk copies of consecutive bytes, without a tensor map. PTX ISA 9.7.9.25.

They go the way of `bulk_copies`: a load's bytes are counted by an mbarrier, stores and reductions
belong to bulk groups of their thread, and none of them sees a store to shared memory before
`fence_proxy_async`. Addresses and sizes are multiples of 16 bytes.
"""

import numpy as np

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Global, Shared
from numflash.ptx.scalars import f32, i32, i64, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.bulk_copies import BulkCopies, Span
    from numflash.simulator.engine import current_thread

_NAN, _TINY = u32(0x7FFFFFFF).view(f32), np.finfo(np.float32).tiny


@instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[<target>], [<source>], <n_bytes>, [<barriers>];",
    sm=90,
)
def cp_async_bulk(
    target: Shared(u32, "target_offset"),
    target_offset: i32,
    source: Global(f32, "source_offset"),
    source_offset: i64,
    n_bytes: u32,
    barriers: Shared(u64, "index"),
    index: i32,
):
    """n_bytes of `source` to `target`, counted by the mbarrier `index`. PTX ISA 9.7.9.25.4.1."""
    span = Span(source.block(source_offset, int(n_bytes), 16))
    copies = current_thread().block.part(BulkCopies)
    copies.load(target, target_offset, span, barriers, index, ())


@instruction(
    "cp.async.bulk.global.shared::cta.bulk_group [<target>], [<source>], <n_bytes>;", sm=90
)
def cp_async_bulk_store(
    target: Global(f32, "target_offset"),
    target_offset: i64,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
    n_bytes: u32,
):
    """n_bytes in shared memory to `target`, as part of the next bulk group.

    PTX ISA 9.7.9.25.4.1.
    """
    _store(target, target_offset, source, source_offset, n_bytes, None)


@instruction(
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
    "[<target>], [<source>], <n_bytes>;",
    sm=90,
)
def cp_reduce_async_bulk_add_f32(
    target: Global(f32, "target_offset"),
    target_offset: i64,
    source: Shared(u32, "source_offset"),
    source_offset: i32,
    n_bytes: u32,
):
    """Add n_bytes of float32 in shared memory to `target`, as part of the next bulk group.

    Each element by itself, in any order among threads and blocks; subnormal numbers, before and
    after, count as zeros of their sign. PTX ISA 9.7.9.25.4.2.
    """
    _store(target, target_offset, source, source_offset, n_bytes, _add)


@instruction("cp.async.bulk.wait_group 0;", sm=90)
def cp_async_bulk_wait_group():
    """Wait until this thread's bulk stores and reductions are in global memory.

    `cp_async_bulk_wait_group_read` waits only until shared memory may be written again.
    PTX ISA 9.7.9.25.3.3.
    """
    copies = current_thread().block.part(BulkCopies)
    copies.linger()
    copies.wait_for_writes()


def _store(target, target_offset, source, source_offset, n_bytes, combine):
    span = Span(target.block(target_offset, int(n_bytes), 16, "none"), np.float32)
    copies = current_thread().block.part(BulkCopies)
    copies.store(span, (), source, source_offset, combine)


def _add(held, given):
    total = _flushed(_flushed(held) + _flushed(given))
    return np.where(np.isnan(total), _NAN, total)


def _flushed(x):
    return np.where(np.abs(x) < _TINY, np.copysign(f32(0), x), x)
