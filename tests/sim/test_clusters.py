"""Clusters in the simulator: blocks that meet, and reach each other's shared memory."""

import re

import numpy as np
import pytest

from numflash.ptx import (
    EVICT_NORMAL,
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cp_async_bulk_tensor_4d,
    cp_async_bulk_tensor_4d_multicast,
    cuda,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    ld_acquire_gpu_u32,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_arrive_remote,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_cluster_ctarank,
    mov_clusterid_x,
    mov_nclusterid_x,
    st_release_gpu_u32,
    st_shared_u32,
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
from tests.support.bulk_copy_cases import BULK_COPY_CASES
from tests.support.cluster_cases import CLUSTER_CASES, MULTICAST_TILES
from tests.support.cluster_kernels import (
    BLOCKS,
    FAULTS,
    HALF_BYTES,
    SMEM_BYTES,
    THREADS,
    layout,
    make_ring,
    rows_of,
)
from tests.support.covering import ALL
from tests.support.instruction_harness import run_simulated

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


# What the instructions of one block give


def as_plain_load(case):
    """What the load of the same tile into one block gives, which has tests of its own."""
    name = case.instruction.removesuffix("_multicast")
    (tile,) = [t for t in MULTICAST_TILES.values() if (t.layout,) == case.tensor_maps]
    plain = [
        c for c in BULK_COPY_CASES if c.instruction == name and c.tensor_maps == (tile.layout,)
    ]
    return run_simulated(plain[0])[0]


EXPECTED = {
    "barrier_cluster_arrive": lambda x: x[::-1],
    "barrier_cluster_wait": lambda x: x[::-1],
    "mov_cluster_ctarank": lambda x: 5 * x,
    "mov_clusterid_x": lambda x: 5 * x,
    "mov_nclusterid_x": lambda x: 6 * x,
    "mbarrier_arrive_remote": lambda x: x.reshape(-1, 32)[:, ::-1].ravel(),
}


@pytest.mark.parametrize("case", CLUSTER_CASES, ids=str)
def test_a_case_gives_what_is_expected(case, each_seed):
    (got,) = run_simulated(case)
    expected = EXPECTED.get(case.instruction)
    expected = expected(*case.inputs) if expected else as_plain_load(case)
    assert got.any() and case.difference([expected], [got]) is None


# Two blocks that fetch for each other


def run_ring(fault="", clusters=1, rank=4):
    """Whether the result of a launch is right."""
    rows = rows_of(clusters)
    y = np.zeros((clusters, BLOCKS, rows.shape[1]), np.uint32)
    args = [SimulatedTensorMap(rows.view(np.float16), layout(clusters, rank)), pointer(y)]
    kernel = make_ring(fault, rank)
    launch(kernel, BLOCKS * clusters, THREADS, args, SMEM_BYTES, cluster=BLOCKS)
    return (y == rows[:, None]).all()


@pytest.mark.parametrize("rank", [4, 5])
def test_two_blocks_fetch_for_each_other(rank):
    for SEED.value in SEEDS:
        assert run_ring(rank=rank)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_several_clusters(number, monkeypatch, each_seed):
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(number))
    assert run_ring(clusters=3)


@pytest.mark.parametrize("fault", FAULTS)
def test_some_order_shows_what_is_wrong(fault):
    found = set()
    for SEED.value in SEEDS:
        try:
            found.add("right" if run_ring(fault) else "wrong")
        except (SimulationError, DeadlockError) as error:
            found.add(type(error).__name__)
    assert found != {"right"}
    if not fault.startswith("no barrier"):
        assert "right" not in found


# Who a block is, and launches


