"""Kernels of one warp that copy tiles in bulk."""

import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_tensor_2d,
    cuda,
    fence_mbarrier_init,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    u32,
    u64,
)
from numflash.simulator import SEED, DeadlockError, SimulatedTensorMap, SimulationError, launch

SEEDS = range(12)


# 32 x 64 float16, and tiles of 8 rows: 1024 bytes.
LAYOUT = TensorLayout("float16", (64, 32), (128,), (64, 8))
TILE_BYTES, TILE_WORDS = 1024, 256


# Kernels of one warp


def tensor(layout=LAYOUT):
    array = np.arange(1, 32 * 64 + 1, dtype=np.uint16).reshape(32, 64)
    return array, SimulatedTensorMap(array, layout)


def run(kernel, *args, block=32, smem=4096):
    launch(kernel, 1, block, args, smem)


def begin(count=1, fence=True):
    """Shared memory and one mbarrier."""
    smem, barriers = cuda.shared.array(0, u32), cuda.shared.array(1, u64)
    if cuda.threadIdx.x == 0:
        mbarrier_init(barriers, 0, count)
        if fence:
            fence_mbarrier_init()
    cuda.syncthreads()
    return smem, barriers


def load(smem, barriers, map, row=0, word=0, expect=TILE_BYTES):
    if expect:
        mbarrier_arrive_expect_tx(barriers, 0, expect)
    cp_async_bulk_tensor_2d(smem, word, map, barriers, 0, EVICT_NORMAL, 0, row)


def outcomes(kernel, **options):
    """The results of a kernel that writes to a list and a tensor, over several seeds."""
    found = set()
    for seed in SEEDS:
        SEED.value = seed
        array, map = tensor()
        out = []
        try:
            run(kernel, map, out, **options)
            found.add((tuple(out), array.tobytes()))
        except (SimulationError, DeadlockError) as error:
            found.add(type(error).__name__)
    return found


def refused(kernel, message, **options):
    for seed in range(4):
        SEED.value = seed
        with pytest.raises(SimulationError, match=message):
            run(kernel, tensor()[1], **options)
