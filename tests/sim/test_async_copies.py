"""Asynchronous copies in the simulator: what arrives when, and what a kernel that errs computes.

On hardware a copy may arrive any time after its issue; here it arrives at the wait, and the target
holds 0xFF bytes until then. What else writes there meanwhile is refused.
"""

import numpy as np
import pytest

from numflash.ptx import (
    CP_ASYNC_WAIT_GROUP,
    cp_async_4,
    cp_async_16,
    cp_async_commit_group,
    cuda,
    st_shared_u32,
    u16,
    u32,
)
from numflash.simulator import SEED, GlobalPointer, SimulationError, launch
from tests.support.async_copy_cases import ASYNC_COPY_CASES
from tests.support.instruction_harness import run_simulated

POISON = 0xFFFFFFFF
COPIES = {"cp_async_16": (cp_async_16, 4), "cp_async_4": (cp_async_4, 1)}


def pointer(array, name="x"):
    return GlobalPointer(array, array.dtype, name)


def aligned(n, dtype=u32):
    """1 to n, at an address that 16 divides."""
    itemsize = np.dtype(dtype).itemsize
    whole = np.zeros(n * itemsize + 16, np.uint8)
    start = -whole.__array_interface__["data"][0] % 16
    array = whole[start : start + n * itemsize].view(dtype)
    array[:] = np.arange(1, n + 1)
    return array


def run(kernel, x, n_out, block=1, smem_bytes=1024):
    out = np.zeros(n_out, u32)
    launch(kernel, 1, block, [pointer(x), pointer(out, "out")], smem_bytes)
    return out


# The cases


def expected_copies(x, n_words):
    """Vectors backwards; where the thread that copied is the third of three, zeros."""
    vectors = x.view(u32).reshape(-1, n_words).copy()
    vectors[2::3] = 0
    return vectors[::-1].ravel()


def expected_groups(x):
    return np.concatenate([x[:256][::-1], x[::-1]])


EXPECTED = {
    "cp_async_16": lambda x: expected_copies(x, 4),
    "cp_async_4": lambda x: expected_copies(x, 1),
    "cp_async_commit_group": lambda x: x[::-1],
    **{
        f"cp_async_wait_group_{pending}": expected_groups
        for pending in range(len(CP_ASYNC_WAIT_GROUP))
    },
}


@pytest.mark.parametrize("case", ASYNC_COPY_CASES, ids=str)
def test_a_case_gives_what_is_expected(case, each_seed):
    (got,) = run_simulated(case)
    assert case.difference([EXPECTED[case.instruction](*case.inputs)], [got]) is None


# When a copy arrives


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_arrives_with_the_wait_for_its_group(name):
    instruction, n = COPIES[name]

    def kernel(x, out):
        smem = cuda.shared.array(n, u32)
        smem[0] = u32(5)
        out[0] = smem[0]
        instruction(smem, 0, x, n, 4 * n)
        out[1] = smem[0]
        CP_ASYNC_WAIT_GROUP[0]()
        out[2] = smem[0]  # of no group yet
        cp_async_commit_group()
        out[3] = smem[0]
        CP_ASYNC_WAIT_GROUP[1]()
        out[4] = smem[0]
        CP_ASYNC_WAIT_GROUP[0]()
        for i in range(n):
            out[5 + i] = smem[i]

    x = aligned(2 * n)
    got = run(kernel, x, 5 + n).tolist()
    assert got == [5, POISON, POISON, POISON, POISON, *x[n:]]


@pytest.mark.parametrize("issued", range(6))
@pytest.mark.parametrize("pending", range(len(CP_ASYNC_WAIT_GROUP)))
def test_a_wait_leaves_the_newest_groups_out(issued, pending):
    def kernel(x, out):
        smem = cuda.shared.array(6, u32)
        for group in range(issued):
            cp_async_4(smem, group, x, group, 4)
            cp_async_commit_group()
        CP_ASYNC_WAIT_GROUP[pending]()
        for i in range(6):
            out[i] = smem[i]
        # A second wait for as many brings nothing more.
        CP_ASYNC_WAIT_GROUP[pending]()
        for i in range(6):
            out[6 + i] = smem[i]
        CP_ASYNC_WAIT_GROUP[0]()

    arrived = max(0, issued - pending)
    expected = [*range(1, arrived + 1), *[POISON] * (6 - arrived)]
    assert run(kernel, aligned(6), 12).tolist() == expected * 2


def test_a_group_without_copies_counts():
    def kernel(x, out):
        smem = cuda.shared.array(1, u32)
        cp_async_4(smem, 0, x, 0, 4)
        cp_async_commit_group()
        cp_async_commit_group()
        CP_ASYNC_WAIT_GROUP[2]()
        out[0] = smem[0]
        CP_ASYNC_WAIT_GROUP[1]()
        out[1] = smem[0]

    assert run(kernel, aligned(1), 2).tolist() == [POISON, 1]


