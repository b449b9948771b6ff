"""mbarriers in the simulator: phases, what is refused, and what a deadlock's message says."""

import numpy as np
import pytest

from numflash.ptx import (
    bar_sync,
    cuda,
    fence_mbarrier_init,
    make_setmaxnreg,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_shared_address,
    st_shared_u32,
    u32,
    u64,
)
from numflash.simulator import SEED, DeadlockError, GlobalPointer, SimulationError, launch
from tests.support.instruction_harness import THREADS, run_simulated
from tests.support.mbarrier_cases import MBARRIER_CASES


def backwards_in_warps(x):
    return x.reshape(-1, 32)[:, ::-1].ravel()


def expected_matrices(x, rows):
    """Row rows[8 m + g] is word t of every lane 4 g + t's fragment m, of each warp."""
    smem = np.empty((THREADS, 4), np.uint32)
    frag = x.reshape(2, 32, 4)
    for warp in range(2):
        for lane in range(32):
            for m in range(4):
                smem[rows[32 * warp + 8 * m + lane // 4], lane % 4] = frag[warp, lane, m]
    return smem.ravel()


def expected_transposed(x, rows):
    """Half t % 2 of word t // 2 of a row comes from lane 4 g + t's fragment m, for column g."""
    smem = np.empty((THREADS, 8), np.uint16)
    halves = x.view(np.uint16).reshape(2, 32, 4, 2)
    for warp in range(2):
        for lane in range(32):
            for m in range(4):
                for h in range(2):
                    row = rows[32 * warp + 8 * m + 2 * (lane % 4) + h]
                    smem[row, lane // 4] = halves[warp, lane, m, h]
    return smem.view(np.uint32).ravel()


EXPECTED = {
    "mbarrier_init": backwards_in_warps,
    "mbarrier_arrive": backwards_in_warps,
    "mbarrier_wait_parity": backwards_in_warps,
    "mbarrier_arrive_expect_tx": backwards_in_warps,
    "fence_mbarrier_init": backwards_in_warps,
    "elect_sync": lambda x: np.ones(4, np.uint32),
    "mov_shared_address": lambda x: np.stack([4 * x, 0 * x], axis=1).ravel(),
    "stmatrix_x4": expected_matrices,
    "stmatrix_x4_trans": expected_transposed,
    "mov_nctaid_x": lambda x: x,
    "setmaxnreg_dec_24": lambda x: x[::-1],
    "setmaxnreg_inc_240": lambda x: x[::-1],
}


@pytest.mark.parametrize("case", MBARRIER_CASES, ids=str)
def test_a_case_gives_what_is_expected(case, each_seed):
    (got,) = run_simulated(case)
    assert case.difference([EXPECTED[case.instruction](*case.inputs)], [got]) is None


def run(kernel, *args, block=32, smem=0):
    launch(kernel, 1, block, args, smem)
    return args[0] if args else None


def refused(kernel, message, block=32):
    with pytest.raises(SimulationError, match=message):
        run(kernel, block=block)


# Phases


def test_a_phase_ends_with_the_last_arrival_and_not_before(each_seed):
    def kernel(came, seen):
        barriers = cuda.shared.array(1, u64)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barriers, 0, 63)
        cuda.syncthreads()
        if t < 63:
            came.append(t)
            mbarrier_arrive(barriers, 0)
        else:
            mbarrier_wait_parity(barriers, 0, 0)
            seen.append(len(came))

    came, seen = [], []
    run(kernel, came, seen, block=64)
    assert seen == [63]


def test_waiting_for_parity_1_passes_at_a_new_barrier():
    def kernel(seen):
        barriers = cuda.shared.array(1, u64)
        mbarrier_init(barriers, 0, 1)
        mbarrier_wait_parity(barriers, 0, 1)
        for phase in range(5):
            mbarrier_arrive(barriers, 0)
            mbarrier_wait_parity(barriers, 0, phase % 2)
            seen.append(phase)

    assert run(kernel, [], block=1) == list(range(5))


def test_a_phase_two_behind_looks_like_one_that_has_not_ended():
    def kernel():
        barriers = cuda.shared.array(1, u64)
        mbarrier_init(barriers, 0, 1)
        mbarrier_arrive(barriers, 0)
        mbarrier_arrive(barriers, 0)
        mbarrier_wait_parity(barriers, 0, 0)

    with pytest.raises(DeadlockError, match="phase 2 "):
        run(kernel, block=1)


def test_a_wait_that_sleeps_through_two_phases_goes_on_waiting(monkeypatch):
    """It is woken by the first, and looks only after the second."""

    def kernel(order, arrivals):
        barriers = cuda.shared.array(1, u64)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barriers, 0, 1)
        cuda.syncthreads()
        if t == 0:
            order.append("arrives")
            for _ in range(arrivals):
                mbarrier_arrive(barriers, 0)
        elif t == 32:
            order.append("waits")
            mbarrier_wait_parity(barriers, 0, 0)

    waited_first = 0
    for seed in range(20):
        monkeypatch.setattr(SEED, "value", seed)
        run(kernel, order := [], 1, block=64)
        waited_first += order == ["waits", "arrives"]
        with pytest.raises(DeadlockError, match="phase 2 "):
            run(kernel, [], 2, block=64)
    assert waited_first


def _ring(full_parity, empty_parity, releases=True):
    """Warp 0 hands 6 chunks to warp 1; the parities of a step may be wrong."""

    def kernel(x, y):
        ring = cuda.shared.array(64, u32)
        barriers = cuda.shared.array(4, u64)
        t, lane = cuda.threadIdx.x, cuda.threadIdx.x % 32
        if t == 0:
            for i in range(4):
                mbarrier_init(barriers, i, 32)
        cuda.syncthreads()
        for step in range(6):
            stage = step % 2
            if t < 32:
                mbarrier_wait_parity(barriers, 2 + stage, empty_parity(step))
                ring[32 * stage + lane] = x[32 * step + lane]
                mbarrier_arrive(barriers, stage)
            else:
                mbarrier_wait_parity(barriers, stage, full_parity(step))
                y[32 * step + lane] = ring[32 * stage + 31 - lane]
                if releases:
                    mbarrier_arrive(barriers, 2 + stage)

    return kernel


def _ring_outcomes(kernel, monkeypatch):
    x = np.arange(1, 193, dtype=np.uint32)
    outcomes = set()
    for seed in range(8):
        monkeypatch.setattr(SEED, "value", seed)
        y = np.zeros(192, np.uint32)
        try:
            run(kernel, GlobalPointer(x, x.dtype), GlobalPointer(y, y.dtype), block=64)
            outcomes.add("right" if (y == backwards_in_warps(x)).all() else "wrong")
        except (DeadlockError, SimulationError) as error:
            outcomes.add(type(error).__name__)
    return outcomes


def right(step):
    return step // 2 % 2


def inverse(step):
    return 1 - step // 2 % 2


def test_a_ring_with_the_right_parities_works(monkeypatch):
    assert _ring_outcomes(_ring(right, inverse), monkeypatch) == {"right"}


@pytest.mark.parametrize(
    "kernel",
    [
        _ring(inverse, inverse),
        _ring(right, right),
        _ring(lambda step: 0, inverse),
        _ring(right, lambda step: 1),
        _ring(right, inverse, releases=False),
    ],
    ids=["full inverted", "empty inverted", "full constant", "empty constant", "no release"],
)
def test_a_ring_with_a_wrong_parity_is_found_out(kernel, monkeypatch):
    assert _ring_outcomes(kernel, monkeypatch) - {"right"}


# What is refused


def test_a_barrier_must_be_initialised():
    def kernel():
        mbarrier_arrive(cuda.shared.array(1, u64), 0)

    refused(kernel, "mbarrier_init has not made it one", block=1)


def test_a_barrier_is_initialised_once_with_a_count_there_is():
    def twice():
        barriers = cuda.shared.array(1, u64)
        mbarrier_init(barriers, 0, 1)
        mbarrier_init(barriers, 0, 1)

    def of_nobody():
        mbarrier_init(cuda.shared.array(1, u64), 0, 0)

    refused(twice, "initialised twice", block=1)
    refused(of_nobody, "a count of 0", block=1)


def test_a_barrier_lies_in_shared_memory_and_aligned():
    def local():
        mbarrier_init(cuda.local.array(1, u64), 0, 1)

    def crooked():
        mbarrier_init(cuda.shared.array(4, u32), 1, 1)

    refused(local, "not in shared memory", block=1)
    refused(crooked, "not a multiple of 8", block=1)


def test_more_arrivals_than_the_count_are_refused():
    def kernel():
        barriers = cuda.shared.array(1, u64)
        mbarrier_init(barriers, 0, 1)
        mbarrier_arrive_expect_tx(barriers, 0, 16)
        mbarrier_arrive(barriers, 0)

    refused(kernel, "one arrival more than its count of 1 in phase 0.* 16 bytes", block=1)


def test_whoever_writes_over_a_barrier_is_found_out():
    def kernel():
        barriers = cuda.shared.array(2, u64)
        mbarrier_init(barriers, 0, 1)
        barriers[0] = u64(0)
        mbarrier_arrive(barriers, 0)

    refused(kernel, "have been written over", block=1)


def test_a_parity_is_0_or_1():
    def kernel():
        barriers = cuda.shared.array(1, u64)
        mbarrier_init(barriers, 0, 1)
        mbarrier_wait_parity(barriers, 0, 2)

    refused(kernel, "a parity of 2", block=1)


# Deadlocks


def test_a_deadlock_names_the_barrier_its_phase_and_who_waits():
    def kernel():
        barriers = cuda.shared.array(3, u64)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barriers, 2, 3)
            fence_mbarrier_init()
        cuda.syncthreads()
        if t == 0:
            mbarrier_arrive_expect_tx(barriers, 2, 4096)
        mbarrier_wait_parity(barriers, 2, 0)

    with pytest.raises(DeadlockError) as caught:
        run(kernel, block=64)
    message = str(caught.value)
    assert "64 of 64 threads wait" in message
    assert "mbarrier 2 (shared address 0x" in message
    assert "phase 0 (parity 0) lacks 2 of 3 arrivals and 4096 bytes" in message
    assert "threads 0-63 wait at" in message and "test_mbarriers.py" in message


