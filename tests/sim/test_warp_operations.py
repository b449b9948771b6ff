"""Operations of a whole warp: syncwarp, shuffles, votes, matches, collective instructions."""

import inspect

import numpy as np
import pytest

from numflash import ptx
from numflash.ptx import (
    Global,
    Regs,
    Shared,
    cuda,
    f32,
    i32,
    instruction,
    u32,
)
from numflash.runtime.views import Pointer
from numflash.simulator import DeadlockError, GlobalPointer, SimulationError, launch

FULL = 0xFFFFFFFF
LANES = np.arange(32)


def run(kernel, *args, grid=1, block=32, smem=0):
    """Launch and return the first argument, the kernel's output."""
    launch(kernel, grid, block, args, smem)
    return args[0] if args else None


def line_of(function, text: str) -> int:
    """The line in this file on which `text` stands, inside `function`."""
    source, first = inspect.getsourcelines(function)
    (offset,) = [i for i, line in enumerate(source) if text in line]
    return first + offset


# Barriers of the warp


def test_syncwarp_lets_the_warp_see_what_was_written_before(each_seed):
    def kernel(out):
        tile = cuda.shared.array(70, i32)
        t = cuda.threadIdx.x
        first = t // 32 * 32
        size = min(32, 70 - first)
        for step in range(3):
            tile[t] = t + 1000 * step
            cuda.syncwarp()
            out[step, t] = tile[first + (t + 1) % 32 % size]
            cuda.syncwarp()

    out = run(kernel, np.zeros((3, 70), np.int32), block=70)
    neighbours = np.concatenate([np.roll(np.arange(a, b), -1) for a, b in [(0, 32), (32, 64)]])
    neighbours = np.concatenate([neighbours, np.roll(np.arange(64, 70), -1)])
    assert (out == neighbours + 1000 * np.arange(3)[:, None]).all()


def test_syncwarp_with_a_mask_waits_for_its_lanes_only(each_seed):
    def kernel(out):
        tile = cuda.shared.array(32, i32)
        lane = cuda.threadIdx.x
        # The halves go through different numbers of barriers.
        mask, steps = (0xFFFF, 5) if lane < 16 else (0xFFFF0000, 2)
        for step in range(steps):
            tile[lane] = step
            cuda.syncwarp(mask)
            assert tile[lane ^ 1] == step and tile[lane ^ 15] == step
            cuda.syncwarp(mask)
        out[lane] = steps

    assert run(kernel, np.zeros(32, int)).tolist() == [5] * 16 + [2] * 16


@pytest.mark.parametrize("operation", ["syncwarp", "shfl_sync", "ballot_sync"])
def test_a_lane_must_be_in_its_own_mask(operation):
    def kernel():
        if operation == "syncwarp":
            cuda.syncwarp(0xFFFFFFFE)
        elif operation == "shfl_sync":
            cuda.shfl_sync(0xFFFFFFFE, f32(1), 2)
        else:
            cuda.ballot_sync(0xFFFFFFFE, True)

    with pytest.raises(SimulationError, match=f"{operation}: lane 0 .* mask 0xfffffffe"):
        run(kernel)


def test_warp_operations_do_not_wait_for_lanes_that_returned(each_seed):
    def kernel(out, votes):
        lane = cuda.threadIdx.x
        if lane >= 20:
            return
        out[lane] = cuda.shfl_down_sync(FULL, f32(lane), 4)
        cuda.syncwarp()
        votes[lane] = cuda.ballot_sync(FULL, True)

    out, votes = np.zeros(32, np.float32), np.zeros(32, np.int64)
    run(kernel, out, votes)
    assert (out[:16] == np.arange(16) + 4).all()
    assert np.isnan(out[16:20]).all(), "the value of a lane that returned is undefined"
    assert (votes[:20] == (1 << 20) - 1).all()


# Shuffles

