"""wgmma: what must not be touched while products are in flight, and what a product is refused."""

import numpy as np
import pytest

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_NORMAL,
    cp_async_bulk_tensor_2d,
    cuda,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    make_wgmma,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    st_shared_u32,
    u32,
    u64,
    wgmma_commit_group,
    wgmma_fence,
)
from numflash.simulator import SEED, DeadlockError, SimulatedTensorMap, SimulationError, warpgroup
from tests.support.wgmma_cases import registers_of_d
from tests.support.wgmma_kernels import (
    ACC,
    TILE,
    issue,
    matrix,
    multiply,
    multiply_registers,
    operand,
    run,
    square,
    tiles,
    wait,
    wait_for_all_but_one,
    words_of,
)


def refused(kernel, message, block=128, words=None):
    for seed in range(3):
        SEED.value = seed
        with pytest.raises(SimulationError, match=message):
            run(kernel, words, block)


# What must not be touched


def _touching(action):
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        action(acc, out)
        wait(acc)

    return kernel


def test_an_accumulator_in_flight_is_not_touched():
    def reads(acc, out):
        out[cuda.threadIdx.x, 0] = acc[3]

    def slices(acc, out):
        out[cuda.threadIdx.x, :4] = acc[4:8]

    def writes(acc, out):
        acc[3] = f32(1)

    refused(_touching(reads), "is read while wgmma writes it: wgmma_wait_group is missing")
    refused(_touching(slices), "is read while wgmma writes it")
    refused(_touching(writes), "is written while wgmma writes it")


def test_products_without_commit_are_not_waited_for():
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wait(acc)

    refused(kernel, "names an accumulator that one of them writes")


def test_a_wait_for_too_few_groups_is_found_out():
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait_for_all_but_one(acc)

    refused(kernel, "with 1 groups left names an accumulator")


def _from_registers(after_issue, step_of_write=None):
    def kernel(words, out):
        smem, acc = tiles(words)
        frag = cuda.local.array(16, u32)
        frag[:] = u32(0x3C003C00)
        wgmma_fence()
        for step in range(4):
            a = frag[4 * step : 4 * step + 4]
            multiply_registers[step > 0](acc, a, operand(smem, 0, step))
        wgmma_commit_group()
        after_issue(frag)
        wait(acc)
        frag[2] = u32(0)
        frag[4:8][1] = u32(0)
        out[cuda.threadIdx.x] = acc

    return kernel


def test_operand_a_in_registers_is_read_but_not_written():
    def writes(frag):
        frag[2] = u32(0)

    def writes_a_slice(frag):
        frag[4:8][:] = u32(0)

    got = run(_from_registers(lambda frag: int(frag[2])))
    ones = np.ones((64, 64))
    assert (got == registers_of_d(ones @ matrix().T.astype(np.float64))).all()
    for action in (writes, writes_a_slice):
        refused(_from_registers(action), "registers are written while wgmma reads them")


def test_an_operand_in_shared_memory_stays_until_the_wait():
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        if cuda.threadIdx.x == 77:
            smem[TILE - 1] += u32(1)
        wait(acc)

    refused(kernel, "changed between the issue of a wgmma and the wait")


def test_some_seed_shows_a_buffer_refilled_too_early():
    """The second warpgroup refills the tile without waiting for the first."""

    def kernel(words, out, waits):
        smem, acc = tiles(words)
        t = cuda.threadIdx.x
        if t < 128:
            wgmma_fence()
            issue(acc, smem)
            wgmma_commit_group()
            wait(acc)
            out[t] = acc
        if waits:
            cuda.syncthreads()
        if t >= 128:
            for i in range(t - 128, TILE, 128):
                smem[i] = u32(0)

    def outcome(seed, waits):
        SEED.value = seed
        try:
            return (run(kernel, block=256, extra=(waits,))[: 128 * ACC] == square()).all()
        except SimulationError:
            return False

    assert all(outcome(seed, True) for seed in range(8))
    assert not all(outcome(seed, False) for seed in range(8))


# What a product is refused


def test_a_fence_comes_before_the_first_product_after_a_wait():
    def none(words, out):
        smem, acc = tiles(words)
        issue(acc, smem)

    def before_the_wait(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait(acc)
        acc[0] *= f32(2)
        issue(acc, smem, 4)

    for kernel in (none, before_the_wait):
        refused(kernel, "no wgmma_fence has come since the last wait")


def test_stores_to_an_operand_are_fenced_by_writers_or_readers(each_seed):
    def kernel(words, out, fenced):
        smem, acc = cuda.shared.array(0, u32), cuda.local.array(ACC, f32)
        t = cuda.threadIdx.x
        for i in range(t, TILE, 128):
            st_shared_u32(smem, i, words[i])
        if fenced == "before":
            fence_proxy_async()
        cuda.syncthreads()
        if fenced == "after" or (fenced == "by one" and t == 0):
            fence_proxy_async()
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait(acc)
        out[t] = acc

    for fenced in ("before", "after"):
        assert (run(kernel, extra=(fenced,)) == square()).all()
    for fenced in ("by one", "by nobody"):
        with pytest.raises(SimulationError, match="without a fence_proxy_async of that thread"):
            run(kernel, extra=(fenced,))


def test_a_tile_has_arrived_before_it_is_multiplied():
    def kernel(words, out, map, waits):
        smem, acc = cuda.shared.array(0, u32), cuda.local.array(ACC, f32)
        barriers = cuda.shared.array(1, u64)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barriers, 0, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(barriers, 0, 4 * TILE)
            cp_async_bulk_tensor_2d(smem, 0, map, barriers, 0, EVICT_NORMAL, 0, 0)
        cuda.syncthreads()
        if waits:
            mbarrier_wait_parity(barriers, 0, 0)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait(acc)
        mbarrier_wait_parity(barriers, 0, 0)
        out[t] = acc

    x = matrix()
    map = SimulatedTensorMap(x, TensorLayout("float16", (64, 64), (128,), (64, 64)))
    errors = 0
    for seed in range(8):
        SEED.value = seed
        assert (run(kernel, extra=(map, True)) == square()).all()
        try:
            run(kernel, extra=(map, False))
        except SimulationError as error:
            assert "a bulk copy is still under way" in str(error)
            errors += 1
    assert errors


def _with_descriptor(change):
    def kernel(words, out):
        smem, acc = tiles(words)
        a = operand(smem, 0)
        wgmma_fence()
        multiply[0](acc, change(int(a)), a)
        wgmma_commit_group()
        wait(acc)

    return kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: u64(a + 2 * (cuda.threadIdx.x == 5)), "different descriptors of operand a"),
        (lambda a: u64(a | 1 << 49), "base offset 1"),
        (lambda a: u64(a + 7), "begins in the last chunk of a row"),
        (lambda a: u64(a | 0x3000), "lie outside"),
        (lambda a: u64(a & ~0x3FFF), "lie outside"),
    ],
    ids=["not uniform", "base offset", "in a row", "above", "below"],
)
def test_a_descriptor_must_make_sense(change, message):
    refused(_with_descriptor(change), message)