def test_a_deadlock_of_registers_says_how_many_are_free():
    take = make_setmaxnreg("inc", 240)

    def kernel():
        if cuda.threadIdx.x < 128:
            take()
        else:
            bar_sync(1, 256)

    with pytest.raises(DeadlockError, match=r"warp 0 has 168 registers a thread, 0 are free"):
        run(kernel, block=384)


# Registers and addresses


def test_registers_are_taken_when_others_have_given_them(each_seed):
    give, take = make_setmaxnreg("dec", 24), make_setmaxnreg("inc", 240)

    def kernel(order):
        if cuda.threadIdx.x < 128:
            order.append("gives")
            give()
        else:
            take()
            order.append("has")

    order = run(kernel, [], block=384)
    assert (order.count("gives"), order.count("has")) == (128, 256)
    # The registers that a warp gives, 144 a thread, are enough for two that take 72.
    for i in range(384):
        assert 72 * order[: i + 1].count("has") <= 144 * order[: i + 1].count("gives")


def test_more_registers_than_there_are_are_never_had():
    give, take = make_setmaxnreg("dec", 32), make_setmaxnreg("inc", 240)

    def kernel():
        if cuda.threadIdx.x < 128:
            give()
        else:
            take()

    with pytest.raises(DeadlockError, match=r"setmaxnreg.inc 240"):
        run(kernel, block=384)


