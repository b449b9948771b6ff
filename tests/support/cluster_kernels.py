"""A kernel whose two blocks fetch halves of every stage for both, and what can be wrong with it.

As Hopper's forward fetches keys: the producer of each block waits until a stage is empty in both,
announces all of it at its own mbarrier, and multicasts its half. Who has read a stage tells both
producers.
"""

from collections.abc import Callable

import numpy as np

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_NORMAL,
    TensorMap,
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cp_async_bulk_tensor_4d_multicast,
    cp_async_bulk_tensor_5d_multicast,
    cuda,
    fence_mbarrier_init,
    i32,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_arrive_remote,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_cluster_ctarank,
    mov_clusterid_x,
    u16,
    u32,
    u64,
)
from numflash.runtime.views import Pointer

BLOCKS, THREADS, STAGES, STEPS = 2, 64, 2, 5
HALF_ROWS, ROW_WORDS = 8, 32
HALF_WORDS = HALF_ROWS * ROW_WORDS
HALF_BYTES, STAGE_WORDS = 4 * HALF_WORDS, 2 * HALF_WORDS
SMEM_BYTES = 4 * STAGES * STAGE_WORDS
ROWS = STEPS * 2 * HALF_ROWS
_BARRIERS = 2 * STAGES
FAULTS = (
    "released here only",
    "released here twice",
    "no barrier at the start",
    "no barrier at the end",
    "half of the bytes",
    "twice the same half",
    "fetched for the own block only",
    "not waited until empty",
)


def layout(clusters: int, rank: int = 4) -> TensorLayout:
    """The map of all rows of all clusters, of float16."""
    last = (1,) * (rank - 3)
    rows, row_bytes = (ROWS, clusters, *last), 4 * ROW_WORDS
    strides = (row_bytes, row_bytes * ROWS, *(row_bytes * ROWS * clusters for _ in last))
    box = 2 * ROW_WORDS, HALF_ROWS, 1, *last
    return TensorLayout("float16", (2 * ROW_WORDS, *rows), strides, box, swizzle_bytes=0)


def rows_of(clusters: int) -> np.ndarray:
    """The words of all rows: what each of the two blocks of a cluster writes."""
    words = np.arange(1, clusters * ROWS * ROW_WORDS + 1, dtype=np.uint32)
    return (words * np.uint32(2654435761)).reshape(clusters, ROWS * ROW_WORDS)


def make_ring(fault: str = "", rank: int = 4) -> Callable:
    """The kernel; the map has this rank, and its arguments are the map and what blocks write."""
    assert fault in ("", *FAULTS)
    releases_there = fault not in ("released here only", "released here twice")
    releases_twice = fault == "released here twice"
    begins_together = fault != "no barrier at the start"
    ends_together = fault != "no barrier at the end"
    announced = HALF_BYTES if fault == "half of the bytes" else 2 * HALF_BYTES
    same_half = fault == "twice the same half"
    for_both, waits = fault != "fetched for the own block only", fault != "not waited until empty"
    is_4d, releases = rank == 4, 1 if fault == "released here only" else 2

    def ring(rows: TensorMap, y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(_BARRIERS, u64)
        t, rank, cluster = cuda.threadIdx.x, i32(mov_cluster_ctarank()), i32(mov_clusterid_x())
        if t == 0:
            for stage in range(STAGES):
                mbarrier_init(barriers, stage, 1)
                mbarrier_init(barriers, STAGES + stage, releases)
            fence_mbarrier_init()
        # Both blocks' mbarriers are there before anything is done to the other's.
        if begins_together:
            barrier_cluster_arrive()
            barrier_cluster_wait()
        else:
            cuda.syncthreads()
        if t == 0:
            blocks = u16(3) if for_both else u16(1 << rank)
            half = 0 if same_half else rank
            for step in range(STEPS):
                stage, parity = step % STAGES, step // STAGES & 1
                # Neither block reads the stage any more.
                if waits:
                    mbarrier_wait_parity(barriers, STAGES + stage, 1 - parity)
                mbarrier_arrive_expect_tx(barriers, stage, announced)
                place = stage * STAGE_WORDS + half * HALF_WORDS
                row = (2 * step + half) * HALF_ROWS
                if is_4d:
                    cp_async_bulk_tensor_4d_multicast(
                        smem,
                        place,
                        rows,
                        barriers,
                        stage,
                        EVICT_NORMAL,
                        blocks,
                        0,
                        row,
                        cluster,
                        0,
                    )
                else:
                    cp_async_bulk_tensor_5d_multicast(
                        *(smem, place, rows, barriers, stage, EVICT_NORMAL, blocks),
                        *(0, row, cluster, 0, 0),
                    )
        elif t >= 32:
            for step in range(STEPS):
                stage, parity = step % STAGES, step // STAGES & 1
                # Both halves have arrived.
                mbarrier_wait_parity(barriers, stage, parity)
                first = (cuda.blockIdx.x * STEPS + step) * STAGE_WORDS
                for i in range(t - 32, STAGE_WORDS, 32):
                    y[first + i] = smem[stage * STAGE_WORDS + i]
                cuda.syncwarp()
                if t == 32:
                    mbarrier_arrive(barriers, STAGES + stage)
                    if releases_there:
                        mbarrier_arrive_remote(barriers, STAGES + stage, u32(1 - rank))
                    if releases_twice:
                        mbarrier_arrive_remote(barriers, STAGES + stage, u32(rank))
        # The other block may still arrive and copy here.
        if ends_together:
            barrier_cluster_arrive()
            barrier_cluster_wait()

    return ring
