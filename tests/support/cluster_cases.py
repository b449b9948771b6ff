"""Cases of the instructions of clusters, for one block: it is a cluster of its own, of rank 0."""

import numpy as np

from numflash.ptx import (
    EVICT_NORMAL,
    TensorMap,
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cp_async_bulk_tensor_4d_multicast,
    cp_async_bulk_tensor_5d_multicast,
    cuda,
    device_function,
    fence_mbarrier_init,
    mbarrier_arrive_expect_tx,
    mbarrier_arrive_remote,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_cluster_ctarank,
    mov_clusterid_x,
    mov_nclusterid_x,
    u16,
    u32,
    u64,
)
from numflash.runtime.views import Pointer
from tests.support.bulk_copy_cases import TILES, elements_of
from tests.support.instruction_harness import THREADS, InstructionCase
from tests.support.mbarrier_cases import STEPS, make_produce_consume

MULTICAST_TILES = {4: TILES["keys"], 5: TILES["packed"]}


def _meet(x: Pointer(u32), y: Pointer(u32)):
    chunk = cuda.shared.array(THREADS, u32)
    t = cuda.threadIdx.x
    chunk[t] = x[t]
    barrier_cluster_arrive()
    barrier_cluster_wait()
    y[t] = chunk[THREADS - 1 - t]


def _place(register):
    def place(x: Pointer(u32), y: Pointer(u32)):
        t = cuda.threadIdx.x
        y[t] = x[t] * (register() + u32(5))

    return place


@device_function
def _arrive(barriers, index):
    mbarrier_arrive_remote(barriers, index, u32(0))


def _multicast(tile):
    is_4d, n_bytes = len(tile.coordinates) == 4, tile.n_bytes
    n_words = n_bytes // 4
    c0, c1, c2, c3, c4 = (*tile.coordinates, 0)[:5]

    def copy(x: TensorMap, y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(1, u64)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barriers, 0, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(barriers, 0, n_bytes)
            if is_4d:
                cp_async_bulk_tensor_4d_multicast(
                    smem, 0, x, barriers, 0, EVICT_NORMAL, u16(1), c0, c1, c2, c3
                )
            else:
                cp_async_bulk_tensor_5d_multicast(
                    smem, 0, x, barriers, 0, EVICT_NORMAL, u16(1), c0, c1, c2, c3, c4
                )
        cuda.syncthreads()
        mbarrier_wait_parity(barriers, 0, 0)
        for i in range(t, n_words, THREADS):
            y[i] = smem[i]

    return copy


def _case(instruction, kernel, n=THREADS) -> InstructionCase:
    words = np.arange(1, n + 1, dtype=np.uint32) * np.uint32(2654435761)
    return InstructionCase(instruction, "", kernel, (words,), (((n,), np.uint32),))


def _multicast_case(rank: int) -> InstructionCase:
    tile = MULTICAST_TILES[rank]
    return InstructionCase(
        f"cp_async_bulk_tensor_{rank}d_multicast",
        "",
        _multicast(tile),
        (elements_of(tile),),
        (((tile.n_bytes // 4,), np.uint32),),
        smem_bytes=tile.n_bytes,
        tensor_maps=(tile.layout,),
    )


CLUSTER_CASES = [
    _case("barrier_cluster_arrive", _meet),
    _case("barrier_cluster_wait", _meet),
    *(
        _case(register.__name__, _place(register))
        for register in (mov_cluster_ctarank, mov_clusterid_x, mov_nclusterid_x)
    ),
    _case("mbarrier_arrive_remote", make_produce_consume(_arrive), 32 * STEPS),
    *map(_multicast_case, MULTICAST_TILES),
]