@pytest.mark.parametrize(("blocks_per_sm", "registers"), [(1, 256), (2, 128)])
def test_blocks_of_an_sm_share_its_registers(blocks_per_sm, registers):
    change = make_setmaxnreg("dec", 256) if registers < 256 else make_setmaxnreg("inc", 248)
    with pytest.raises(SimulationError, match=f"has {registers} registers"):
        launch(lambda: change(), 1, 256, (), 0, blocks_per_sm)


@pytest.mark.parametrize(("action", "registers"), [("inc", 24), ("dec", 240)])
def test_registers_go_the_way_the_name_says(action, registers):
    change = make_setmaxnreg(action, registers)
    with pytest.raises(SimulationError, match="has 168 registers"):
        run(lambda: change(), block=384)


def test_registers_belong_to_whole_warpgroups():
    give = make_setmaxnreg("dec", 24)

    def one_warp():
        if cuda.threadIdx.x < 32:
            give()

    with pytest.raises(SimulationError, match=r"warp 1 has not executed setmaxnreg.dec\(0x18\)"):
        run(one_warp, block=128)
    with pytest.raises(SimulationError, match="fewer than four warps"):
        run(lambda: give(), block=96)


@pytest.mark.parametrize("registers", [16, 20, 264])
def test_setmaxnreg_knows_its_numbers(registers):
    with pytest.raises(ValueError, match="a multiple of 8 from 24 to 256"):
        make_setmaxnreg("inc", registers)


def test_addresses_are_those_of_one_shared_memory():
    def kernel(out):
        dynamic = cuda.shared.array(0, u32)
        a, b = cuda.shared.array(5, u32), cuda.shared.array(3, u64)
        out += [mov_shared_address(dynamic, i) for i in (0, 3)]
        out += [mov_shared_address(a, 0), mov_shared_address(a, 5), mov_shared_address(b, 0)]

    first, fourth, a, a_end, b = run(kernel, [], block=1, smem=100)
    assert first == 1024 and fourth == first + 12
    assert first + 100 <= a and a_end == a + 20 <= b and a % 16 == b % 16 == 0


def test_an_address_is_of_an_element_in_shared_memory():
    def local():
        mov_shared_address(cuda.local.array(4, u32), 0)

    def behind():
        mov_shared_address(cuda.shared.array(4, u32), 5)

    def negative():
        mov_shared_address(cuda.shared.array(4, u32), -1)

    refused(local, "not in shared memory", block=1)
    for kernel in (behind, negative):
        with pytest.raises(IndexError, match="of 4"):
            run(kernel, block=1)


def test_arrays_of_fixed_size_have_48_kilobytes():
    def kernel():
        cuda.shared.array(12 * 1024, u32)
        st_shared_u32(cuda.shared.array(1, u32), 0, u32(1))

    refused(kernel, "more than 49152 bytes", block=1)
