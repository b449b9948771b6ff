"""Copies to several blocks of a cluster, in the simulator."""

import re

import numpy as np
import pytest

from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_tensor_4d,
    cuda,
    fence_proxy_async,
    ld_acquire_gpu_u32,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    mov_cluster_ctarank,
    st_release_gpu_u32,
    st_shared_u32,
    u32,
)
from numflash.simulator import (
    SEED,
)
from tests.support.cluster_calls import (
    POISON,
    begin,
    errors,
    multicast,
    pointer,
    refused,
    run,
    sync_cluster,
    tensor,
)
from tests.support.cluster_kernels import (
    HALF_BYTES,
)


def test_a_tile_arrives_in_each_block_at_a_time_of_its_own():
    def kernel(map, seen):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0 and mov_cluster_ctarank() == 1:
            multicast(smem, barriers, map)
        sync_cluster()
        if cuda.threadIdx.x == 0:
            seen[cuda.blockIdx.x] = int(smem[5])
            mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES)
            mbarrier_wait_parity(barriers, 0, 0)
            assert smem[5] == rows[0, 5]
        sync_cluster()

    (rows, map), found = tensor(), set()
    for SEED.value in range(24):
        run(kernel, map, seen := {})
        found.add((seen[0], seen[1]))
    there = int(rows[0, 5])
    assert found == {(a, b) for a in (POISON, there) for b in (POISON, there)}


def test_bytes_may_arrive_before_a_block_announces_them_and_end_nothing(each_seed):
    def kernel(map):
        smem, barriers = begin(count=2)
        t, rank = cuda.threadIdx.x, int(mov_cluster_ctarank())
        if rank == 0 and t == 0:
            for half in range(2):
                multicast(smem, barriers, map, row=8 * half, word=256 * half)
        if t == 1:
            mbarrier_arrive(barriers, 0)
        sync_cluster()
        if t == 2:
            for _ in range(8):
                mbarrier_wait_parity(barriers, 0, 1)  # has not ended
            mbarrier_arrive_expect_tx(barriers, 0, 2 * HALF_BYTES)
        mbarrier_wait_parity(barriers, 0, 0)
        assert smem[t] == rows[0, t] and smem[256 + t] == rows[8, t]
        sync_cluster()

    rows, map = tensor()
    run(kernel, map)


def test_bytes_that_nobody_announces_end_nothing():
    def kernel(map):
        smem, barriers = begin()
        t, rank = cuda.threadIdx.x, int(mov_cluster_ctarank())
        if rank == 1 and t == 0:
            multicast(smem, barriers, map, blocks=0b01)
        sync_cluster()
        if rank == 0:
            if t == 0:
                mbarrier_arrive(barriers, 0)
            mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    found = errors(kernel, tensor()[1])
    assert all(re.search("lacks 0 of 1 arrivals and -1024 bytes|ended", text) for text in found)
    assert {text.split(":")[0] for text in found} == {"DeadlockError", "SimulationError"}


def test_only_the_blocks_of_the_mask_get_a_tile(each_seed):
    def kernel(map, seen):
        smem, barriers = begin()
        t, rank = cuda.threadIdx.x, int(mov_cluster_ctarank())
        if rank == 1 and t == 0:
            multicast(smem, barriers, map, blocks=0b101)
        if rank != 1:
            if t == 0:
                mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES)
            mbarrier_wait_parity(barriers, 0, 0)
        seen.append((rank, int(smem[t])))
        sync_cluster()

    rows, map = tensor()
    run(kernel, map, seen := [], blocks=3)
    assert {x for rank, x in seen if rank == 1} == {POISON}
    assert sorted(x for rank, x in seen if rank == 0) == sorted(rows[0])


def test_a_mask_names_blocks_of_the_cluster():
    def kernel(map, blocks):
        smem, barriers = begin()
        multicast(smem, barriers, map, blocks)

    refused(kernel, "to no block: its mask is 0", tensor()[1], 0)
    refused(kernel, "rank 2: the cluster .* ranks up to 1", tensor()[1], 0b111)
    refused(kernel, "rank 1: the cluster .* ranks up to 0", tensor()[1], 0b11, blocks=1)


def test_each_block_s_mbarrier_is_one_that_copies_see():
    def kernel(map):
        smem, barriers = begin(fence=int(mov_cluster_ctarank()) == 0)
        if mov_cluster_ctarank() == 0 and cuda.threadIdx.x == 0:
            multicast(smem, barriers, map)

    refused(kernel, "without a fence_mbarrier_init|has ended", tensor()[1])


@pytest.mark.parametrize("fence", ["none", "writer", "issuer", "thread 0"])
def test_a_copy_does_not_overtake_another_block_s_stores(fence):
    """Only the writer's fence helps: the thread that copies, 0, is in another block."""

    def kernel(map):
        smem, barriers = begin()
        t, rank = cuda.threadIdx.x, int(mov_cluster_ctarank())
        if rank == 1:
            st_shared_u32(smem, t, u32(1))
            if fence == "writer":
                fence_proxy_async()
            cuda.syncthreads()
            if fence == "thread 0" and t == 0:
                fence_proxy_async()
        sync_cluster()
        if rank == 0 and t == 0:
            if fence == "issuer":
                fence_proxy_async()
            multicast(smem, barriers, map)
        if t == 0:
            mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES)
        mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    if fence == "writer":
        assert set(errors(kernel, tensor()[1])) == {""}
    else:
        refused(kernel, "touches what thread .* stored to shared memory without", tensor()[1])


def test_copies_of_two_blocks_do_not_write_the_same_bytes():
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            multicast(smem, barriers, map)
            mbarrier_arrive_expect_tx(barriers, 0, 2 * HALF_BYTES)
        mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    assert any("a bulk copy is still under way" in text for text in errors(kernel, tensor()[1]))


def test_a_block_s_own_copy_does_not_meet_another_s():
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES * (1 + int(cuda.blockIdx.x)))
            if cuda.blockIdx.x == 0:
                multicast(smem, barriers, map)
            else:
                cp_async_bulk_tensor_4d(smem, 0, map, barriers, 0, EVICT_NORMAL, 0, 0, 0, 0)
        mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    assert any("a bulk copy is still under way" in text for text in errors(kernel, tensor()[1]))


def test_a_block_does_not_end_while_another_copies_into_it():
    def kernel(map):
        smem, barriers = begin()
        if mov_cluster_ctarank() == 0:
            if cuda.threadIdx.x == 0:
                multicast(smem, barriers, map)
                mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES)
            mbarrier_wait_parity(barriers, 0, 0)

    refused(
        *(kernel, r"block \(1, 0, 0\).*( has ended|ended (with a bulk load|and nobody))"),
        tensor()[1],
    )


def test_a_block_that_waits_for_a_copy_is_not_held_up_by_one_that_looks_at_memory():
    def kernel(map, turn):
        smem, barriers = begin()
        t, rank = cuda.threadIdx.x, int(mov_cluster_ctarank())
        if t == 0:
            mbarrier_arrive_expect_tx(barriers, 0, HALF_BYTES)
            if rank == 1:
                multicast(smem, barriers, map)
                while ld_acquire_gpu_u32(turn, 0) != u32(1):
                    pass
        if rank == 0:
            mbarrier_wait_parity(barriers, 0, 0)
            if t == 0:
                st_release_gpu_u32(turn, 0, u32(1))
        mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    for SEED.value in range(12):
        run(kernel, tensor()[1], pointer(np.zeros(1, np.uint32)))
