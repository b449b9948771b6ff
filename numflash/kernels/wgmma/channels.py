"""Channels: buffers in shared memory that a producer fills and consumers empty, in turn.

A buffer is full when the bytes that were announced have arrived, and empty when every warpgroup
that reads it has released it. An mbarrier counts each of the two; a wait names the parity of
the phase that must have ended. `make_channel` gives a kernel its verbs:

    by the thread that fills buffers
        claim(barriers, stage, parity)        wait until a buffer is empty
        expect(barriers, stage, n_bytes)      announce the bytes that copies will bring
    by a warp that writes its share of a buffer by itself, once the buffer is claimed
        filled(barriers, stage)               say that all lanes have written
    by all threads of a warpgroup that reads them
        wait(barriers, stage, parity)         wait until a buffer is full
        release(barriers, stage)              give a buffer back that a finished product has read
        gather(group)                         meet before a release that no product precedes
        skip(barriers, group, stage, parity)  give a buffer back unread
    by both
        following(stage, parity)              the next buffer, and the parity of its phase
    by one thread, before all others
        init(barriers)                        make the mbarriers

A bulk copy completes at the mbarrier `full` + stage. Where the producers of a cluster's blocks
fill each other's buffers, a buffer may be filled when it is empty in all of them: `empty` counts
the readers of all blocks, and a release arrives in each.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numflash.ptx import cuda, device_function, i32, mov_tid_x, u32
from numflash.ptx.clusters import mbarrier_arrive_remote
from numflash.ptx.mbarriers import (
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
)
from numflash.tiles.wgmma.turns import WARPGROUP, meet


class Channel(NamedTuple):
    """The verbs of a channel, and its first mbarriers; see the module's docstring."""

    full: int
    empty: int
    init: Callable
    claim: Callable
    expect: Callable
    filled: Callable
    wait: Callable
    release: Callable
    gather: Callable
    skip: Callable
    following: Callable


@cache
def make_channel(
    full: int,
    empty: int,
    stages: int,
    arrivals: int = 4,
    readers: int = 1,
    writers: int = 1,
    cluster: int = 1,
    others: int = 0,
):
    """The channel of `stages` buffers, each read by `readers` warpgroups of `cluster` blocks.

    A buffer is full when `writers` threads have arrived at `full` + stage: one that expects bytes,
    or one of each warp that writes by itself. `others` more warps than those of the `readers`
    release it, each by one arrival.

    `full` and `empty` are the mbarriers of the first buffer, those of the others follow. A
    warpgroup releases a buffer by 4 arrivals, or by 1.

    With 4 each warp arrives for itself. It knows no more: a product (`.sync`) holds the threads of
    a warp together, not the warps, and `wgmma.wait_group` waits for what the executing threads
    have committed (PTX ISA 9.7.15.7.3). With 1, of the first warp, a product is taken to be over
    for all four warps at once, and for none before all have issued it. FlashAttention-3 does so,
    as CUTLASS did before 3.6; no manual promises it. It is here to be measured.
    """
    threads, last_stage = WARPGROUP // arrivals, stages - 1

    @device_function
    def init(barriers):
        for stage in range(stages):
            mbarrier_init(barriers, full + stage, writers)
            mbarrier_init(barriers, empty + stage, arrivals * readers * cluster + others)

    @device_function
    def claim(barriers, stage, parity):
        # Hazard: a copy would overwrite what a warp's product still reads.
        mbarrier_wait_parity(barriers, empty + stage, parity)

    @device_function
    def expect(barriers, stage, n_bytes):
        # Hazard: without it the buffer would count as full before its bytes have arrived.
        mbarrier_arrive_expect_tx(barriers, full + stage, n_bytes)

    @device_function
    def filled(barriers, stage):
        # Hazard: the buffer would count as full before all lanes have written their share.
        cuda.syncwarp()
        if mov_tid_x() % 32 == 0:
            mbarrier_arrive(barriers, full + stage)

    @device_function
    def wait(barriers, stage, parity):
        # Hazard: a product would read a buffer whose bytes are still on their way.
        mbarrier_wait_parity(barriers, full + stage, parity)

    @device_function
    def release(barriers, stage):
        # Hazard: the caller must have waited for its products, which read the buffer until then.
        if cluster > 1:
            block = u32(mov_tid_x() % threads)
            if block < cluster:
                mbarrier_arrive_remote(barriers, empty + stage, block)
        elif mov_tid_x() % threads == 0:
            mbarrier_arrive(barriers, empty + stage)

    @device_function
    def gather(group):
        # Hazard: a thread that still waits for the buffer to be full would miss that phase, once
        # the others have released the buffer and the producer has filled it again.
        if arrivals == 1:
            meet(group)
        else:
            cuda.syncwarp()

    @device_function
    def skip(barriers, group, stage, parity):
        # Hazard: a release before the buffer is full would count for the phase before.
        wait(barriers, stage, parity)
        gather(group)
        release(barriers, stage)

    @device_function
    def following(stage, parity):
        wraps = stage == last_stage
        return i32(0) if wraps else i32(stage + 1), u32(parity ^ u32(wraps))

    return Channel(
        full, empty, init, claim, expect, filled, wait, release, gather, skip, following
    )


@cache
def make_no_channel():
    """The channel of no buffers: its verbs do nothing."""

    @device_function
    def of_all(barriers):
        pass

    @device_function
    def of_stage(barriers, stage):
        pass

    @device_function
    def of_phase(barriers, stage, parity_or_bytes):
        pass

    @device_function
    def gather(group):
        pass

    @device_function
    def skip(barriers, group, stage, parity):
        pass

    @device_function
    def following(stage, parity):
        return stage, parity

    of_filling = of_phase, of_phase, of_stage
    return Channel(0, 0, of_all, *of_filling, of_phase, of_stage, gather, skip, following)