def test_an_accumulator_is_one_whole_local_array():
    def a_slice(words, out):
        smem, _ = tiles(words)
        acc, a = cuda.local.array(2 * ACC, f32), operand(smem, 0)
        wgmma_fence()
        multiply[0](acc[:ACC], a, a)

    def too_long(words, out):
        smem, _ = tiles(words)
        acc, a = cuda.local.array(2 * ACC, f32), operand(smem, 0)
        wgmma_fence()
        multiply[0](acc, a, a)

    def other_size(words, out):
        smem, acc = tiles(words)
        a = operand(smem, 0)
        wgmma_fence()
        multiply[0](acc, a, a)
        make_wgmma(32, "float16", "shared")(acc, a, a)

    for kernel in (a_slice, too_long):
        refused(kernel, "must be a local array of 32 float32")
    refused(other_size, "n = 32 with an accumulator that a product with n = 64 still writes")


def test_a_warpgroup_waits_before_it_returns():
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()

    refused(kernel, "of warpgroup 0 has not waited for its products")


def test_a_warpgroup_is_four_warps():
    refused(lambda words, out: wgmma_fence(), "fewer than four warps", block=96)

    def three_warps(words, out):
        if cuda.threadIdx.x < 96:
            wgmma_fence()

    def half_a_warp(words, out):
        if cuda.threadIdx.x < 112:
            wgmma_fence()

    refused(
        three_warps, r"warp 3 has not executed wgmma_fence\(\), as another warp of warpgroup 0"
    )
    with pytest.raises(DeadlockError, match="wgmma_fence: 16 of 32 threads came"):
        run(half_a_warp)


def test_all_warps_execute_the_same():
    def other_operand(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem, word=TILE * (cuda.threadIdx.x // 32 == 2))

    def other_instruction(words, out):
        if cuda.threadIdx.x // 32 == 2:
            wgmma_commit_group()
        else:
            wgmma_fence()

    two = words_of(matrix(1), matrix(2))
    for kernel in (other_operand, other_instruction):
        refused(kernel, "all four must execute the same", words=two)


def test_warps_go_on_by_themselves():
    """In some seed a warp has its results before another has begun."""

    def kernel(words, out, order):
        smem, acc = tiles(words)
        warp, leads = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32 == 0
        if leads:
            order.append(("begins", warp))
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait(acc)
        if leads:
            order.append(("ends", warp))
        out[cuda.threadIdx.x] = acc

    orders = []
    for SEED.value in range(8):
        orders.append([])
        assert (run(kernel, extra=(orders[-1],)) == square()).all()
    assert all(len(order) == 8 for order in orders)
    assert any("ends" in dict(order[:4]) for order in orders)


@pytest.mark.parametrize("apart", [False, True])
def test_a_wait_is_for_the_products_of_its_own_warp(apart, monkeypatch):
    """The first warp's wait is no reason to overwrite what another warp's product may read."""
    monkeypatch.setattr(warpgroup, "WARPS_APART", apart)

    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        wgmma_commit_group()
        wait(acc)
        if cuda.threadIdx.x == 0:
            smem[:TILE] = u32(0)
        out[cuda.threadIdx.x] = acc

    def is_right(seed):
        monkeypatch.setattr(SEED, "value", seed)
        try:
            return (run(kernel) == square()).all()
        except SimulationError as error:
            assert "did not wait for all warps" in str(error)
            return False

    assert all(is_right(seed) for seed in range(8)) == (not apart)


@pytest.mark.parametrize(
    ("n", "dtype", "b_major"),
    [(4, "float16", "k"), (12, "float16", "k"), (264, "bfloat16", "k"), (64, "e4m3", "mn")],
)
def test_there_are_products_of_some_shapes_only(n, dtype, b_major):
    with pytest.raises(ValueError, match="there is no wgmma"):
        make_wgmma(n, dtype, "shared", b_major)
    with pytest.raises(ValueError, match="there is no wgmma"):
        make_wgmma(64, "e4m3", "shared", a_major="mn")
    with pytest.raises(ValueError, match="registers is K-major, got 'mn'"):
        make_wgmma(64, "float16", "registers", a_major="mn")
