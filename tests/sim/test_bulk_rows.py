"""Bulk copies of consecutive bytes, and turns between blocks: results, and what mistakes show."""

import numpy as np
import pytest

from numflash.ptx import (
    cp_async_bulk,
    cp_async_bulk_commit_group,
    cp_async_bulk_store,
    cp_async_bulk_wait_group_read,
    cuda,
    f32,
    ld_acquire_gpu_u32,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    st_release_gpu_u32,
    u32,
)
from numflash.simulator import SEED, DeadlockError, GlobalPointer, SimulationError, launch
from tests.support.bulk_copy_kernels import begin
from tests.support.bulk_row_cases import (
    BULK_ROW_CASES,
    ROW,
    expected_draws,
    expected_sums,
    make_take_turns,
)
from tests.support.instruction_harness import run_simulated

SEEDS = range(12)
LOAD, TURNS, HANDED = BULK_ROW_CASES[0], BULK_ROW_CASES[1:-3], BULK_ROW_CASES[-3:-1]
DRAWN = BULK_ROW_CASES[-1]


def pointer(x):
    return GlobalPointer(x, x.dtype)


def run(kernel, *arrays, block=32, smem=4096):
    launch(kernel, 1, block, [pointer(x) for x in arrays], smem)


def test_loads_of_consecutive_bytes_end_a_phase_together(each_seed):
    (got,) = run_simulated(LOAD)
    x = LOAD.inputs[0][8:].view(np.uint32)
    assert (got == np.concatenate([x[ROW:], x[:ROW]])).all()


@pytest.mark.parametrize("case", TURNS, ids=str)
def test_rows_are_added_in_turn(case, each_seed):
    sums, turn = run_simulated(case)
    assert case.difference([expected_sums(*case.inputs)], [sums]) is None
    assert turn == 2


@pytest.mark.parametrize("case", HANDED, ids=str)
def test_what_was_released_is_seen(case, each_seed):
    y, turn = run_simulated(case)
    (x,) = case.inputs
    assert (y == np.concatenate([x, x[::-1]])).all() and turn == 5


def outcomes(without):
    """How the kernel of turns ends without something, by seed."""
    case, found = TURNS[0], []
    expected = expected_sums(*case.inputs)
    for seed in SEEDS:
        SEED.value = seed
        y, turn = np.full(ROW, np.nan, np.float32), np.zeros(1, np.uint32)
        try:
            run(make_take_turns((without,)), case.inputs[0], y, turn, block=64)
            found.append("right" if (y == expected).all() else "wrong")
        except (SimulationError, DeadlockError) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    "without, message",
    [
        ("fence", "without a fence_proxy_async of that thread"),
        ("global fence", "without a fence_proxy_async_global in between"),
        ("wait", "a cp_async_bulk_wait_group is missing"),
        ("release", "looks again and again at what nobody writes"),
    ],
)
def test_each_order_shows_what_is_missing(without, message):
    for found in outcomes(without):
        assert message in found


@pytest.mark.parametrize("without, shown", [("turn", "wrong"), ("early buffer", "changed after")])
def test_some_order_shows_what_is_missing(without, shown):
    assert any(shown in found for found in outcomes(without))


def test_each_thread_draws_a_number_of_its_own(each_seed):
    assert DRAWN.difference(expected_draws(*DRAWN.inputs), run_simulated(DRAWN)) is None


def test_a_release_needs_reductions_that_are_complete_and_not_only_read():
    def kernel(y, turn):
        smem, _ = begin()
        if cuda.threadIdx.x == 0:
            smem[0:4] = u32(0)
            cp_async_bulk_store(y, 0, smem, 0, u32(16))
            cp_async_bulk_commit_group()
            cp_async_bulk_wait_group_read()
            st_release_gpu_u32(turn, 0, u32(1))

    with pytest.raises(SimulationError, match="st_release_gpu_u32 of thread 0, whose bulk store"):
        run(kernel, np.zeros(4, np.float32), np.zeros(1, np.uint32))


def test_a_row_is_poison_until_it_is_waited_for(each_seed):
    seen = []

    def kernel(x):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            mbarrier_arrive_expect_tx(barriers, 0, 32)
            cp_async_bulk(smem, 4, x, 4, u32(32), barriers, 0)
            seen.append(smem[5])
            mbarrier_wait_parity(barriers, 0, 0)
            seen.append(smem[5:6].view(f32)[0])

    run(kernel, np.arange(12, dtype=np.float32))
    assert seen[1] == 5 and seen[0] in (0xFFFFFFFF, f32(5).view(u32))


@pytest.mark.parametrize(
    "word, element, n_bytes, message",
    [
        (2, 0, 32, "not a multiple of 16 bytes"),
        (0, 2, 32, "misaligned"),
        (0, 0, 24, "no multiple of 16"),
        (0, 4, 48, "lie outside the array"),
        (1020, 0, 32, "lie outside the block's shared memory"),
    ],
)
def test_what_a_copy_refuses(word, element, n_bytes, message):
    def kernel(x):
        smem, barriers = begin()
        if cuda.threadIdx.x == 0:
            mbarrier_arrive_expect_tx(barriers, 0, n_bytes)
            cp_async_bulk(smem, word, x, element, u32(n_bytes), barriers, 0)

    x = np.zeros(64, np.float32)
    aligned = x[-x.__array_interface__["data"][0] // 4 % 4 :][:12]
    with pytest.raises((SimulationError, ValueError, IndexError), match=message):
        run(kernel, aligned)


def test_who_waits_for_a_turn_lets_others_run(each_seed):
    """Loads arrive meanwhile, and threads that stand behind the one that waits go on."""

    def kernel(x, turn, y):
        smem, barriers = begin()
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_arrive_expect_tx(barriers, 0, 16)
            cp_async_bulk(smem, 0, x, 0, u32(16), barriers, 0)
        if t == 40:
            while ld_acquire_gpu_u32(turn, 0) != u32(1):
                pass
            y[0] = x[4]
        elif t < 32:
            mbarrier_wait_parity(barriers, 0, 0)
            cuda.syncwarp()
            if t == 7:
                st_release_gpu_u32(turn, 0, u32(1))

    y = np.zeros(1, np.float32)
    run(kernel, np.arange(16, dtype=np.float32), np.zeros(1, np.uint32), y, block=64)
    assert y == 4
