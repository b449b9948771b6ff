"""Bulk copies into shared memory: what a tile holds, when it arrives, what a load is refused."""

import numpy as np
import pytest

from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_tensor_3d,
    cuda,
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    st_shared_u32,
    u32,
    u64,
)
from numflash.simulator import SEED, SimulationError
from tests.support.bulk_copy_cases import BULK_COPY_CASES, LOADS, STORES, TILES, Tile
from tests.support.bulk_copy_kernels import (
    SEEDS,
    TILE_BYTES,
    TILE_WORDS,
    begin,
    load,
    outcomes,
    refused,
    run,
    tensor,
)
from tests.support.instruction_harness import run_simulated

# What a tile is, element by element


def elements(tile: Tile):
    """(position in shared memory, index in the array or None) of every element of a tile."""
    layout, item = tile.layout, np.dtype(tile.storage).itemsize
    steps = [1, *(stride // item for stride in layout.strides)]
    for number in range(int(np.prod(layout.box))):
        rest, index, inside = number, -layout.shift_bytes // item, True
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


def test_a_tile_ends_where_its_sequence_does():
    """The other rows of the box are of other sequences, or of none."""
    for name, (box, rows) in {
        "ragged keys": (16, 7),
        "ragged queries": (16, 14),
        "a page": (8, 5),
    }.items():
        tile = TILES[name]
        inside = [index for _, index in elements(tile) if index is not None]
        assert len(inside) == 64 * rows and np.prod(tile.layout.box) == 64 * box
        assert min(inside) >= 0 and max(inside) < tile.n_elements


def test_the_cases_have_every_rank():
    ranks = {len(tile.coordinates) for tile in TILES.values()}
    assert ranks == set(LOADS) == set(STORES)


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
