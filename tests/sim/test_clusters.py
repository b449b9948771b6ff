"""Clusters in the simulator: blocks that meet, and reach each other's mbarriers."""

import re

import numpy as np
import pytest

from numflash.ptx import (
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cuda,
    f32,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_arrive_remote,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_cluster_ctarank,
    mov_clusterid_x,
    mov_nclusterid_x,
    u32,
    u64,
)
from numflash.simulator import (
    SEED,
    DeadlockError,
    SimulatedTensorMap,
    SimulationError,
    launch,
)
from tests.support.bulk_copy_cases import BULK_COPY_CASES
from tests.support.cluster_calls import (
    SEEDS,
    begin,
    errors,
    pointer,
    refused,
    run,
    sync_cluster,
)
from tests.support.cluster_cases import CLUSTER_CASES, MULTICAST_TILES
from tests.support.cluster_kernels import (
    BLOCKS,
    FAULTS,
    SMEM_BYTES,
    THREADS,
    layout,
    make_ring,
    rows_of,
)
from tests.support.instruction_harness import run_simulated

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
        assert "threads 0-31 wait at" in second and text.count(".py:") == 3


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
