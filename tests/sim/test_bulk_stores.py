"""Bulk copies out of shared memory: when a store has read its tile; maps that are refused."""

import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_2d_store,
    cp_async_bulk_wait_group_read,
    cuda,
    f32,
    fence_proxy_async,
    mbarrier_wait_parity,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    stmatrix_x4,
    stmatrix_x4_trans,
    u32,
)
from numflash.simulator import SEED, SimulatedTensorMap, SimulationError
from tests.support.bulk_copy_kernels import (
    SEEDS,
    TILE_WORDS,
    begin,
    load,
    outcomes,
    refused,
    run,
    tensor,
)

# Stores


def store(map, smem, row=0, word=0):
    cp_async_bulk_tensor_2d_store(map, 0, row, smem, word)


def fill(smem, value):
    for i in range(cuda.threadIdx.x, TILE_WORDS, 32):
        st_shared_u32(smem, i, u32(value))


def test_a_store_needs_commit_and_wait():
    def uncommitted(map):
        smem, _ = begin()
        if cuda.threadIdx.x == 0:
            store(map, smem)
            cp_async_bulk_wait_group_read()

    def not_waited_for(map):
        smem, _ = begin()
        if cuda.threadIdx.x == 0:
            store(map, smem)
            cp_async_bulk_commit_group()

    def waited_for_by_another(map):
        smem, _ = begin()
        if cuda.threadIdx.x == 0:
            store(map, smem)
            cp_async_bulk_commit_group()
        cuda.syncthreads()
        if cuda.threadIdx.x == 1:
            cp_async_bulk_wait_group_read()

    refused(uncommitted, "thread 0 has not committed")
    refused(not_waited_for, "thread 0 has not waited for")
    refused(waited_for_by_another, "thread 0 has not waited for")


@pytest.mark.parametrize(
    "write", ["words", "vectors", "floats", "float vectors", "matrices", "transposed"]
)
def test_a_store_reads_only_what_its_writer_or_its_thread_has_fenced(write):
    def kernel(map, fenced):
        smem, _ = begin()
        t = cuda.threadIdx.x
        words, floats = cuda.local.array(4, u32), cuda.local.array(4, f32)
        words[:], floats[:] = u32(3), f32(3)
        if write == "words":
            st_shared_u32(smem, 4 * t, u32(3))
        elif write == "vectors":
            st_shared_v4_u32(smem, 4 * t, words)
        elif write == "floats":
            st_shared_f32(smem, 4 * t, f32(3))
        elif write == "float vectors":
            st_shared_v4_f32(smem, 4 * t, floats)
        elif write == "matrices":
            stmatrix_x4(smem, 4 * t, words)
        else:
            stmatrix_x4_trans(smem, 4 * t, words)
        if fenced == "by the writer" or (fenced == "by the reader, too early" and t == 0):
            fence_proxy_async()
        cuda.syncthreads()
        if t == 0:
            if fenced == "by the reader":
                fence_proxy_async()
            store(map, smem)
            cp_async_bulk_commit_group()
            cp_async_bulk_wait_group_read()

    run(kernel, tensor()[1], "by the writer")
    run(kernel, tensor()[1], "by the reader")
    # Lanes execute stmatrix together, so that none of them is too early.
    together = write in ("matrices", "transposed")
    wrong = ("by nobody",) if together else ("by the reader, too early", "by nobody")
    for fenced in wrong:
        with pytest.raises(SimulationError, match="without a fence_proxy_async of that thread"):
            for seed in SEEDS:
                SEED.value = seed
                run(kernel, tensor()[1], fenced)


def test_a_fence_counts_also_after_others_have_copied():
    def kernel(map):
        smem, barriers = begin()
        t = cuda.threadIdx.x
        st_shared_u32(smem, t, u32(3))
        cuda.syncthreads()
        if t == 0:
            load(smem, barriers, map, word=TILE_WORDS)
        cuda.syncthreads()
        fence_proxy_async()
        cuda.syncthreads()
        mbarrier_wait_parity(barriers, 0, 0)
        if t == 0:
            store(map, smem)
            cp_async_bulk_commit_group()
            cp_async_bulk_wait_group_read()

    run(kernel, tensor()[1])


@pytest.mark.parametrize("stored_by", ["instruction", "element"])
def test_a_store_where_a_load_arrives_is_found_out(stored_by):
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)
            if stored_by == "instruction":
                st_shared_u32(smem, 5, u32(3))
            else:
                smem[5] = u32(3)
            mbarrier_wait_parity(barriers, 0, 0)

    messages = {"instruction": "while a bulk copy was under way", "element": "which of them is la"}

    def is_refused(seed):
        SEED.value = seed
        try:
            run(kernel, tensor()[1])
        except SimulationError as error:
            return messages[stored_by] in str(error)
        return False

    assert any(is_refused(seed) for seed in SEEDS)


def test_a_tile_stays_until_the_store_has_read_it(each_seed):
    def kernel(map, waits):
        smem, _ = begin()
        fill(smem, 1)
        fence_proxy_async()
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            store(map, smem)
            cp_async_bulk_commit_group()
            if waits:
                cp_async_bulk_wait_group_read()
        cuda.syncthreads()
        fill(smem, 2)
        cp_async_bulk_wait_group_read()

    array, map = tensor()
    run(kernel, map, True)
    assert (array[:8].ravel()[::2] == 1).all() and array[8, 0] == 8 * 64 + 1
    with pytest.raises(SimulationError, match="changed after the store was issued"):
        run(kernel, map, False)


def test_some_seed_shows_a_missing_barrier_before_a_store():
    def kernel(map, seen):
        smem, _ = begin()
        t = cuda.threadIdx.x
        fill(smem, 1)
        fence_proxy_async()
        if t == 0:
            store(map, smem)
            cp_async_bulk_commit_group()
            cp_async_bulk_wait_group_read()

    expected = tensor()[0]
    expected[:8] = np.array([1, 0] * 256).reshape(8, 64)
    assert outcomes(kernel) - {((), expected.tobytes())}


# Maps


@pytest.mark.parametrize(
    "change",
    [
        {"extents": (64, 33)},
        {"strides": (120,)},
        {"strides": ()},
        {"box": (60, 8)},
        {"box": (32, 8)},
        {"box": (64, 257)},
        {"extents": (64, 0)},
    ],
    ids=str,
)
def test_a_map_the_driver_would_refuse_is_refused(change):
    fields = {"dtype": "float16", "extents": (64, 32), "strides": (128,), "box": (64, 8)}
    with pytest.raises(ValueError, match="a tensor map"):
        tensor(TensorLayout(**(fields | change)))


def test_a_map_may_be_of_an_array_with_gaps():
    whole = np.arange(16 * 128, dtype=np.uint16).reshape(16, 128)
    part = whole[::2, 64:]
    layout = TensorLayout("float16", (64, 8), (512,), (64, 8))
    map = SimulatedTensorMap(part, layout)
    assert (map.read((0, 0)).reshape(-1).view(np.uint16).reshape(8, 64) == part).all()
    map.write((0, 4), np.zeros((64, 16), np.uint8))
    assert not part[4:].any() and part[:4].all() and whole[1::2].all()
