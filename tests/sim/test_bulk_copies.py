"""Bulk copies in the simulator: which bytes a tile is, when it arrives, and what is refused."""

import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_2d,
    cp_async_bulk_tensor_2d_store,
    cp_async_bulk_tensor_3d,
    cp_async_bulk_wait_group_read,
    cuda,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    stmatrix_x4,
    u32,
    u64,
)
from numflash.simulator import SEED, DeadlockError, SimulatedTensorMap, SimulationError, launch
from tests.support.bulk_copy_cases import BULK_COPY_CASES, LOADS, STORES, TILES, Tile
from tests.support.instruction_harness import run_simulated

SEEDS = range(12)
# 32 x 64 float16, and tiles of 8 rows: 1024 bytes.
LAYOUT = TensorLayout("float16", (64, 32), (128,), (64, 8))
TILE_BYTES, TILE_WORDS = 1024, 256


# What a tile is, element by element


def elements(tile: Tile):
    """(position in shared memory, index in the array or None) of every element of a tile."""
    layout, item = tile.layout, np.dtype(tile.storage).itemsize
    steps = [1, *(stride // item for stride in layout.strides)]
    for number in range(int(np.prod(layout.box))):
        rest, index, inside = number, 0, True
        for d, extent in enumerate(layout.box):
            rest, within = divmod(rest, extent)
            c = tile.coordinates[d] + within
            inside &= 0 <= c < layout.extents[d]
            index += c * steps[d]
        place = number * item
        if width := layout.swizzle_bytes:
            # Rows repeat their pattern after eight of 128 bytes, however long they are.
            row, byte = divmod(place, width)
            change = row // (128 // width) % (width // 16)
            place = width * row + (16 * (byte // 16 ^ change) + byte % 16)
        yield place // item, index if inside else None


def loaded(tile, x):
    result = np.zeros(tile.n_bytes // x.itemsize, tile.storage)
    for place, index in elements(tile):
        result[place] = 0 if index is None else x[index]
    return result.view(np.uint32)


def stored(tile, words):
    result = np.full(tile.n_elements, -1, np.int64).astype(tile.storage)
    source = words.view(tile.storage)
    for place, index in elements(tile):
        if index is not None:
            result[index] = source[place]
    return result


def tile_of(case):
    (layout,) = [layout for layout in case.layouts if layout]
    (tile,) = [tile for name, tile in TILES.items() if name == case.variant] or [None]
    assert tile is None or tile.layout == layout
    return tile


@pytest.mark.parametrize("case", [c for c in BULK_COPY_CASES if c.variant], ids=str)
def test_a_case_gives_what_is_expected(case):
    tile = tile_of(case)
    expected = loaded if case.tensor_maps[0] else stored
    for seed in range(4):
        SEED.value = seed
        (got,) = run_simulated(case)
        assert case.difference([expected(tile, *case.inputs)], [got]) is None


def test_a_negative_or_far_tile_is_zeros_and_counts():
    (case,) = [c for c in BULK_COPY_CASES if c.variant == "beyond" and c.tensor_maps[0]]
    (got,) = run_simulated(case)
    assert got.size == TILES["beyond"].n_bytes // 4 and not got.any()


def test_the_cases_have_every_rank():
    ranks = {len(tile.coordinates) for tile in TILES.values()}
    assert ranks == set(LOADS) == set(STORES)


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
    """What several seeds make of a kernel that writes to a list and a tensor."""
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


# When a tile arrives


def test_a_tile_is_poison_until_it_is_waited_for(each_seed):
    def kernel(map, seen):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            smem[5] = u32(7)
            load(smem, barriers, map)
            seen.append(smem[5])
            mbarrier_wait_parity(barriers, 0, 0)
            seen.append(smem[5])

    array, map = tensor()
    run(kernel, map, seen := [])
    assert seen[1] == array[0, 10] | array[0, 11].astype(u32) << 16
    assert seen[0] in (0xFFFFFFFF, seen[1])


def test_some_seed_shows_a_missing_wait():
    def kernel(map, seen):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)
        cuda.syncthreads()
        if cuda.threadIdx.x == 31:
            seen.append(int(smem[5]))
        cuda.syncthreads()
        mbarrier_wait_parity(barriers, 0, 0)

    assert ((0xFFFFFFFF,), tensor()[0].tobytes()) in outcomes(kernel)


def test_bytes_may_be_delivered_before_they_are_announced(each_seed):
    def kernel(map, seen):
        smem, barriers = begin(count=32)
        t = cuda.threadIdx.x
        if t == 0:
            load(smem, barriers, map, expect=0)
        cuda.syncthreads()
        if t == 1:
            mbarrier_arrive_expect_tx(barriers, 0, TILE_BYTES)
        else:
            mbarrier_arrive(barriers, 0)
        mbarrier_wait_parity(barriers, 0, 0)
        seen.append(smem[t] & u32(0xFFFF))

    run(kernel, tensor()[1], seen := [])
    assert sorted(seen) == list(range(1, 65, 2))


def test_two_copies_end_a_phase_together(each_seed):
    def kernel(map, seen):
        smem, barriers = begin()
        t = cuda.threadIdx.x
        if t == 0:
            load(smem, barriers, map, row=8, expect=2 * TILE_BYTES)
            load(smem, barriers, map, row=16, word=TILE_WORDS, expect=0)
        mbarrier_wait_parity(barriers, 0, 0)
        if t == 9:
            seen += [int(smem[0] & 0xFFFF), int(smem[TILE_WORDS] & 0xFFFF)]

    run(kernel, tensor()[1], seen := [])
    assert seen == [8 * 64 + 1, 16 * 64 + 1]


def test_a_phase_that_announced_too_many_bytes_never_ends():
    def kernel(map, seen):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map, expect=2 * TILE_BYTES)
        mbarrier_wait_parity(barriers, 0, 0)

    assert outcomes(kernel) == {"DeadlockError"}


def test_the_swizzle_is_that_of_the_address():
    """A tile that begins in row 3 of eight is swizzled from there."""

    def kernel(map, out):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map, word=3 * 32)
            mbarrier_wait_parity(barriers, 0, 0)
            out.append(smem.view(np.uint16)[: 11 * 64].reshape(11, 8, 8).copy())

    array, map = tensor()
    run(kernel, map, out := [])
    for row in range(8):
        for chunk in range(8):
            place = out[0][3 + row, chunk ^ (3 + row) % 8]
            assert (place == array[row, 8 * chunk : 8 * chunk + 8]).all()


# What a load is refused


def test_a_load_needs_a_barrier_that_copies_see():
    def unfenced(map):
        smem, barriers = begin(fence=False)
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)

    def fenced_by_another(map):
        smem, barriers = begin(fence=False)
        if cuda.threadIdx.x == 1:
            fence_mbarrier_init()
            load(smem, barriers, map)

    def uninitialised(map):
        load(cuda.shared.array(0, u32), cuda.shared.array(1, u64), map, expect=0)

    refused(unfenced, "without a fence_mbarrier_init")
    refused(fenced_by_another, "without a fence_mbarrier_init")
    refused(uninitialised, "mbarrier_init has not made it one", block=1)


@pytest.mark.parametrize(
    ("word", "message"), [(4, "not a multiple of 128"), (3 * TILE_WORDS + 32, "lie outside")]
)
def test_a_tile_fits_in_shared_memory(word, message):
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map, word=word)

    refused(kernel, message)


