"""Copies from global to shared memory that bypass the registers. PTX ISA 9.7.9.25.

A copy is issued, joins the group that its thread commits next, and has arrived once the thread has
waited for that group; other threads see it after a barrier. Copies are not ordered among each
other: of two that are under way to the same bytes either may arrive last. In the simulator the
destination holds 0xFF bytes until the wait, so reading too early shows, and so does writing over
bytes that are still read; a second copy or a store there is an error, and so is a copy that no
thread waits for.
"""

import numpy as np

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Global, Shared
from numflash.ptx.scalars import i32, i64, u32
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.async_copies import AsyncCopies
    from numflash.simulator.engine import current_thread


@instruction(
    "cp.async.cg.shared.global.L2::128B [<target>], [<source>], 16, <n_bytes>;",
    sm=80,
)
def cp_async_16(
    target: Shared(u32, "target_offset"),
    target_offset: i64,
    source: Global(u32, "source_offset"),
    source_offset: i64,
    n_bytes: i32,
):
    """Four words of `target` = the first n_bytes, 0 to 16, at element source_offset; then zeros.

    No more of the source is read. PTX ISA 9.7.9.25.3.1.
    """
    copy(target, target_offset, source, source_offset, n_bytes, 16)


@instruction("cp.async.ca.shared.global [<target>], [<source>], 4, <n_bytes>;", sm=80)
def cp_async_4(
    target: Shared(u32, "target_offset"),
    target_offset: i64,
    source: Global(u32, "source_offset"),
    source_offset: i64,
    n_bytes: i32,
):
    """As `cp_async_16` with one word. PTX ISA 9.7.9.25.3.1."""
    copy(target, target_offset, source, source_offset, n_bytes, 4)


@instruction("cp.async.commit_group;", sm=80)
def cp_async_commit_group():
    """Make a group of the copies that this thread issued since the last one.

    PTX ISA 9.7.9.25.3.2.
    """
    _copies().commit()


def _make_wait_group(pending: int):
    def cp_async_wait_group():
        _copies().wait(pending)

    cp_async_wait_group.__name__ = f"cp_async_wait_group_{pending}"
    cp_async_wait_group.__doc__ = (
        f"Wait until all but the newest {pending} groups of this thread have arrived.\n\n"
        "PTX ISA 9.7.9.25.3.3."
    )
    return instruction(f"cp.async.wait_group {pending};", sm=80)(cp_async_wait_group)


CP_ASYNC_WAIT_GROUP = tuple(_make_wait_group(pending) for pending in range(5))
"""The element n waits for all groups but the newest n, which is an immediate.

Numba does not know such a tuple: take the element outside the kernel.
"""


def copy(target, target_offset, source, source_offset, n_bytes, size):
    """Begin to copy n_bytes, and zeros up to `size`: 4, 8 or 16. PTX ISA 9.7.9.25.3.1."""
    n_words = size // 4
    if target_offset % n_words:
        raise ValueError(f"cp.async: word {target_offset} is not a multiple of {size} bytes")
    if not 0 <= target_offset <= target.size - n_words:
        raise IndexError(f"cp.async: shared memory: word {target_offset} of {target.size}")
    if not 0 <= n_bytes <= size:
        raise ValueError(f"cp.async: {n_bytes} bytes of the source to {size} of the target")
    origin = source.block(source_offset, n_bytes, size) if n_bytes else np.empty(0, np.uint8)
    _copies().issue(target, target_offset, size, origin)


def _copies() -> "AsyncCopies":
    return current_thread().block.part(AsyncCopies)
