"""wgmma: what products are, and when their accumulators hold them."""

import numpy as np
import pytest

from numflash.ptx import (
    cuda,
    f32,
    make_wgmma,
    make_wgmma_wait_group,
    u32,
    wgmma_commit_group,
    wgmma_fence,
)
from numflash.simulator import SimulationError, launch
from tests.support.instruction_harness import run_simulated
from tests.support.wgmma_cases import (
    PRODUCTS,
    SQUARE,
    WGMMA_CASES,
    d_register,
    registers_of_d,
    slabs,
)
from tests.support.wgmma_kernels import (
    ACC,
    TILE,
    issue,
    matrix,
    operand,
    run,
    square,
    tiles,
    wait,
    wait_for_all_but_one,
    words_of,
)


def expected_of(case):
    if case.variant == "overwrites":
        a, _, _ = SQUARE.matrices()
        return registers_of_d(a @ a.T)
    variants = [(p.instruction.__name__, f"{p.steps} steps") for p in PRODUCTS]
    found = (case.instruction, case.variant)
    product = PRODUCTS[variants.index(found) if case.variant else 0]
    a, b, c = product.matrices()
    return registers_of_d(c + a @ b)


@pytest.mark.parametrize("case", WGMMA_CASES, ids=str)
def test_a_case_gives_what_is_expected(case):
    (got,) = run_simulated(case)
    assert case.difference([expected_of(case)], [got]) is None


def test_a_sum_is_exact_and_rounded_once():
    """2 ** 24 + 1 + 1 + ... over one instruction; float32 alone would lose every 1."""
    a, b = np.ones((64, 16)), np.ones((16, 8))
    c = np.full((64, 8), 2.0**24)
    multiply, wait = make_wgmma(8, "float16", "shared"), make_wgmma_wait_group(0, 4)

    def kernel(words, out):
        smem, acc, t = cuda.shared.array(0, u32), cuda.local.array(4, f32), cuda.threadIdx.x
        if t == 0:
            smem[: words.size] = words
        cuda.syncthreads()
        acc[:] = f32(c[0, 0])
        wgmma_fence()
        multiply(acc, operand(smem, 0), operand(smem, 64 * 32))
        wgmma_commit_group()
        wait(acc)
        out[t] = acc

    words = np.concatenate([slabs(x.astype(np.float16)) for x in (a, b.T)]).view(np.uint32)
    launch(kernel, 1, 128, (words, out := np.zeros((128, 4), np.float32)), words.nbytes)
    assert (out == 2.0**24 + 16).all()


def test_registers_of_the_accumulator_are_a_bijection():
    places = {d_register(row, column) for row in range(64) for column in range(24)}
    assert places == {(t, i) for t in range(128) for i in range(12)}


def test_products_chain_in_a_group_and_across_groups(each_seed):
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem)
        issue(acc, smem, 4)
        wgmma_commit_group()
        issue(acc, smem, 8)
        wgmma_commit_group()
        wait(acc)
        out[cuda.threadIdx.x] = acc

    assert (run(kernel) == 3 * square()).all()


def test_a_wait_leaves_the_newest_group(each_seed):
    def kernel(words, out, refuses):
        smem, first = tiles(words)
        second = cuda.local.array(ACC, f32)
        wgmma_fence()
        issue(first, smem)
        wgmma_commit_group()
        issue(second, smem, word=TILE)
        wgmma_commit_group()
        wait_for_all_but_one(first)
        total = first.copy()
        if refuses:
            first[0] = second[0]
        wait(second)
        out[cuda.threadIdx.x] = total + second

    x, y = matrix(1), matrix(2)
    assert (run(kernel, words_of(x, y), extra=(False,)) == square(x) + square(y)).all()
    with pytest.raises(SimulationError, match="is read while wgmma writes"):
        run(kernel, words_of(x, y), extra=(True,))


def test_two_warpgroups_do_not_disturb_each_other(each_seed):
    def kernel(words, out):
        smem, acc = tiles(words)
        wgmma_fence()
        issue(acc, smem, word=TILE * (cuda.threadIdx.x // 128))
        wgmma_commit_group()
        wait(acc)
        out[cuda.threadIdx.x] = acc

    x, y = matrix(1), matrix(2)
    got = run(kernel, words_of(x, y), block=256)
    assert (got == np.concatenate([square(x), square(y)])).all()