def test_a_copy_arrives_once():
    def kernel(x, out):
        smem = cuda.shared.array(1, u32)
        cp_async_4(smem, 0, x, 0, 4)
        cp_async_commit_group()
        CP_ASYNC_WAIT_GROUP[0]()
        smem[0] = u32(5)
        CP_ASYNC_WAIT_GROUP[0]()
        out[0] = smem[0]

    assert run(kernel, aligned(1), 1).tolist() == [5]


def test_a_thread_waits_for_its_own_copies_only():
    def kernel(x, out):
        smem = cuda.shared.array(64, u32)
        t = cuda.threadIdx.x
        cp_async_4(smem, t, x, t, 4)
        cp_async_commit_group()
        cuda.syncthreads()
        if t % 2:
            CP_ASYNC_WAIT_GROUP[0]()
        cuda.syncthreads()
        out[t] = smem[t]
        CP_ASYNC_WAIT_GROUP[0]()

    got = run(kernel, aligned(64), 64, block=64)
    assert (got[1::2] == np.arange(2, 65, 2)).all() and (got[::2] == POISON).all()


# Zero fill


@pytest.mark.parametrize("name", COPIES)
def test_zero_bytes_give_zeros_later_and_no_read(name):
    instruction, n = COPIES[name]

    def kernel(x, out):
        smem = cuda.shared.array(n, u32)
        # Out of range, and for 16 bytes misaligned.
        instruction(smem, 0, x, 2**40 + 1, 0)
        cp_async_commit_group()
        out[0] = smem[0]
        CP_ASYNC_WAIT_GROUP[0]()
        for i in range(n):
            out[1 + i] = smem[i]

    assert run(kernel, aligned(4), 1 + n).tolist() == [POISON, *[0] * n]


# Kernels that err


def exchange(waits, meets):
    """Every thread copies a vector and reads that of its neighbour."""

    def kernel(x, out):
        smem = cuda.shared.array(0, u32)
        t = cuda.threadIdx.x
        cp_async_16(smem, 4 * t, x, 4 * t, 16)
        cp_async_commit_group()
        if waits:
            CP_ASYNC_WAIT_GROUP[0]()
        if meets:
            cuda.syncthreads()
        out[t] = smem[4 * (63 - t)]
        cuda.syncthreads()
        CP_ASYNC_WAIT_GROUP[0]()

    return kernel


def test_a_kernel_that_does_not_wait_reads_poison(each_seed):
    x = aligned(256)
    assert (run(exchange(True, True), x, 64, block=64) == x[::4][::-1]).all()
    assert (run(exchange(False, True), x, 64, block=64) == POISON).all()


def test_a_kernel_without_the_barrier_after_the_wait_shows():
    x = aligned(256)
    before = SEED.value
    try:
        for SEED.value in range(5):
            got = run(exchange(True, False), x, 64, block=64)
            wrong = got != x[::4][::-1]
            assert wrong.any() and (got[wrong] == POISON).all()
    finally:
        SEED.value = before


def test_a_copy_over_what_others_still_read_shows(each_seed):
    """A ring of one stage without the barrier between reading and the next copy."""

    def kernel(x, out):
        smem = cuda.shared.array(0, u32)
        t = cuda.threadIdx.x
        for step in range(3):
            cp_async_4(smem, t, x, 64 * step + t, 4)
            cp_async_commit_group()
            CP_ASYNC_WAIT_GROUP[0]()
            cuda.syncthreads()
            out[64 * step + t] = smem[63 - t]

    x = aligned(192)
    got = run(kernel, x, 192, block=64)
    assert (got != x.reshape(3, 64)[:, ::-1].ravel()).any()


# What is refused


@pytest.mark.parametrize("committed", [False, True])
def test_two_copies_of_a_thread_to_the_same_bytes_are_refused(committed, each_seed):
    def kernel(x, out, waits):
        smem = cuda.shared.array(0, u32)
        t = cuda.threadIdx.x
        cp_async_16(smem, 4 * t, x, 4 * t, 16)
        if committed or waits:
            cp_async_commit_group()
        if waits:
            CP_ASYNC_WAIT_GROUP[0]()
        cp_async_4(smem, 4 * t + 3, x, 0, 0)
        cp_async_commit_group()
        CP_ASYNC_WAIT_GROUP[0]()
        out[t] = smem[4 * t + 3]

    def with_waits(waits):
        return run(lambda x, out: kernel(x, out, waits), aligned(256), 64, block=64)

    assert (with_waits(True) == 0).all()
    second, first = f"group {int(committed)}, to shared", "group 0, to shared"
    message = rf"thread (\d+), in its {second} .* is issued while .* thread \1, in its {first}"
    with pytest.raises(SimulationError, match=message):
        with_waits(False)


