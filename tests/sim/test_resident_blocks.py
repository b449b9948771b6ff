"""Blocks that run together: turns that they take, and what mistakes in them show."""

import re

import numpy as np
import pytest

from numflash import ptx as instructions
from numflash.ptx import cuda, f32, i32, ld_acquire_gpu_u32, st_release_gpu_u32, u32
from numflash.runtime.views import Pointer
from numflash.simulator import SEED, DeadlockError, GlobalPointer, SimulationError, launch
from numflash.simulator.engine import current_thread
from numflash.simulator.resident import num_resident, talks
from tests.support.chain_kernels import CHAINS, SMEM_BYTES, THREADS, make_chain
from tests.support.covering import ALL

SEEDS = range(6 if ALL else 2)
# What is wrong -> what every order says, with any number of blocks.
ALWAYS = {
    "turn": r"block .* (adds to|writes) what block .* has written",
    "acquired late": "adds to what block",
    "global fence": "without a fence_proxy_async_global in between",
    "fence": "without a fence_proxy_async of that thread",
    "store": "wrong",
    "complete": "a cp_async_bulk_wait_group is missing",
    "released early": "a cp_async_bulk_wait_group is missing",
    "released by another early": r"(adds to|writes) what block",
    "release": "looks again and again at what nobody writes",
    "plain release": r"reads what block .* has written",
    "rank of a neighbour": "looks again and again at what nobody writes",
    "all ranks up": "looks again and again at what nobody writes",
}


def pointer(x):
    return GlobalPointer(x, x.dtype)


@pytest.fixture
def resident(monkeypatch):
    """A function that says how many blocks run together."""
    return lambda number: monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", str(number))


def outcome(name, without=""):
    """How a launch ends: "right", "wrong", or the text of an error."""
    chain = CHAINS[name]
    x, y, turns, steps = chain.arrays(without)
    args = [*map(pointer, (x, y, turns, steps)), chain.num_rows]
    kernel = make_chain(without)
    try:
        launch(kernel, chain.num_blocks, THREADS, args, SMEM_BYTES)
    except (SimulationError, DeadlockError) as error:
        return f"{type(error).__name__}: {error}"
    pairs = zip((y, turns), chain.expected(), strict=True)
    return "right" if all((x == y).all() for x, y in pairs) else "wrong"


def outcomes(name, without="", seeds=SEEDS):
    """How launches end, by seed."""
    for SEED.value in seeds:
        yield outcome(name, without)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("name", ["ascending", "falling"])
def test_turns_give_the_same_bits(name, number, resident):
    resident(number)
    assert all(found == "right" for found in outcomes(name))


@pytest.mark.parametrize("number", [3, 4, 6])
def test_groups_give_the_same_bits(number, resident):
    resident(number)
    assert all(found == "right" for found in outcomes("shifted"))


@pytest.mark.parametrize("number", [1, 2])
def test_groups_need_their_blocks(number, resident):
    resident(number)
    for found in outcomes("shifted"):
        assert found.startswith("DeadlockError")
        assert f"{number} are resident at a time (NUMFLASH_SIM_BLOCKS)" in found
        assert all(f"deadlock in block ({n}, 0, 0)" in found for n in range(number))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("without", ALWAYS)
def test_each_order_shows_what_is_wrong(without, number, resident):
    resident(number)
    for found in outcomes("ascending", without):
        assert re.search(ALWAYS[without], found)


@pytest.mark.parametrize("name", CHAINS)
def test_some_order_shows_a_buffer_that_is_given_back_early(name, resident):
    resident(3)
    found = outcomes(name, "read", range(8))
    assert any("changed after the store was issued" in text for text in found)


def test_a_deadlock_names_blocks_threads_and_seed(resident):
    resident(2)
    SEED.value = 7
    found = outcome("ascending", "release")
    for text in (
        "deadlock in block (1, 0, 0): 64 of 64 threads wait",
        "deadlock in block (2, 0, 0)",
        "3 blocks have not begun, the first is (3, 0, 0)",
        "NUMFLASH_SIM_SEED=7",
    ):
        assert text in found
    where = re.findall(r"memory that another thread, or block.*\n +threads 32 wait at (.*)", found)
    assert len(where) == 2 and all("chain_kernels.py" in line for line in where)


def test_two_threads_that_look_at_what_nobody_writes_are_a_deadlock(each_seed):
    def kernel(turn):
        if cuda.threadIdx.x in (0, 40):
            while ld_acquire_gpu_u32(turn, 0) != u32(1):
                pass

    with pytest.raises(DeadlockError, match=r"threads 0, 40 wait at"):
        launch(kernel, 1, 64, [pointer(np.zeros(1, np.uint32))])


def test_blocks_hand_a_number_to_and_fro(each_seed, resident):
    """Nothing but looks and releases, often: no deadlock."""
    resident(2)

    def kernel(turn):
        if cuda.threadIdx.x == 0:
            for i in range(300):
                mine = 2 * i + cuda.blockIdx.x
                while ld_acquire_gpu_u32(turn, 0) != u32(mine):
                    pass
                st_release_gpu_u32(turn, 0, u32(mine + 1))

    turn = np.zeros(1, np.uint32)
    launch(kernel, 2, 32, [pointer(turn)])
    assert turn == 600


# What a block sees of what others have written