def test_a_block_knows_its_place(each_seed):
    def kernel(places):
        rank, cluster = int(mov_cluster_ctarank()), int(mov_clusterid_x())
        places.append((cuda.blockIdx.x, rank, cluster, int(mov_nclusterid_x())))

    run(kernel, places := [], blocks=3, clusters=2, threads=1)
    assert sorted(places) == [(n, n % 3, n // 3, 2) for n in range(6)]
    run(kernel, places := [], blocks=1, clusters=3, threads=1)
    assert sorted(places) == [(n, 0, n, 3) for n in range(3)]


@pytest.mark.parametrize(("grid", "cluster"), [(3, 2), (2, 4), (9, 9), (2, 0)])
def test_a_grid_consists_of_clusters(grid, cluster):
    with pytest.raises(ValueError, match=rf"grid of {grid} blocks in x and clusters of {cluster}"):
        launch(lambda: None, grid, 32, (), cluster=cluster)


@pytest.mark.parametrize(("number", "most"), [(1, 2), (3, 3), (4, 4), (7, 7)])
def test_whole_clusters_begin(number, most, each_seed, monkeypatch):
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(number))
    begun, ended = [], []

    def kernel():
        begun.append(cuda.blockIdx.x)
        assert len(begun) - len(ended) <= most
        sync_cluster()
        assert cuda.blockIdx.x ^ 1 in begun
        ended.append(cuda.blockIdx.x)

    run(kernel, clusters=4, threads=1)
    assert sorted(begun) == sorted(ended) == list(range(8))


# The barrier


def test_nobody_passes_before_all_have_come(each_seed):
    def kernel(came):
        for phase in range(1, 4):
            came.append(phase)
            barrier_cluster_arrive()
            # What a thread does here others need not have waited for.
            barrier_cluster_wait()
            assert came.count(phase) == 3 * 40

    run(kernel, [], blocks=3, threads=40)


def test_the_barrier_does_not_wait_for_threads_that_have_returned(each_seed):
    def kernel(passed):
        _, barriers = begin(count=24)
        if cuda.threadIdx.x < 8:
            mbarrier_wait_parity(barriers, 0, 0)  # the others have come
            return
        barrier_cluster_arrive()
        mbarrier_arrive(barriers, 0)
        barrier_cluster_wait()
        passed.append(1)

    run(kernel, passed := [])
    assert len(passed) == 2 * 24


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_barrier_is_for_arriving_and_then_waiting(blocks):
    def twice():
        barrier_cluster_arrive()
        barrier_cluster_arrive()

    def without():
        barrier_cluster_wait()

    def again():
        sync_cluster()
        barrier_cluster_wait()

    def forgotten():
        barrier_cluster_arrive()

    refused(twice, "again, without a barrier_cluster_wait", blocks=blocks)
    refused(without, "without a barrier_cluster_arrive before it", blocks=blocks)
    refused(again, "without a barrier_cluster_arrive before it", blocks=blocks)
    refused(forgotten, "without its barrier_cluster_wait", blocks=blocks)


def test_a_block_does_not_end_while_others_come_to_the_barrier():
    def kernel():
        if mov_cluster_ctarank() == 0:
            sync_cluster()

    found = [re.search(r"has ended|ended while \d+ threads", text) for text in errors(kernel)]
    assert all(found)
    assert len({match[0].split()[0] for match in found}) == 2, "either may be first"


def test_a_deadlock_names_who_waits_in_each_block():
    def kernel():
        _, barriers = begin()
        if mov_cluster_ctarank() == 0 and cuda.threadIdx.x == 3:
            mbarrier_wait_parity(barriers, 0, 0)
        sync_cluster()

    for text in errors(kernel):
        assert text.startswith("DeadlockError")
        parts = re.split(r"deadlock in block ", text)[1:]
        first, second = sorted(parts)
        assert first.startswith("(0, 0, 0)") and second.startswith("(1, 0, 0)")
        assert "lacks 1 of 1 arrivals" in first and "threads 3 wait at" in first
        came = "barrier_cluster_wait: 63 of 64 threads of the cluster came"
        assert came in first and came in second
        assert "threads 0-31 wait at" in second and text.count("test_clusters.py") == 3


def test_the_barrier_makes_global_memory_visible(each_seed):
    def kernel(meets, x, y):
        if cuda.threadIdx.x == 0 and cuda.blockIdx.x == 1:
            x[0] = f32(4)
        if meets:
            sync_cluster()
        if cuda.threadIdx.x == 5 and cuda.blockIdx.x == 0:
            y[0] = x[0]

    x, y = np.zeros(1, np.float32), np.zeros(1, np.float32)
    run(kernel, True, pointer(x), pointer(y))
    assert y == 4
    found = errors(kernel, False, pointer(x), pointer(y), seeds=range(8))
    assert any("reads what block (1, 0, 0) has written" in text for text in found)


# mbarriers of other blocks


def test_an_arrival_wakes_who_waits_in_another_block(each_seed):
    def kernel(came):
        _, barriers = begin(count=2 * 32)
        rank = int(mov_cluster_ctarank())
        for phase in range(5):
            came.append((phase, rank))
            # The own one first: who sees the other's arrivals knows that its phase has ended.
            mbarrier_arrive(barriers, 0)
            mbarrier_arrive_remote(barriers, 0, u32(1 - rank))
            mbarrier_wait_parity(barriers, 0, phase % 2)
            assert came.count((phase, 1 - rank)) == 32
        sync_cluster()

    run(kernel, [])


def test_the_own_rank_is_one_of_the_cluster(each_seed):
    def kernel():
        _, barriers = begin(count=32)
        mbarrier_arrive_remote(barriers, 0, mov_cluster_ctarank())
        mbarrier_wait_parity(barriers, 0, 0)

    run(kernel)


def test_a_remote_arrival_needs_its_mbarrier():
    def beyond(rank):
        _, barriers = begin()
        mbarrier_arrive_remote(barriers, 0, u32(rank))

    def another_address():
        barriers = cuda.shared.array(2, u64)
        if cuda.threadIdx.x == 0:
            mbarrier_init(barriers, int(mov_cluster_ctarank()), 1)
        sync_cluster()
        if cuda.threadIdx.x == 0:
            mbarrier_arrive_remote(barriers, 0, u32(1))

    def too_often():
        _, barriers = begin(count=31)
        if mov_cluster_ctarank() == 0:
            mbarrier_arrive_remote(barriers, 0, u32(1))
            mbarrier_arrive_expect_tx(barriers, 0, 16)
        sync_cluster()

    def ended():
        _, barriers = begin(count=32)
        if mov_cluster_ctarank() == 0:
            for _ in range(8):
                cuda.syncthreads()
            mbarrier_arrive_remote(barriers, 0, u32(1))

    refused(beyond, "to the block of rank 2: the cluster .* has ranks up to 1", 2)
    refused(beyond, "to the block of rank 1: the cluster .* has ranks up to 0", 1, blocks=1)
    refused(another_address, r"of block \(1, 0, 0\) is used as an mbarrier, but mbarrier_init")
    refused(too_often, "one arrival more than its count")
    assert any("has ended: a cluster barrier before" in text for text in errors(ended))


# Copies to several blocks


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
