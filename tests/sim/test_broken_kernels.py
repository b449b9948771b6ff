"""The engine finds bugs: kernels that are right, and the same kernels broken on purpose.

A mutation replaces a piece of source text, which must be there. The kernel as it is must give the
right result for every seed; a mutated one must give a wrong result, or an error, for at least one
of them. This is the proof that a missing barrier cannot pass the tests of a kernel.

What the engine does not see: a thread runs undisturbed from one barrier, shuffle or vote to the
next, so that an update of shared memory that should be atomic is.
"""

import inspect
import traceback
from pathlib import Path

import numpy as np
import pytest

from numflash.ptx import bar_arrive, bar_sync, cuda, f32
from numflash.simulator import SEED, DeadlockError, SimulationError, launch
from tests.support.faults import Mutation

SEEDS = range(5)
FULL = 0xFFFFFFFF
TILE = 8


def first_failure(run, monkeypatch, seeds=SEEDS) -> str | None:
    """The failure of `run`, which returns whether it is right, for the first seed.

    A failure is a wrong result, or an error of the simulator; others are raised: they would say
    that the fault is wrong, not the kernel.
    """
    for seed in seeds:
        monkeypatch.setattr(SEED, "value", seed)
        try:
            if not run():
                return f"wrong result with seed {seed}"
        except Exception as error:
            if not is_of_simulator(error):
                raise
            return f"{type(error).__name__} with seed {seed}: {error}"
    return None


def is_of_simulator(error: Exception) -> bool:
    """Whether a kernel did what it must not, and not the text of a fault."""
    if isinstance(error, SimulationError | DeadlockError | IndexError):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    of_memory = ("simulator", "ptx")  # a misaligned access
    return isinstance(error, ValueError) and Path(raised_in).parent.name in of_memory


@pytest.mark.parametrize(
    "change",
    [("x[row + ty", "y[nothing + ty"), ("partial[index] +=", "partial.index +=")],
    ids=["no such name", "no such attribute"],
)
def test_a_fault_that_is_no_kernel_is_not_caught(change, monkeypatch):
    scope = dict(globals())
    exec(inspect.getsource(transpose).replace(*change), scope)
    with pytest.raises((NameError, AttributeError)):
        first_failure(lambda: run_transpose(scope["transpose"]), monkeypatch)


# Small kernels