def make_message(writes: str, reads: str):
    """Block 0 writes and releases, block 1 acquires and reads; each in the order that is named."""

    def message(x: Pointer(f32), turn: Pointer(u32), y: Pointer(f32)):
        if cuda.threadIdx.x != 0:
            return
        if cuda.blockIdx.x == 0:
            for action in writes.split():
                if action == "write":
                    x[3] = f32(5)
                elif action == "release":
                    st_release_gpu_u32(turn, 0, u32(1))
        else:
            for action in reads.split():
                if action == "acquire":
                    while ld_acquire_gpu_u32(turn, 0) != u32(1):
                        pass
                elif action == "look":
                    ld_acquire_gpu_u32(turn, 0)
                elif action == "read":
                    y[0] = x[3]
                elif action == "overwrite":
                    x[3] = f32(6)
                elif action == "plain":
                    y[0] = f32(turn[0])

    return message


def run_message(writes, reads):
    x, turn, y = np.zeros(8, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    launch(make_message(writes, reads), 2, 32, [pointer(x), pointer(turn), pointer(y)])
    return x[3], y[0]


@pytest.mark.parametrize("number", [1, 2])
def test_what_was_released_is_seen(number, each_seed, resident):
    resident(number)
    assert run_message("write release", "acquire read")[1] == 5
    assert run_message("write release", "acquire overwrite")[0] == 6
    run_message("release write", "acquire")
    run_message("write release", "look")


@pytest.mark.parametrize(
    "writes, reads",
    [
        ("release write", "acquire read"),
        ("release write", "acquire overwrite"),
        ("write release", "read acquire"),
        ("write release", "overwrite acquire"),
        ("write release", "plain acquire"),
    ],
)
def test_what_was_not_released_is_refused(writes, reads, resident):
    """Whichever comes first; at least where the write comes before the read."""
    resident(1)
    with pytest.raises(SimulationError, match=r"block \(1, 0, 0\) (reads|writes) what block"):
        run_message(writes, reads)
    resident(2)
    found = []
    for SEED.value in range(12):
        try:
            run_message(writes, reads)
        except SimulationError as error:
            found.append(str(error))
    assert found


def test_a_release_hands_on_what_its_block_has_acquired(each_seed, resident):
    resident(3)

    def kernel(x, turn, y):
        block = cuda.blockIdx.x
        if cuda.threadIdx.x == 0:
            if block:
                while ld_acquire_gpu_u32(turn, block - 1) != u32(1):
                    pass
            if block == 0:
                x[0] = f32(7)
            if block == 2:
                y[0] = x[0]
            st_release_gpu_u32(turn, block, u32(1))

    x, turn, y = np.zeros(1, np.float32), np.zeros(3, np.uint32), np.zeros(1, np.float32)
    launch(kernel, 3, 32, [pointer(x), pointer(turn), pointer(y)])
    assert y == 7


# Which kernels, and how many blocks


def test_kernels_that_talk_are_found():
    def wait(turn):
        return ld_acquire_gpu_u32(turn, 0)

    pair = (len, wait)

    def by_closure(turn):
        pair[1](turn)

    def by_module(turn):
        instructions.ld_acquire_gpu_u32(turn, 0)

    def silent(turn):
        cuda.syncthreads()

    generated = {"wait": wait}  # and without a module
    exec("def by_text(turn): wait(turn)", generated)
    found = make_chain(), by_closure, by_module, generated["by_text"]
    assert all(map(talks, found)) and not talks(silent)


def test_how_many_blocks_run_together(monkeypatch):
    drawn = {num_resident(True, 6, seed) for seed in range(40)}
    assert drawn == {1, 2, 3, 5, 6}
    assert {num_resident(False, 6, seed) for seed in range(9)} == {1}
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", "4")
    assert num_resident(False, 6, 0) == 4 and num_resident(True, 3, 0) == 3
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", "0")
    with pytest.raises(ValueError, match="NUMFLASH_SIM_BLOCKS must be an integer from 1 on"):
        num_resident(False, 6, 0)


def test_blocks_begin_in_order_and_as_many_as_there_is_room_for(each_seed, resident):
    resident(3)
    begun, ended = [], []

    def kernel(n: i32):
        block = cuda.blockIdx.x
        if cuda.threadIdx.x == 0:
            begun.append(block)
            assert len(ended) >= block - 2
            assert len(begun) - len(ended) <= 3
        for _ in range(n):
            cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            ended.append(block)

    launch(kernel, 9, 32, [4])
    assert sorted(begun) == sorted(ended) == list(range(9))


def test_another_block_s_failure_unwinds_all(each_seed, resident):
    resident(3)
    closed = []

    def kernel(turn):
        block = cuda.blockIdx.x
        try:
            if cuda.threadIdx.x == 0 and block == 2:
                raise ZeroDivisionError("wrong")
            cuda.syncthreads()
            while block != 2 and ld_acquire_gpu_u32(turn, 0) != u32(1):
                pass
        finally:
            closed.append(block)

    with pytest.raises(ZeroDivisionError, match="wrong") as caught:
        launch(kernel, 3, 32, [pointer(np.zeros(1, np.uint32))])
    assert any("of block (2, 0, 0)" in note for note in caught.value.__notes__)
    assert 2 in closed
    # The next launch begins anew.
    assert outcome("ascending") == "right"
    with pytest.raises(RuntimeError, match="inside a simulated kernel"):
        current_thread()
