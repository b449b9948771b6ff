"""Cases of mbarriers without copies, and of what specialised warps need besides."""

import numpy as np

from numflash.ptx import (
    cuda,
    elect_sync,
    fence_mbarrier_init,
    make_setmaxnreg,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    mov_nctaid_x,
    mov_shared_address,
    stmatrix_x4,
    stmatrix_x4_trans,
    u32,
    u64,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase

STEPS = 7
_STAGES = 2
_RING, _BARRIERS = 32 * _STAGES, 2 * _STAGES
_VOTES = 2 * THREADS


def make_produce_consume(arrive_full):
    """Warp 0 hands chunks to warp 1 through a ring of two, each with a full and an empty barrier.

    All lanes arrive at full barriers, one at empty ones.
    """

    def produce_consume(x: Pointer(u32), y: Pointer(u32)):
        ring = cuda.shared.array(_RING, u32)
        barriers = cuda.shared.array(_BARRIERS, u64)
        t, lane = cuda.threadIdx.x, cuda.threadIdx.x % 32
        if t == 0:
            for stage in range(_STAGES):
                mbarrier_init(barriers, stage, 32)
                mbarrier_init(barriers, _STAGES + stage, 1)
            fence_mbarrier_init()
        cuda.syncthreads()
        for step in range(STEPS):
            stage, parity = step % _STAGES, step // _STAGES & 1
            if t < 32:
                mbarrier_wait_parity(barriers, _STAGES + stage, 1 - parity)
                ring[32 * stage + lane] = x[32 * step + lane]
                arrive_full(barriers, stage)
            else:
                mbarrier_wait_parity(barriers, stage, parity)
                y[32 * step + lane] = ring[32 * stage + 31 - lane]
                cuda.syncwarp()
                if lane == 0:
                    mbarrier_arrive(barriers, _STAGES + stage)

    return produce_consume


def _arrive_expecting_nothing():
    from numflash.ptx import device_function

    @device_function
    def arrive(barriers, index):
        mbarrier_arrive_expect_tx(barriers, index, 0)

    return arrive


def _elect(x: Pointer(u32), y: Pointer(u32)):
    """The number of elected lanes of each warp, twice; no manual says which lane it is."""
    votes = cuda.shared.array(_VOTES, u32)
    t = cuda.threadIdx.x
    votes[t] = elect_sync() * x[t]
    votes[THREADS + t] = elect_sync() * x[t]
    cuda.syncthreads()
    if t < _VOTES // 32:
        elected = u32(0)
        for i in range(32):
            elected += votes[32 * t + i]
        y[t] = elected


def _addresses(x: Pointer(u32), y: Pointer(u32)):
    smem = cuda.shared.array(0, u32, alignment=1024)
    t = cuda.threadIdx.x
    y[2 * t] = mov_shared_address(smem, x[t]) - mov_shared_address(smem, 0)
    y[2 * t + 1] = mov_shared_address(smem, 0) & u32(1023)


def _store_matrices(instruction):
    """Each thread names the row that `rows` tells it."""

    def store(x: Pointer(u32), rows: Pointer(u32), y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=16)
        frag = cuda.local.array(4, u32)
        t = cuda.threadIdx.x
        for i in range(4):
            frag[i] = x[4 * t + i]
        instruction(smem, 4 * rows[t], frag)
        cuda.syncthreads()
        for i in range(4):
            y[4 * t + i] = smem[4 * t + i]

    return store


def _grid_size(x: Pointer(u32), y: Pointer(u32)):
    y[cuda.threadIdx.x] = x[cuda.threadIdx.x] * mov_nctaid_x()


def _share_registers(give, take):
    """Of three warpgroups the first gives registers to the others."""

    def share(x: Pointer(u32), y: Pointer(u32)):
        t = cuda.threadIdx.x
        if t < 128:
            give()
            y[t] = x[383 - t]
        else:
            take()
            y[t] = x[383 - t]

    return share


def _words(n: int) -> np.ndarray:
    return np.arange(1, n + 1, dtype=np.uint32) * np.uint32(2654435761)


def _case(name, kernel, inputs, n_out, variant="", **options) -> InstructionCase:
    outputs = (((n_out,), np.uint32),)
    return InstructionCase(name, variant, kernel, inputs, outputs, **options)


def _cases() -> list[InstructionCase]:
    ring = make_produce_consume(mbarrier_arrive)
    steps, ones = _words(32 * STEPS), np.ones(THREADS, np.uint32)
    matrices = np.random.default_rng(8).permutation(THREADS).astype(np.uint32)
    give, take = make_setmaxnreg("dec", 24), make_setmaxnreg("inc", 240)
    share = _share_registers(give, take)
    cases = [
        _case(name, ring, (steps,), steps.size)
        for name in ("mbarrier_init", "mbarrier_arrive", "mbarrier_wait_parity")
    ]
    cases += [
        _case("fence_mbarrier_init", ring, (steps,), steps.size),
        _case(
            "mbarrier_arrive_expect_tx",
            make_produce_consume(_arrive_expecting_nothing()),
            (steps,),
            steps.size,
            "of nothing",
        ),
        _case("elect_sync", _elect, (ones,), _VOTES // 32),
        _case(
            "mov_shared_address",
            _addresses,
            (np.arange(THREADS, dtype=np.uint32)[::-1].copy(),),
            2 * THREADS,
            smem_bytes=1024,
        ),
        *(
            _case(
                instruction.__name__,
                _store_matrices(instruction),
                (_words(4 * THREADS), matrices),
                4 * THREADS,
                smem_bytes=16 * THREADS,
            )
            for instruction in (stmatrix_x4, stmatrix_x4_trans)
        ),
        _case("mov_nctaid_x", _grid_size, (_words(THREADS),), THREADS),
    ]
    for name in ("setmaxnreg_dec_24", "setmaxnreg_inc_240"):
        cases.append(_case(name, share, (_words(384),), 384, block=384, min_blocks=1))
    return cases


MBARRIER_CASES = _cases()