def test_a_map_has_the_rank_of_the_instruction():
    def kernel(map):
        smem, barriers = begin()
        cp_async_bulk_tensor_3d(smem, 0, map, barriers, 0, EVICT_NORMAL, 0, 0, 0)

    refused(kernel, "of 3 dimensions with a tensor map of 2")


def test_a_block_does_not_end_before_its_loads():
    def unseen(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)

    refused(unseen, "under way|nobody has waited")


def test_a_phase_that_delivered_bytes_is_waited_for():
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)
            mbarrier_wait_parity(barriers, 0, 0)
            load(smem, barriers, map)

    refused(kernel, "under way|nobody has waited")


def test_bytes_that_arrived_unseen_are_found_out():
    """The load arrives, in some seeds, while others are waited for."""

    def kernel(map):
        smem, seen = begin()
        unseen = cuda.shared.array(1, u64)
        if cuda.threadIdx.x == 0:
            mbarrier_init(unseen, 0, 1)
            fence_mbarrier_init()
            load(smem, unseen, map, word=TILE_WORDS)
            for phase in range(12):
                load(smem, seen, map)
                mbarrier_wait_parity(seen, 0, phase % 2)

    messages = set()
    for seed in SEEDS:
        SEED.value = seed
        with pytest.raises(SimulationError) as caught:
            run(kernel, tensor()[1])
        messages.add("nobody has waited for the last 1024 bytes" in str(caught.value))
    assert messages == {True, False}


def test_two_loads_do_not_write_the_same_bytes():
    def kernel(map):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map, expect=2 * TILE_BYTES)
            load(smem, barriers, map, word=32, expect=0)

    for seed in SEEDS:
        SEED.value = seed
        try:
            run(kernel, tensor()[1])
        except SimulationError as error:
            if "still under way" in str(error):
                return
    pytest.fail("no seed shows it")


def test_a_load_does_not_overtake_stores_without_a_fence():
    def kernel(map):
        smem, barriers = begin()
        st_shared_u32(smem, cuda.threadIdx.x, u32(1))
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            load(smem, barriers, map)

    refused(kernel, "without a fence_proxy_async")


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


@pytest.mark.parametrize("write", ["words", "vectors", "floats", "float vectors", "matrices"])
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
            st_shared_v4_f32(smem.view(f32), 4 * t, floats)
        else:
            stmatrix_x4(smem, 4 * t, words)
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
    wrong = ("by nobody",) if write == "matrices" else ("by the reader, too early", "by nobody")
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
