"""The block engine: threads, barriers, their order, and what it says when a kernel fails.

Every test is a small kernel whose result is known without the engine. What depends on the order of
threads runs for several seeds.
"""

import gc
import inspect
import re
import threading
import warnings
import weakref

import numpy as np
import pytest
from greenlet import getcurrent
from numba import cuda as numba_cuda

from numflash.ptx import (
    bar_arrive,
    bar_sync,
    cuda,
    f32,
    i32,
)
from numflash.simulator import SEED, DeadlockError, SimulationError, launch
from numflash.simulator.engine import current_thread

SEEDS = range(5)
FULL = 0xFFFFFFFF
LANES = np.arange(32)
# One warp, a part of one, several, and several with a part.
BLOCK_SIZES = (1, 31, 32, 33, 64, 70, 128)


def run(kernel, *args, grid=1, block=32, smem=0):
    """Launch and return the first argument, the kernel's output."""
    launch(kernel, grid, block, args, smem)
    return args[0] if args else None


def line_of(function, text: str) -> int:
    """The line in this file on which `text` stands, inside `function`."""
    source, first = inspect.getsourcelines(function)
    (offset,) = [i for i, line in enumerate(source) if text in line]
    return first + offset


# Threads and blocks


def test_threads_and_blocks_are_numbered_x_fastest():
    def kernel(out):
        t, b = cuda.threadIdx, cuda.blockIdx
        thread = current_thread()
        out[b.z, b.y, b.x, t.z, t.y, t.x] = (thread.index, thread.warp, thread.lane, cuda.laneid)

    out = np.full((2, 3, 2, 5, 4, 3, 4), -1)
    run(kernel, out, grid=(2, 3, 2), block=(3, 4, 5))
    index = np.arange(60).reshape(5, 4, 3)
    expected = np.stack([index, index // 32, index % 32, index % 32], axis=-1)
    assert (out == expected).all()


def test_extents_and_grid_positions_are_those_of_the_launch():
    def kernel(out, extents):
        x, y, z = cuda.grid(3)
        assert cuda.grid(1) == x and cuda.grid(2) == (x, y)
        out[z, y, x] += 1
        extents[:] = [*cuda.gridDim, *cuda.blockDim, *cuda.gridsize(3)]

    out, extents = np.zeros((2, 6, 12), int), np.zeros(9, int)
    run(kernel, out, extents, grid=(3, 2), block=(4, 3, 2))
    assert (out == 1).all()
    assert extents.tolist() == [3, 2, 1, 4, 3, 2, 12, 6, 2]


@pytest.mark.parametrize("extent", [5, (5,), [5], np.int64(5), (np.int32(5), 1)], ids=repr)
def test_extents_may_be_a_number_or_a_sequence(extent):
    def kernel(out):
        out[cuda.blockIdx.x, cuda.threadIdx.x] = 1

    assert run(kernel, np.zeros((5, 5)), grid=extent, block=extent).all()


# Barriers of the block


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_syncthreads_lets_everyone_see_what_was_written_before(each_seed, size):
    def kernel(out):
        tile = cuda.shared.array(size, i32)
        t = cuda.threadIdx.x
        for step in range(4):
            tile[t] = t + 1000 * step
            cuda.syncthreads()
            out[step, t] = tile[size - 1 - t]
            cuda.syncthreads()

    out = run(kernel, np.zeros((4, size), np.int32), block=size)
    assert (out == np.arange(size)[::-1] + 1000 * np.arange(4)[:, None]).all()


@pytest.mark.parametrize("block", [(70,), (7, 5, 2)], ids=str)
def test_syncthreads_reductions_reach_every_thread(each_seed, block):
    def kernel(out, predicates):
        t = current_thread().index
        for row in range(len(predicates)):
            mine = predicates[row, t]
            out[row, t, 0] = cuda.syncthreads_count(mine)
            out[row, t, 1] = cuda.syncthreads_and(mine)
            out[row, t, 2] = cuda.syncthreads_or(mine)

    predicates = np.zeros((4, 70), np.int32)
    predicates[1, 69], predicates[2, :69], predicates[3] = 5, -1, 1
    out = run(kernel, np.full((4, 70, 3), -1), predicates, block=block)
    assert (out == np.array([[0, 0, 0], [1, 0, 1], [69, 0, 1], [70, 1, 1]])[:, None]).all()


def test_barriers_do_not_wait_for_threads_that_returned(each_seed):
    def kernel(out):
        tile = cuda.shared.array(64, i32)
        t = cuda.threadIdx.x
        if t >= 40:
            return
        tile[t] = t
        cuda.syncthreads()
        out[t, 0] = tile[39 - t]
        if t >= 20:
            return
        out[t, 1] = cuda.syncthreads_count(t % 2)

    out = run(kernel, np.full((64, 2), -1), block=64)
    assert (out[:40, 0] == np.arange(40)[::-1]).all() and (out[40:] == -1).all()
    assert (out[:20, 1] == 10).all()


def test_divergent_barriers_are_a_deadlock():
    def kernel():
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()
        else:
            cuda.syncthreads_count(1)

    with pytest.raises(DeadlockError):
        run(kernel, block=64)


# Named barriers


def produce_and_consume(out, num_steps):
    """Warp 0 fills a ring of two tiles, warps 1 and 2 empty it."""
    tiles = cuda.shared.array((2, 32), i32)
    t, lane = cuda.threadIdx.x, cuda.threadIdx.x % 32
    for step in range(num_steps):
        stage = step % 2
        full, empty = 1 + stage, 3 + stage
        if t < 32:
            if step >= 2:
                bar_sync(empty, 96)
            tiles[stage, lane] = 100 * step + lane
            bar_arrive(full, 96)
        else:
            bar_sync(full, 96)
            out[step, t - 32] = tiles[stage, 31 - lane]
            if step < num_steps - 2:
                bar_arrive(empty, 96)


def test_named_barriers_hand_over_a_ring_of_tiles(each_seed):
    out = run(produce_and_consume, np.zeros((7, 64), int), 7, block=96)
    expected = 100 * np.arange(7)[:, None] + LANES[::-1]
    assert (out == np.concatenate([expected, expected], axis=1)).all()


def test_bar_sync_waits_for_its_own_warps_only(each_seed):
    def kernel(out):
        tile = cuda.shared.array(96, i32)
        t = cuda.threadIdx.x
        if t < 64:
            for step in range(3):
                tile[t] = step
                bar_sync(5, 64)
                assert tile[63 - t] == step
                bar_sync(5, 64)
        out[t] = 1

    assert run(kernel, np.zeros(96), block=96).all()


def test_bar_arrive_does_not_wait():
    def kernel(out):
        bar_arrive(1, 64)
        out[cuda.threadIdx.x] = 1

    assert run(kernel, np.zeros(32)).all()


def test_threads_that_count_differently_at_a_named_barrier_are_an_error(each_seed):
    def kernel():
        bar_sync(2, 64 if cuda.threadIdx.x < 32 else 96)

    with pytest.raises(SimulationError, match="named barrier 2: one thread counts"):
        run(kernel, block=96)


@pytest.mark.parametrize(
    ("barrier", "count"), [(16, 32), (-1, 32), (1, 33), (1, 0), (1, -32), (1, 1056)]
)
@pytest.mark.parametrize("operation", [bar_sync, bar_arrive], ids=lambda f: f.__name__)
def test_impossible_named_barriers_are_refused(operation, barrier, count):
    def kernel():
        operation(barrier, count)

    with pytest.raises(SimulationError, match=f"named barrier {barrier} with {count} threads"):
        run(kernel)


# The order of threads


def order_of_passing(seed, monkeypatch, grid=1):
    """In which order 64 threads pass the start, a barrier and a shuffle."""
    monkeypatch.setattr(SEED, "value", seed)
    orders = {}

    def kernel():
        block, t = cuda.blockIdx.x, cuda.threadIdx.x
        orders.setdefault((block, "start"), []).append(t)
        cuda.syncthreads()
        orders.setdefault((block, "barrier"), []).append(t)
        cuda.shfl_xor_sync(FULL, t, 1)
        orders.setdefault((block, "shuffle"), []).append(t)

    run(kernel, grid=grid, block=64)
    return orders


def test_the_same_seed_gives_the_same_order(monkeypatch):
    first = order_of_passing(7, monkeypatch, grid=2)
    assert order_of_passing(7, monkeypatch, grid=2) == first


def test_seeds_blocks_and_barriers_give_different_orders(monkeypatch):
    orders = [
        tuple(order) for seed in SEEDS for order in order_of_passing(seed, monkeypatch, 2).values()
    ]
    assert len(orders) == len(set(orders)) == len(SEEDS) * 2 * 3
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_every_thread_can_be_first_and_last_past_a_barrier(monkeypatch):
    first, last = set(), set()
    for seed in range(40):
        order = order_of_passing(seed, monkeypatch)[0, "barrier"]
        first.add(order[0])
        last.add(order[-1])
    assert len(first) > 20 and len(last) > 20


def test_the_seed_of_the_environment_is_the_default(monkeypatch):
    from numflash.simulator.seed import _Seed

    monkeypatch.setenv("NUMFLASH_SIM_SEED", "1234")
    assert _Seed().value == 1234


# What a failing kernel says


def test_a_deadlock_says_which_barrier_who_came_and_who_waits_where(monkeypatch):
    monkeypatch.setattr(SEED, "value", 42)

    def kernel():
        t = cuda.threadIdx.x
        if t < 3 or t == 6:
            cuda.syncthreads()  # some
        elif t < 40:
            return
        elif t < 64:
            bar_sync(3, 64)
        else:
            bar_arrive(4, 96)
            cuda.shfl_xor_sync(FULL, t, 1) if t < 90 else cuda.syncthreads()

    with pytest.raises(DeadlockError) as caught:
        run(kernel, grid=(1, 2), block=96)
    text = str(caught.value)
    file = re.escape(__file__)
    line = line_of(kernel, "# some")
    assert "deadlock in block (0, 0, 0): 60 of 96 threads wait, 36 have returned" in text
    assert "NUMFLASH_SIM_SEED=42" in text
    assert "syncthreads: 10 of 60 threads came\n" in text
    assert re.search(rf"threads 0-2, 6 wait at {file}:{line} \(kernel\)\n", text)
    assert re.search(
        rf"named barrier 3: 24 of 64 threads came\n    threads 40-63 wait at {file}:{line + 4} ",
        text,
    )
    assert re.search(r"named barrier 4: 32 of 96 threads came(\n  \S|$)", text), "nobody waits"
    assert re.search(
        rf"shfl_xor_sync: 26 of 32 threads came\n    threads 64-89 wait at {file}:{line + 7} ",
        text,
    )


def test_the_first_deadlocked_block_ends_the_launch():
    def kernel(out):
        out[cuda.blockIdx.x] = 1
        if cuda.blockIdx.x == 1:
            bar_sync(1, 64)

    out = np.zeros(4)
    with pytest.raises(DeadlockError, match=re.escape("block (1, 0, 0)")):
        run(kernel, out, grid=4)
    assert out.tolist() == [1, 1, 0, 0]


def test_an_exception_keeps_its_type_and_notes_thread_block_and_seed(each_seed):
    class KernelError(Exception):
        pass

    def kernel():
        cuda.syncthreads()
        if cuda.blockIdx.y == 1 and tuple(cuda.threadIdx) == (2, 3, 0):
            raise KernelError("from the kernel")

    with pytest.raises(KernelError) as caught:
        run(kernel, grid=(1, 2), block=(4, 4))
    assert caught.value.args == ("from the kernel",)
    (note,) = caught.value.__notes__
    assert note.startswith("in thread (2, 3, 0) of block (0, 1, 0); ")
    assert f"NUMFLASH_SIM_SEED={each_seed}" in note


def test_threads_that_still_wait_are_ended_when_another_fails():
    ended = []

    def kernel(fails):
        try:
            if fails and cuda.threadIdx.x == 5:
                raise ValueError
            bar_sync(1, 64)
        finally:
            ended.append(cuda.threadIdx.x)

    for fails, error in [(True, ValueError), (False, DeadlockError)]:
        ended.clear()
        with pytest.raises(error) as caught:
            run(kernel, fails)
        # Before any garbage is collected; threads that had not begun have nothing to end.
        assert caught and 5 in ended and len(ended) == len(set(ended))
        assert fails or sorted(ended) == list(range(32))


def test_the_engine_works_after_a_failure():
    def broken():
        if cuda.threadIdx.x:
            cuda.syncthreads()
        else:
            bar_sync(1, 32)

    def kernel(out):
        out[cuda.threadIdx.x] = cuda.syncthreads_count(1)

    with pytest.raises(DeadlockError):
        run(broken)
    gc.collect()
    assert (run(kernel, np.zeros(32)) == 32).all()
    with pytest.raises(RuntimeError, match="inside a simulated kernel"):
        current_thread()


def test_infinities_and_nans_in_a_kernel_give_no_warning():
    def kernel(out):
        out[0] = f32(3e38) * f32(10)
        cuda.syncthreads()
        out[1] = out[0] - out[0]
        out[2] = np.float16(f32(1e6))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kernel, np.zeros(3, np.float32), block=1)


# Outside and inside of kernels


@pytest.mark.parametrize(
    "call",
    [
        current_thread,
        cuda.syncthreads,
        lambda: cuda.threadIdx.x,
        lambda: cuda.blockIdx.x,
        lambda: cuda.shared.array(1, f32),
        lambda: bar_sync(1, 32),
    ],
    ids=["current_thread", "syncthreads", "threadIdx", "blockIdx", "shared.array", "bar_sync"],
)
def test_outside_a_kernel_there_is_no_thread(call):
    with pytest.raises(RuntimeError, match="only possible inside a simulated kernel"):
        call()


def test_a_launch_inside_a_kernel_returns_to_its_own_thread(each_seed):
    def inner(out):
        cuda.syncthreads()
        out[cuda.threadIdx.x] += cuda.blockDim.x

    def outer(out, inner_out):
        t = cuda.threadIdx.x
        cuda.syncthreads()
        if t == 3:
            launch(inner, 1, 8, [inner_out])
        assert cuda.threadIdx.x == t and cuda.blockDim.x == 16
        cuda.syncthreads()
        out[t] = inner_out[t % 8]

    assert (run(outer, np.zeros(16), np.zeros(8), block=16) == 8).all()


def test_launches_from_several_python_threads_do_not_mix():
    def kernel(out, value):
        tile = cuda.shared.array(64, i32)
        t = cuda.threadIdx.x
        for _ in range(20):
            tile[t] = value
            cuda.syncthreads()
            out[t] = tile[63 - t]
            cuda.syncthreads()

    outs = [np.zeros(64, int) for _ in range(4)]
    threads = [
        threading.Thread(target=run, args=(kernel, out, value), kwargs={"block": 64})
        for value, out in enumerate(outs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((out == value).all() for value, out in enumerate(outs))


@numba_cuda.jit(device=True)
def plain_device_function(x):
    """A user's own device function, which a kernel of ours may be given."""
    return x + numba_cuda.threadIdx.x


def test_a_plain_numba_device_function_works_in_a_kernel_of_ours():
    def kernel(out):
        out[cuda.threadIdx.x] = plain_device_function(100)

    assert (run(kernel, np.zeros(32)) == 100 + LANES).all()


# Stacks


def test_a_launch_runs_on_the_stacks_of_the_last_one_and_leaves_nothing_on_them():
    def kernel(out, given):
        cuda.syncthreads()
        out[cuda.threadIdx.x] = id(getcurrent())

    class Given:
        pass

    first, again, given = np.zeros(64, np.int64), np.zeros(64, np.int64), Given()
    run(kernel, first, given, block=64)
    run(kernel, again, given, block=64)
    assert len(set(first)) == 64 and set(again) == set(first)
    told = weakref.ref(given)
    del given
    assert told() is None


def test_a_stack_has_the_error_settings_of_its_launch():
    seen = []

    def kernel(out):
        seen.append(np.geterr()["over"])

    run(kernel, np.zeros(1))
    with np.errstate(over="raise"):
        run(kernel, np.zeros(1))
        assert np.geterr()["over"] == "raise"
    assert seen == ["ignore"] * 64


def test_a_kernel_that_fails_takes_its_stack_with_it_and_the_next_one_runs():
    def kernel(out, fails):
        cuda.syncthreads()
        out[cuda.threadIdx.x] = 1 // (cuda.threadIdx.x != fails)

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(kernel, np.zeros(32), 7)
    assert (run(kernel, np.zeros(32), 99) == 1).all()