def test_copies_of_two_threads_to_the_same_bytes_are_refused():
    """Thread 1 copies over what thread 0 has copied: behind its wait and a barrier, or not."""

    def kernel(x, out, waits, meets):
        smem = cuda.shared.array(0, u32)
        t = cuda.threadIdx.x
        for turn in range(2):
            if t == turn:
                cp_async_4(smem, 0, x, turn, 4)
                cp_async_commit_group()
                if waits:
                    CP_ASYNC_WAIT_GROUP[0]()
            if meets:
                cuda.syncthreads()
        CP_ASYNC_WAIT_GROUP[0]()
        out[0] = smem[0]

    def run_with(seed, *about):
        SEED.value = seed
        run(lambda x, out: kernel(x, out, *about), aligned(2), 1, block=2)

    for seed in range(4):
        run_with(seed, True, True)
        with pytest.raises(SimulationError, match=r"thread 1, .* while .* thread 0, .* under way"):
            run_with(seed, False, True)


@pytest.mark.parametrize("store", ["element", "instruction", "other thread"])
def test_a_store_to_bytes_of_a_copy_under_way_is_refused(store, each_seed):
    def kernel(x, out):
        smem = cuda.shared.array(0, u32)
        t = cuda.threadIdx.x
        if t == 0:
            cp_async_16(smem, 0, x, 0, 16)
            cp_async_commit_group()
        cuda.syncthreads()
        if t == (store == "other thread"):
            if store == "instruction":
                st_shared_u32(smem, 2, u32(7))
            else:
                smem[2] = u32(7)
        cuda.syncthreads()
        CP_ASYNC_WAIT_GROUP[0]()

    with pytest.raises(SimulationError, match=r"thread 0, .* was also written by something else"):
        run(kernel, aligned(4), 1, block=2)


@pytest.mark.parametrize("commits", [False, True])
def test_a_copy_that_nobody_waits_for_is_refused(commits):
    def kernel(x, out):
        cp_async_16(cuda.shared.array(0, u32), 4, x, 0, 16)
        if commits:
            cp_async_commit_group()
            CP_ASYNC_WAIT_GROUP[1]()
        else:
            CP_ASYNC_WAIT_GROUP[0]()

    with pytest.raises(SimulationError, match=r"ended and a cp.async of thread 0, .* not been w"):
        run(kernel, aligned(4), 1)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_lies_inside_its_arrays(name):
    instruction, n = COPIES[name]

    def copy(target, source, n_bytes=4 * n):
        def kernel(x, out):
            instruction(cuda.shared.array(0, u32), target, x, source, n_bytes)
            cp_async_commit_group()
            CP_ASYNC_WAIT_GROUP[0]()

        run(kernel, aligned(3 * n), 1, smem_bytes=8 * n)

    for target, source in [(0, 0), (n, n), (n, 2 * n), (np.int32(n), np.int64(n))]:
        copy(target, source)
    for target in (-n, 2 * n, 2**40):
        for n_bytes in (0, 4 * n):
            with pytest.raises(IndexError, match=f"shared memory: word {target} of {2 * n}"):
                copy(target, 0, n_bytes)
    for source in (-n, -1, 3 * n, 2**40):
        text = f"x: elements {source} to {source + n - 1} lie outside"
        with pytest.raises(IndexError, match=text):
            copy(0, source)
    for n_bytes in (-4, -1, 4 * n + 1, 32):
        text = f"cp.async: {n_bytes} bytes of the source to {4 * n} of the target"
        with pytest.raises(ValueError, match=text):
            copy(0, 0, n_bytes)


def test_sixteen_bytes_lie_at_multiples_of_sixteen():
    def copy(target, source, x=None):
        def kernel(x, out):
            cp_async_16(cuda.shared.array(0, u32), target, x, source, 16)
            cp_async_commit_group()
            CP_ASYNC_WAIT_GROUP[0]()

        run(kernel, aligned(16) if x is None else x, 1)

    for target in (1, 2, 3, 5, -1):
        with pytest.raises(ValueError, match=f"word {target} is not a multiple of 16 bytes"):
            copy(target, 0)
    for source in (1, 2, 3, 5):
        with pytest.raises(ValueError, match=f"16-byte access at element {source} is misaligned"):
            copy(0, source)
    copy(0, 8, aligned(16, u16))
    with pytest.raises(ValueError, match="16-byte access at element 4 is misaligned"):
        copy(0, 4, aligned(16, u16))
