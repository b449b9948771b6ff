"""Cases of bulk copies of consecutive bytes, and of what blocks say to each other."""

import numpy as np

from numflash.ptx import (
    atom_inc_gpu_u32,
    cp_async_bulk,
    cp_async_bulk_commit_group,
    cp_async_bulk_store,
    cp_async_bulk_wait_group,
    cp_async_bulk_wait_group_read,
    cp_reduce_async_bulk_add_f32,
    cuda,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    fence_proxy_async_global,
    i32,
    ld_acquire_gpu_u32,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    st_release_gpu_u32,
    st_shared_f32,
    u32,
    u64,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase

ROW = 96
"""Floats that a warp adds."""
_ROW_BYTES, _BYTES = 4 * ROW, 8 * ROW
_ADDERS = 2 * ROW
_MORE = 5
_SKIPPED = 8  # floats before those that are loaded


def _load(x: Pointer(f32), y: Pointer(u32)):
    """Two loads at one mbarrier: all of x but its first floats, the second half first."""
    smem = cuda.shared.array(0, u32, alignment=16)
    barriers = cuda.shared.array(1, u64)
    t = cuda.threadIdx.x
    if t == 0:
        mbarrier_init(barriers, 0, 1)
        fence_mbarrier_init()
        mbarrier_arrive_expect_tx(barriers, 0, _BYTES)
        cp_async_bulk(smem, 0, x, _SKIPPED + ROW, u32(_ROW_BYTES), barriers, 0)
        cp_async_bulk(smem, ROW, x, _SKIPPED, u32(_ROW_BYTES), barriers, 0)
    cuda.syncthreads()
    mbarrier_wait_parity(barriers, 0, 0)
    for i in range(t, _ADDERS, THREADS):
        y[i] = smem[i]


def make_take_turns(without=()):
    """Warps 0 and 1 add a row each to y, which holds nothing before: the first stores.

    `without` names what is left out: the same kernel with a mistake.
    """
    fences, fences_global = "fence" not in without, "global fence" not in without
    waits, waits_for_turn = "wait" not in without, "turn" not in without
    reads_early, releases = "early buffer" not in without, "release" not in without

    def take_turns(x: Pointer(f32), y: Pointer(f32), turn: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=16)
        t = cuda.threadIdx.x
        warp, lane = t // 32, t % 32
        if t == 0:
            turn[0] = u32(0)
        cuda.syncthreads()
        for i in range(lane, ROW, 32):
            st_shared_f32(smem, ROW * warp + i, x[ROW * warp + i])
        if fences:
            fence_proxy_async()
        cuda.syncwarp()
        if lane == 0:
            if waits_for_turn:
                while ld_acquire_gpu_u32(turn, 0) != u32(warp):
                    pass
            if fences_global:
                fence_proxy_async_global()
            if warp == 0:
                cp_async_bulk_store(y, 0, smem, 0, u32(_ROW_BYTES))
            else:
                cp_reduce_async_bulk_add_f32(y, 0, smem, i32(ROW), u32(_ROW_BYTES))
            cp_async_bulk_commit_group()
            if reads_early:
                cp_async_bulk_wait_group_read()
        cuda.syncwarp()
        # The buffer may be written again.
        st_shared_f32(smem, ROW * warp + lane, f32(-1))
        if lane == 0:
            if waits:
                cp_async_bulk_wait_group()
            if releases:
                st_release_gpu_u32(turn, 0, u32(warp + 1))

    return take_turns


def _hand_over(x: Pointer(u32), y: Pointer(u32), turn: Pointer(u32)):
    """Warp 1 reads backwards what warp 0 has written to global memory."""
    t = cuda.threadIdx.x
    if t == 0:
        turn[0] = u32(0)
    cuda.syncthreads()
    if t < 32:
        y[t] = x[t]
        cuda.syncwarp()
        if t == 0:
            st_release_gpu_u32(turn, 0, u32(5))
    else:
        if t == 32:
            while ld_acquire_gpu_u32(turn, 0) != u32(5):
                pass
        cuda.syncwarp()
        y[t] = y[63 - t]


def _draw(x: Pointer(u32), y: Pointer(u32), counter: Pointer(u32)):
    """Each thread draws a number once, and the first one some more."""
    t = cuda.threadIdx.x
    if t == 0:
        counter[0] = u32(0)
    cuda.syncthreads()
    # No thread may get the number of another one, or x of some stays where it is.
    drawn = atom_inc_gpu_u32(counter, 0, u32(THREADS - 1))
    y[drawn] = x[drawn]
    cuda.syncthreads()
    if t == 0:
        for i in range(_MORE):
            y[THREADS + i] = atom_inc_gpu_u32(counter, 0, u32(1))
        # More than the last one is as good as the last one.
        counter[0] = u32(9)
        atom_inc_gpu_u32(counter, 0, u32(3))
        atom_inc_gpu_u32(counter, 0, u32(3))


def expected_draws(x):
    """y and the counter, as `_draw` leaves them."""
    return np.concatenate([x, np.arange(_MORE, dtype=np.uint32) % 2]), np.array([1], np.uint32)


def _summands() -> np.ndarray:
    """Two rows: all kinds of sums, and such as are subnormal before or after; no NaN."""
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, ROW)).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    a[:10] = [0, -0.0, -0.0, np.inf, 1, -1, tiny, 1.5 * tiny, -1.5 * tiny, 2e38]
    b[:10] = [-0.0, -0.0, 0, np.inf, -1, 1, tiny, -tiny, tiny, 2e38]
    a[10:16] = [tiny / 2, -tiny / 2, tiny / 2, 0, -tiny / 4, tiny]
    b[10:16] = [tiny / 2, -tiny / 2, tiny, -tiny / 8, 1, -tiny / 2]
    return np.concatenate([a, b])


def _flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def expected_sums(x):
    """What `make_take_turns` makes of two rows: the first is stored as it is, and added to."""
    first, second = x.reshape(2, ROW)
    with np.errstate(over="ignore"):
        return _flushed(_flushed(first) + _flushed(second))


def _cases() -> list[InstructionCase]:
    x = np.arange(1, _SKIPPED + _ADDERS + 1, dtype=np.float32)
    turns = make_take_turns()
    outputs = ((ROW,), np.float32), ((1,), np.uint32)
    options = {"smem_bytes": _BYTES}
    loaded = (((_ADDERS,), np.uint32),)
    words = np.arange(1, 33, dtype=np.uint32) * np.uint32(2654435761)
    numbers = np.arange(7, 7 + THREADS, dtype=np.uint32)
    drawn = ((THREADS + _MORE,), np.uint32), ((1,), np.uint32)
    handed = ((THREADS,), np.uint32), ((1,), np.uint32)
    return [
        InstructionCase("cp_async_bulk", "", _load, (x,), loaded, **options),
        *(
            InstructionCase(name, "", turns, (_summands(),), outputs, **options)
            for name in (
                "cp_async_bulk_store",
                "cp_reduce_async_bulk_add_f32",
                "cp_async_bulk_wait_group",
                "fence_proxy_async_global",
            )
        ),
        *(
            InstructionCase(name, "", _hand_over, (words,), handed)
            for name in ("ld_acquire_gpu_u32", "st_release_gpu_u32")
        ),
        InstructionCase("atom_inc_gpu_u32", "", _draw, (numbers,), drawn),
    ]


BULK_ROW_CASES = _cases()