SHUFFLES = {
    "xor 1": (lambda x, lane: cuda.shfl_xor_sync(FULL, x, 1), LANES ^ 1),
    "xor 2": (lambda x, lane: cuda.shfl_xor_sync(FULL, x, 2), LANES ^ 2),
    "xor 16": (lambda x, lane: cuda.shfl_xor_sync(FULL, x, 16), LANES ^ 16),
    "xor 31": (lambda x, lane: cuda.shfl_xor_sync(FULL, x, 31), LANES ^ 31),
    "xor 33, the low 5 bits count": (lambda x, lane: cuda.shfl_xor_sync(FULL, x, 33), LANES ^ 1),
    "up 0": (lambda x, lane: cuda.shfl_up_sync(FULL, x, 0), LANES),
    "up 1": (lambda x, lane: cuda.shfl_up_sync(FULL, x, 1), np.maximum(LANES - 1, 0)),
    "up 7": (
        lambda x, lane: cuda.shfl_up_sync(FULL, x, 7),
        np.where(LANES < 7, LANES, LANES - 7),
    ),
    "down 1": (lambda x, lane: cuda.shfl_down_sync(FULL, x, 1), np.minimum(LANES + 1, 31)),
    "down 31": (
        lambda x, lane: cuda.shfl_down_sync(FULL, x, 31),
        np.where(LANES == 0, 31, LANES),
    ),
    "down 33, the low 5 bits count": (
        lambda x, lane: cuda.shfl_down_sync(FULL, x, 33),
        np.minimum(LANES + 1, 31),
    ),
    "idx 5": (lambda x, lane: cuda.shfl_sync(FULL, x, 5), np.full(32, 5)),
    "idx 37": (lambda x, lane: cuda.shfl_sync(FULL, x, 37), np.full(32, 5)),
    "idx of each lane's choice": (
        lambda x, lane: cuda.shfl_sync(FULL, x, 7 * lane),
        7 * LANES % 32,
    ),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles_with_the_full_mask(name):
    shuffle, source = SHUFFLES[name]

    def kernel(out):
        t = cuda.threadIdx.x
        out[t] = shuffle(f32(100 + t), t % 32)

    out = run(kernel, np.zeros(64, np.float32), block=64)
    assert (out == np.concatenate([100 + source, 132 + source])).all()


def test_shuffles_with_partial_masks_are_independent(each_seed):
    def kernel(out):
        lane = cuda.threadIdx.x
        mask = 0xFF << (lane // 8 * 8)
        total = lane
        # Each group of eight goes through another number of shuffles.
        for distance in (1, 2, 4)[: 1 + lane // 8]:
            total += cuda.shfl_xor_sync(mask, total, distance)
        out[lane] = total

    out = run(kernel, np.zeros(32, int))
    assert (out[:8] == LANES[:8] + (LANES[:8] ^ 1)).all()
    assert (out[8:16].reshape(2, 4) == LANES[8:16].reshape(2, 4).sum(1)[:, None]).all()
    assert (out[16:24] == LANES[16:24].sum()).all() and (out[24:] == LANES[24:].sum()).all()


@pytest.mark.parametrize(
    "value", [f32(1), np.float64(1), np.float16(1), i32(1), u32(1), np.int64(1), 1.0, 1], ids=repr
)
def test_a_shuffle_from_a_lane_that_takes_no_part_gives_poison_of_its_type(value):
    def kernel(received):
        lane = cuda.threadIdx.x
        if lane < 16:
            received[lane] = cuda.shfl_xor_sync(0xFFFF, value, 16 if lane < 8 else 1)

    received = run(kernel, {})
    for lane, got in received.items():
        assert type(got) is type(value)
        if lane >= 8:
            assert got == value
        elif isinstance(value, float | np.floating):
            assert np.isnan(got)
        else:
            assert np.asarray(got).tobytes() == b"\xff" * np.asarray(value).itemsize


def test_a_shuffle_from_beyond_the_end_of_the_block_gives_poison():
    def kernel(out):
        t = cuda.threadIdx.x
        out[t] = cuda.shfl_xor_sync(FULL, f32(t), 4)

    out = run(kernel, np.zeros(38, np.float32), block=38)
    assert (out[:32] == LANES ^ 4).all()
    assert out[[32, 33, 36, 37]].tolist() == [36, 37, 32, 33] and np.isnan(out[34:36]).all()


def test_what_is_no_number_cannot_be_shuffled():
    def kernel():
        cuda.shfl_xor_sync(1, "text", 1)

    with pytest.raises(SimulationError, match="cannot shuffle a str"):
        run(kernel, block=1)


# Votes and matches


def test_votes_of_a_warp(each_seed):
    def kernel(out, predicates):
        lane = cuda.threadIdx.x
        for row in range(len(predicates)):
            mine = predicates[row, lane]
            out[row, lane] = (
                cuda.all_sync(FULL, mine),
                cuda.any_sync(FULL, mine),
                cuda.eq_sync(FULL, mine),
                cuda.ballot_sync(FULL, mine),
            )

    predicates = np.zeros((4, 32), np.int32)
    predicates[1], predicates[2, 3], predicates[3, 1:] = 7, -1, 2
    out = run(kernel, np.full((4, 32, 4), -1), predicates)
    expected = [[0, 0, 1, 0], [1, 1, 1, FULL], [0, 1, 0, 8], [0, 1, 0, FULL - 1]]
    assert (out == np.array(expected)[:, None]).all()


def test_votes_count_the_lanes_of_the_mask_only(each_seed):
    def kernel(out):
        lane = cuda.threadIdx.x
        mask = 0x55555555 if lane % 2 == 0 else 0xAAAAAAAA
        out[lane] = (
            cuda.ballot_sync(mask, lane < 4),
            cuda.all_sync(mask, lane % 2),
            cuda.any_sync(mask, lane % 2),
        )

    out = run(kernel, np.full((32, 3), -1))
    assert (out[::2] == [0b0101, 0, 0]).all() and (out[1::2] == [0b1010, 1, 1]).all()


def test_a_warp_that_is_not_full_votes_with_the_lanes_it_has():
    def kernel(out):
        t = cuda.threadIdx.x
        out[t] = cuda.ballot_sync(FULL, True)

    assert run(kernel, np.zeros(37, np.int64), block=37).tolist() == [FULL] * 32 + [0b11111] * 5


def test_match_any_finds_the_lanes_with_the_same_value(each_seed):
    def kernel(out):
        lane = cuda.threadIdx.x
        out[lane] = cuda.match_any_sync(FULL, lane % 3)

    out = run(kernel, np.zeros(32, np.int64))
    masks = [sum(1 << lane for lane in range(rest, 32, 3)) for rest in range(3)]
    assert out.tolist() == [masks[lane % 3] for lane in range(32)]


def test_matches_compare_bits():
    def kernel(out):
        lane = cuda.threadIdx.x
        value = (f32("nan"), f32(0.0), f32(-0.0), f32(1))[lane % 4]
        out[lane] = cuda.match_any_sync(FULL, value)

    out = run(kernel, np.zeros(32, np.int64))
    assert out.tolist() == [0x11111111 << lane % 4 for lane in range(32)]


def test_match_all_gives_the_mask_if_all_values_are_the_same(each_seed):
    def kernel(out):
        lane = cuda.threadIdx.x
        mask = 0xFFFF if lane < 16 else 0xFFFF0000
        out[lane] = cuda.match_all_sync(mask, 5 if lane < 31 else 6)

    out = run(kernel, np.zeros((32, 2), np.int64))
    assert out.tolist() == [[0xFFFF, 1]] * 16 + [[0, 0]] * 16


def test_lanemask_lt():
    def kernel(out):
        out[cuda.threadIdx.x] = cuda.lanemask_lt()

    out = run(kernel, np.zeros(40, np.int64), block=40)
    assert out.tolist() == [(1 << t % 32) - 1 for t in range(40)]


# Collective instructions


@pytest.fixture
def toys():
    """Instructions declared for one test, which do not stay behind in INSTRUCTIONS."""
    before = dict(ptx.INSTRUCTIONS)
    yield
    ptx.INSTRUCTIONS.clear()
    ptx.INSTRUCTIONS.update(before)


def test_a_collective_runs_once_with_all_lanes_stacked(each_seed, toys):
    calls = []

    @instruction("toy <d>, <a>, <x>;", sm=75, collective="warp")
    def toy(d: Regs(f32, 3), a: Regs(u32, 2, "r"), x: i32) -> i32:
        """d[lane, j] += x[lane] * a[31 - lane, j % 2]; returns the next lane's x."""
        calls.append((d.shape, d.dtype, a.shape, a.dtype, x.shape, x.dtype))
        for j in range(3):
            d[:, j] += x * a[::-1, j % 2]
        return np.roll(x, -1)

    assert ptx.INSTRUCTIONS["toy"].collective == "warp" and ptx.INSTRUCTIONS["toy"].call is toy

    def kernel(out, results):
        t = cuda.threadIdx.x
        d, a = cuda.local.array(6, f32), cuda.local.array(2, u32)
        for i in range(6):
            d[i] = i
        a[0], a[1] = t, 1000 + t
        results[t] = toy(d[1:4], a, i32(t))
        out[t] = d
        assert a[0] == t

    out, results = np.zeros((64, 6), np.float32), np.zeros(64, int)
    run(kernel, out, results, block=64)
    lanes_first = ((32, 3), np.float32, (32, 2), np.uint32, (32,), np.int32)
    assert calls == [lanes_first] * 2
    t = np.arange(64)
    opposite = t // 32 * 32 + 31 - t % 32
    assert (out[:, [0, 4, 5]] == [0, 4, 5]).all()
    assert (out[:, 1] == 1 + t * opposite).all() and (out[:, 3] == 3 + t * opposite).all()
    assert (out[:, 2] == 2 + t * (1000 + opposite)).all()
    assert (results == t // 32 * 32 + (t + 1) % 32).all()


def test_each_warp_executes_a_collective_of_a_warpgroup(each_seed, toys):
    @instruction("toy <ret>, <x>;", sm=90, collective="warpgroup")
    def toy(x: i32) -> i32:
        """Every thread gets the sum of its warp."""
        assert x.shape == (32,)
        return np.full(32, x.sum())

    def kernel(out):
        out[cuda.threadIdx.x] = toy(i32(cuda.threadIdx.x % 32))

    out = run(kernel, np.zeros(256, int), block=256)
    assert (out == np.arange(32).sum()).all()


def test_a_collective_reaches_shared_and_global_memory_of_each_lane(each_seed, toys):
    @instruction("toy [<target>], [<source>];", sm=75, collective="warp")
    def toy(target: Shared(i32, "offset"), source: Global(i32, "offset"), offset: i32, scale: i32):
        """target[offset] = scale * source[offset] of the opposite lane."""
        for lane in range(32):
            target[lane][offset[lane]] = scale[lane] * source[lane][offset[31 - lane]]

    def kernel(out, source):
        tile = cuda.shared.array(0, i32)
        t = cuda.threadIdx.x
        toy(tile, source, i32(t), i32(2))
        out[t] = tile[t]

    source = GlobalPointer(np.arange(32, dtype=np.int32), i32)
    assert (run(kernel, np.zeros(32, int), source, smem=128) == 2 * LANES[::-1]).all()


def test_a_collective_that_a_lane_misses_is_a_deadlock_with_its_name(toys):
    @instruction("toy;", sm=75, collective="warp")
    def toy():
        """Nothing."""

    def kernel():
        if cuda.threadIdx.x != 5:
            toy()

    with pytest.raises(DeadlockError, match="toy: 31 of 32 threads came") as caught:
        run(kernel)
    assert f"threads 0-4, 6-31 wait at {__file__}:{line_of(kernel, 'toy()')}" in str(caught.value)


def test_an_exception_in_a_collective_ends_the_launch(toys):
    @instruction("toy;", sm=75, collective="warp")
    def toy():
        """Fails."""
        raise ValueError("in the body")

    with pytest.raises(ValueError, match="in the body") as caught:
        run(lambda: toy())
    assert "in thread (" in caught.value.__notes__[0]


def test_an_instruction_of_one_thread_is_its_body(toys):
    @instruction("toy <ret>, <x>;", sm=80)
    def toy(x: f32) -> f32:
        """X + 1."""
        return x + f32(1)

    declared = ptx.INSTRUCTIONS["toy"]
    assert toy(f32(1)) == 2 and toy is declared.body
    assert declared.operands == {"x": f32} and declared.result is f32 and declared.sm == 80


def test_registers_are_read_written_or_both():
    with pytest.raises(ValueError, match="mode of Regs must be 'r', 'w' or 'rw', got 'x'"):
        Regs(f32, 4, "x")
    assert Regs(f32, 4).mode == "rw" and Pointer(f32) == Pointer(f32)