def transpose(x, y, sums):
    """Compute y = x^T and the sum of each tile; a block of 8 x 8 threads for a tile of 8 x 8."""
    tile = cuda.shared.array((TILE, TILE), f32)
    partial = cuda.shared.array(TILE * TILE, f32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    index = TILE * ty + tx
    row, column = TILE * cuda.blockIdx.y, TILE * cuda.blockIdx.x
    tile[ty, tx] = x[row + ty, column + tx]
    partial[index] = x[row + ty, column + tx]
    cuda.syncthreads()  # the tile has arrived
    y[column + ty, row + tx] = tile[tx, ty]
    half = TILE * TILE // 2
    while half > 0:
        if index < half:
            partial[index] += partial[index + half]
        cuda.syncthreads()  # the sums of this step
        half //= 2
    if index == 0:
        sums[cuda.blockIdx.y, cuda.blockIdx.x] = partial[0]


def run_transpose(kernel) -> bool:
    """Whether `kernel` transposes."""
    x = np.random.default_rng(0).integers(-9, 9, (16, 24)).astype(np.float32)
    y, sums = np.full((24, 16), np.nan, np.float32), np.full((2, 3), np.nan, np.float32)
    launch(kernel, (3, 2), (TILE, TILE), (x, y, sums))
    expected = x.reshape(2, TILE, 3, TILE).sum((1, 3))
    return bool((y == x.T).all() and (sums == expected).all())


def pipeline(x, y, steps):
    """Turn each 2 x 32 chunk of x; warp 0 loads chunks into a ring of two, warp 1 empties it."""
    ring = cuda.shared.array((2, 2, 32), f32)
    is_producer, lane = cuda.threadIdx.x < 32, cuda.threadIdx.x % 32
    for step in range(steps):
        stage = step % 2
        if is_producer:
            if step >= 2:
                bar_sync(3 + stage, 64)  # the stage is empty
            ring[stage, 0, lane] = x[step, 0, lane]
            ring[stage, 1, lane] = x[step, 1, lane]
            bar_arrive(1 + stage, 64)  # the stage is full
        else:
            bar_sync(1 + stage, 64)  # the stage is full
            for i in range(2):
                y[step, lane, i] = ring[stage, i, 31 - lane]
            if step < steps - 2:
                bar_arrive(3 + stage, 64)  # the stage is empty


def run_pipeline(kernel) -> bool:
    """Whether `kernel` passes every chunk on."""
    steps = 6
    x = np.arange(steps * 64, dtype=np.float32).reshape(steps, 2, 32)
    y = np.full((steps, 32, 2), np.nan, np.float32)
    launch(kernel, 1, 64, (x, y, steps))
    return bool((y == x[:, :, ::-1].swapaxes(1, 2)).all())


def softmax(x, y):
    """Softmax, in base 2, of 64 values of x: shuffles in a warp, shared memory between the two."""
    warps = cuda.shared.array((2, 2), f32)
    t = cuda.threadIdx.x
    warp, lane = t // 32, t % 32
    largest = x[cuda.blockIdx.x, t]
    for distance in (16, 8, 4, 2, 1):
        largest = max(largest, cuda.shfl_xor_sync(FULL, largest, distance))
    if lane == 0:
        warps[0, warp] = largest
    cuda.syncthreads()  # both maxima
    e = f32(2) ** (x[cuda.blockIdx.x, t] - max(warps[0, 0], warps[0, 1]))
    total = e
    for distance in (16, 8, 4, 2, 1):
        total += cuda.shfl_xor_sync(FULL, total, distance)
    if lane == 0:
        warps[1, warp] = total
    cuda.syncthreads()  # both sums
    y[cuda.blockIdx.x, t] = e / (warps[1, 0] + warps[1, 1])


def run_softmax(kernel) -> bool:
    """Whether `kernel` computes softmax, in base 2 on integers, where it is exact."""
    x = np.random.default_rng(0).integers(-4, 4, (2, 64)).astype(np.float32)
    y = np.full_like(x, np.nan)
    launch(kernel, 2, 64, (x, y))
    e = np.exp2(x - x.max(1, keepdims=True))
    return bool((y == e / e.sum(1, keepdims=True)).all())


def from_below(x, y):
    """Shift by one: without the barrier it is right if threads run in ascending order."""
    tile = cuda.shared.array(64, f32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    y[t] = tile[max(t - 1, 0)]


def from_above(x, y):
    """Shift by one: without the barrier it is right if threads run in descending order."""
    tile = cuda.shared.array(64, f32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    y[t] = tile[min(t + 1, 63)]


def run_shift(kernel) -> bool:
    """Whether `kernel` shifts."""
    x, y = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    launch(kernel, 1, 64, (x, y))
    return bool((y == np.clip(x - 1 if kernel.__name__ == "from_below" else x + 1, 0, 63)).all())


SMALL_KERNELS = {
    transpose: run_transpose,
    pipeline: run_pipeline,
    softmax: run_softmax,
    from_below: run_shift,
    from_above: run_shift,
}
SMALL_MUTATIONS = [
    (from_below, Mutation("no barrier", "cuda.syncthreads()", "pass")),
    (from_above, Mutation("no barrier", "cuda.syncthreads()", "pass")),
    (
        transpose,
        Mutation("no barrier before the tile is read", "cuda.syncthreads()  # the t", "#"),
    ),
    (transpose, Mutation("no barrier between steps", "cuda.syncthreads()  # the s", "#")),
    (
        transpose,
        Mutation(
            "barrier after the read instead of before",
            """    cuda.syncthreads()  # the tile has arrived
    y[column + ty, row + tx] = tile[tx, ty]
""",
            """    y[column + ty, row + tx] = tile[tx, ty]
    cuda.syncthreads()
""",
        ),
    ),
    (
        transpose,
        Mutation(
            "barrier in a branch that not all threads take",
            """            partial[index] += partial[index + half]
        cuda.syncthreads()  # the sums of this step
""",
            """            partial[index] += partial[index + half]
            if half > 1:
                cuda.syncthreads()
            else:
                bar_sync(1, 64)
""",
        ),
    ),
    (transpose, Mutation("reads what nobody wrote", "partial[index] = x[", "partial[index] + x[")),
    (transpose, Mutation("the last column is not loaded", "tile[ty, tx] =", "tile[ty, tx & 6] =")),
    (transpose, Mutation("one step too few", "while half > 0", "while half > 1")),
    (pipeline, Mutation("consumer does not wait", "bar_sync(1 + stage", "bar_arrive(1 + stage")),
    (pipeline, Mutation("producer does not wait", "bar_sync(3 + stage", "bar_arrive(3 + stage")),
    (pipeline, Mutation("no barrier for empty", "bar_sync(3 + stage, 64)", "pass")),
    (pipeline, Mutation("full is never announced", "bar_arrive(1 + stage, 64)", "pass")),
    (pipeline, Mutation("empty is never announced", "bar_arrive(3 + stage, 64)", "pass")),
    (
        pipeline,
        Mutation(
            "full is announced before the last load",
            """            ring[stage, 1, lane] = x[step, 1, lane]
            bar_arrive(1 + stage, 64)  # the stage is full
""",
            """            bar_arrive(1 + stage, 64)
            cuda.syncwarp()
            ring[stage, 1, lane] = x[step, 1, lane]
""",
        ),
    ),
    (
        pipeline,
        Mutation(
            "empty is announced before the last read",
            """            for i in range(2):
                y[step, lane, i] = ring[stage, i, 31 - lane]
            if step < steps - 2:
                bar_arrive(3 + stage, 64)  # the stage is empty
""",
            """            if step < steps - 2:
                bar_arrive(3 + stage, 64)
            for i in range(2):
                cuda.syncwarp()
                y[step, lane, i] = ring[stage, i, 31 - lane]
""",
        ),
    ),
    (pipeline, Mutation("reads the other stage", "ring[stage, i,", "ring[1 - stage, i,")),
    (
        pipeline,
        Mutation("counts one warp only", "bar_sync(1 + stage, 64)", "bar_sync(1 + stage, 32)"),
    ),
    (softmax, Mutation("no barrier for the maxima", "cuda.syncthreads()  # both m", "#")),
    (softmax, Mutation("no barrier for the sums", "cuda.syncthreads()  # both s", "#")),
    (
        softmax,
        Mutation("syncwarp for the maxima", "cuda.syncthreads()  # both m", "cuda.syncwarp() #"),
    ),
    (
        softmax,
        Mutation(
            "two lanes swapped in a shuffle",
            "total += cuda.shfl_xor_sync(FULL, total, distance)",
            "total += cuda.shfl_sync(FULL, total, (0, 2, 1, *range(3, 32))[lane ^ distance])",
        ),
    ),
    (softmax, Mutation("a step of the sum is missing", "16, 8, 4, 2, 1", "16, 8, 2, 1", times=2)),
    (softmax, Mutation("xor became up", "total += cuda.shfl_xor", "total += cuda.shfl_up")),
    (
        softmax,
        Mutation(
            "half of the lanes shuffle",
            "total += cuda.shfl_xor_sync(FULL, total, distance)",
            "total += cuda.shfl_xor_sync(FULL, total, distance) if lane < 16 else total",
        ),
    ),
    (
        softmax,
        Mutation(
            "half of the lanes are in the mask",
            "total += cuda.shfl_xor_sync(FULL, total, distance)",
            "total += cuda.shfl_xor_sync(0xFFFF << (lane & 16), total, distance)",
        ),
    ),
    (softmax, Mutation("only one warp writes its sum", "warps[1, warp] =", "warps[1, 0] =")),
]


@pytest.mark.parametrize("kernel", SMALL_KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_correct_kernel_is_right_for_every_seed(kernel, monkeypatch):
    assert first_failure(lambda: SMALL_KERNELS[kernel](kernel), monkeypatch) is None


@pytest.mark.parametrize(
    ("kernel", "mutation"), SMALL_MUTATIONS, ids=lambda p: getattr(p, "__name__", p and str(p))
)
def test_a_broken_kernel_is_caught(kernel, mutation, monkeypatch, record_property):
    scope = dict(globals())
    exec(mutation.apply(inspect.getsource(kernel)), scope)
    broken = scope[kernel.__name__]
    caught = first_failure(lambda: SMALL_KERNELS[kernel](broken), monkeypatch)
    record_property("caught", caught)
    assert caught
