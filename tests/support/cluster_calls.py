"""Small kernels of clusters in the simulator: what tests of them run, and expect."""

import re

import numpy as np

from numflash.ptx import (
    EVICT_NORMAL,
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cp_async_bulk_tensor_4d_multicast,
    cuda,
    fence_mbarrier_init,
    mbarrier_init,
    u16,
    u32,
    u64,
)
from numflash.simulator import (
    SEED,
    DeadlockError,
    GlobalPointer,
    SimulatedTensorMap,
    SimulationError,
    launch,
)
from tests.support.cluster_kernels import (
    SMEM_BYTES,
    layout,
    rows_of,
)
from tests.support.covering import ALL

SEEDS = range(24 if ALL else 8)
POISON = 0xFFFFFFFF


def pointer(x):
    return GlobalPointer(x, x.dtype)


def tensor():
    """Rows, and their map: a tile is eight rows of 32 words."""
    rows = rows_of(1)
    return rows.reshape(-1, 32), SimulatedTensorMap(rows.view(np.float16), layout(1))


def run(kernel, *args, blocks=2, clusters=1, threads=32):
    launch(kernel, blocks * clusters, threads, args, SMEM_BYTES, cluster=blocks)


def errors(kernel, *args, seeds=SEEDS, **options):
    """The texts of the errors of several orders; "" for none."""
    found = []
    for SEED.value in seeds:
        try:
            run(kernel, *args, **options)
            found.append("")
        except (SimulationError, DeadlockError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def refused(kernel, message, *args, **options):
    for found in errors(kernel, *args, **options):
        assert re.search(message, found), found


def sync_cluster():
    barrier_cluster_arrive()
    barrier_cluster_wait()


def begin(count=1, fence=True):
    """The cluster's blocks each with shared memory and an mbarrier, which all know of."""
    smem, barriers = cuda.shared.array(0, u32), cuda.shared.array(1, u64)
    if cuda.threadIdx.x == 0:
        mbarrier_init(barriers, 0, count)
        if fence:
            fence_mbarrier_init()
    sync_cluster()
    return smem, barriers


def multicast(smem, barriers, map, blocks=3, row=0, word=0):
    place = 0, row, 0, 0
    cp_async_bulk_tensor_4d_multicast(
        smem, word, map, barriers, 0, EVICT_NORMAL, u16(blocks), *place
    )
