"""Clusters in the simulator: blocks that meet, and reach each other's shared memory."""

import numpy as np
import pytest

from numflash.simulator import (
    SEED,
    DeadlockError,
    GlobalPointer,
    SimulatedTensorMap,
    SimulationError,
    launch,
)
from tests.support.cluster_kernels import (
    BLOCKS,
    FAULTS,
    SMEM_BYTES,
    THREADS,
    layout,
    make_ring,
    rows_of,
)
from tests.support.covering import ALL

SEEDS = range(24 if ALL else 8)


def pointer(x):
    return GlobalPointer(x, x.dtype)


def run_ring(fault="", clusters=1, rank=4):
    """Whether the result of a launch is right."""
    rows = rows_of(clusters)
    y = np.zeros((clusters, BLOCKS, rows.shape[1]), np.uint32)
    args = [SimulatedTensorMap(rows.view(np.float16), layout(clusters, rank)), pointer(y)]
    kernel = make_ring(fault, rank)
    launch(kernel, BLOCKS * clusters, THREADS, args, SMEM_BYTES, cluster=BLOCKS)
    return (y == rows[:, None]).all()


def outcome(fault):
    """How a launch ends: "right", "wrong", or the text of an error."""
    try:
        return "right" if run_ring(fault) else "wrong"
    except (SimulationError, DeadlockError) as error:
        return f"{type(error).__name__}: {error}"


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
    found = []
    for SEED.value in SEEDS:
        found.append(outcome(fault))
    print(fault, found)
    assert set(found) != {"right"}
