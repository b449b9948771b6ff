"""Inputs for every instruction, and kernels that apply it: to compare hardware with its meaning.

`CASES` has them all. Those of arithmetic, tensor cores, 8-bit floats, asynchronous copies and
Hopper's instructions have files of their own.
"""

import numpy as np

from numflash.ptx import (
    bar_arrive,
    bar_sync,
    bra_over_barrier,
    cuda,
    f32,
    i32,
    i64,
    ld_global_pair_b16,
    ld_global_pair_b32,
    ld_global_pair_b64,
    ld_global_v4_f32,
    ld_global_v4_u32,
    ld_shared_u32,
    ld_shared_v2_f32,
    ld_shared_v4_f32,
    ld_shared_v4_u32,
    mov_ctaid_x,
    mov_tid_x,
    red_global_add_s64,
    st_global_v2_f32,
    st_global_v2_u32,
    st_global_v4_f32,
    st_global_v4_u32,
    st_shared_f32,
    st_shared_u32,
    st_shared_v4_f32,
    st_shared_v4_u32,
    u8,
    u16,
    u32,
    u64,
)
from numflash.runtime.views import Pointer
from tests.support.arithmetic_cases import ARITHMETIC_CASES, NANS, TINY, random_floats
from tests.support.async_copy_cases import ASYNC_COPY_CASES
from tests.support.bulk_copy_cases import BULK_COPY_CASES
from tests.support.bulk_row_cases import BULK_ROW_CASES
from tests.support.cluster_cases import CLUSTER_CASES
from tests.support.fp8_cases import FP8_CASES
from tests.support.instruction_harness import THREADS, InstructionCase
from tests.support.mbarrier_cases import MBARRIER_CASES
from tests.support.tensor_core_cases import TENSOR_CORE_CASES
from tests.support.wgmma_cases import WGMMA_CASES

# Kernels


def _load_global(instruction, storage, register, step):
    """Thread t loads the vector `THREADS - 1 - t`; `step` elements of `storage` are 16 bytes."""

    def load(x: Pointer(storage), y: Pointer(register)):
        frag = cuda.local.array(4, register)
        t = cuda.threadIdx.x
        instruction(frag, x, step * (THREADS - 1 - t))
        for i in range(4):
            y[4 * t + i] = frag[i]

    return load


def _load_pair(instruction, storage, register):
    """Thread t loads the pair `THREADS - 1 - t`, of which -1, 0, 1 and 2 elements are left."""

    def load(x: Pointer(storage), y: Pointer(register)):
        t = cuda.threadIdx.x
        y[t] = instruction(x, 2 * (THREADS - 1 - t), i32(t % 4 - 1))

    return load


def _store_global(instruction, storage, register, n, step):
    """Thread t stores n registers at vector 2 t: what lies between must stay as it is."""

    def store(x: Pointer(register), y: Pointer(storage)):
        frag = cuda.local.array(n, register)
        t = cuda.threadIdx.x
        for i in range(n):
            frag[i] = x[n * t + i]
        instruction(y, 2 * step * t, frag)

    return store


def _load_shared(instruction, storage, register, n):
    """Thread t loads the vector `THREADS - 1 - t`."""

    def load(x: Pointer(storage), y: Pointer(register)):
        smem = cuda.shared.array(0, storage, alignment=16)
        frag = cuda.local.array(n, register)
        t = cuda.threadIdx.x
        for i in range(n):
            smem[n * t + i] = x[n * t + i]
        cuda.syncthreads()
        instruction(frag, smem, n * (THREADS - 1 - t))
        for i in range(n):
            y[n * t + i] = frag[i]

    return load


def _load_shared_word(x: Pointer(u32), y: Pointer(u32)):
    smem = cuda.shared.array(0, u32, alignment=16)
    t = cuda.threadIdx.x
    for i in range(4):
        smem[4 * t + i] = x[4 * t + i]
    cuda.syncthreads()
    for i in range(4):
        y[4 * t + i] = ld_shared_u32(smem, 4 * (THREADS - 1 - t) + i)


def _store_shared_vector(instruction, scalar, storage=None):
    """Thread t stores vector `2 (THREADS - 1 - t)`: what lies between must stay 1."""
    one, storage = scalar(1), storage or scalar
    if storage is not scalar:
        one = u32(0x3F800000)  # the bits of 1.0

    def store(x: Pointer(scalar), y: Pointer(storage)):
        smem = cuda.shared.array(0, storage, alignment=16)
        frag = cuda.local.array(4, scalar)
        t = cuda.threadIdx.x
        for i in range(8):
            smem[8 * t + i] = one
        cuda.syncthreads()
        for i in range(4):
            frag[i] = x[4 * t + i]
        instruction(smem, 8 * (THREADS - 1 - t), frag)
        cuda.syncthreads()
        for i in range(8):
            y[8 * t + i] = smem[8 * t + i]

    return store


def _store_shared(instruction, scalar):
    def store(x: Pointer(scalar), y: Pointer(scalar)):
        smem = cuda.shared.array(0, scalar, alignment=16)
        t = cuda.threadIdx.x
        for i in range(4):
            instruction(smem, 4 * (THREADS - 1 - t) + i, x[4 * t + i])
        cuda.syncthreads()
        for i in range(4):
            y[4 * t + i] = smem[4 * t + i]

    return store


def _thread_index(x: Pointer(u32), y: Pointer(u32)):
    """Read before and after a barrier, behind which other threads have run."""
    y[2 * cuda.threadIdx.x] = mov_tid_x()
    cuda.syncthreads()
    y[2 * cuda.threadIdx.x + 1] = x[mov_tid_x()]


def _branch(x: Pointer(f32), y: Pointer(u32)):
    """The barrier that is branched over would never be filled."""
    t = cuda.threadIdx.x
    bra_over_barrier(x[t], x[t])
    y[t] = u32(t)


def _block_index(x: Pointer(u32), y: Pointer(u32)):
    """Read before and after a barrier; an index may come of it."""
    t = cuda.threadIdx.x
    y[2 * t] = mov_ctaid_x()
    cuda.syncthreads()
    y[2 * t + 1] = x[THREADS * mov_ctaid_x() + t]


def _sum_in_memory(x: Pointer(i64), y: Pointer(i64)):
    """Threads of both warps meet, eight at each of eight sums."""
    t = cuda.threadIdx.x
    red_global_add_s64(y, t % 8, x[t])


_STEPS = 6


def _exchange(x: Pointer(u32), y: Pointer(u32)):
    """Two warps of three exchange values; the third, at its own barrier, does not hold them up."""
    tile = cuda.shared.array(96, u32)
    t = cuda.threadIdx.x
    if t < 64:
        for step in range(_STEPS):
            tile[t] = x[64 * step + t]
            bar_sync(1, 64)
            y[64 * step + t] = tile[63 - t]
            bar_sync(1, 64)
    else:
        tile[t] = x[t]
        bar_sync(2, 32)
        y[64 * _STEPS + t - 64] = tile[159 - t]


def _produce_consume(x: Pointer(u32), y: Pointer(u32)):
    """Warp 0 hands chunks to warp 1 through a ring of two."""
    ring = cuda.shared.array(64, u32)
    t, lane = cuda.threadIdx.x, cuda.threadIdx.x % 32
    for step in range(_STEPS):
        stage = step % 2
        if t < 32:
            if step >= 2:
                bar_sync(3 + stage, 64)
            ring[32 * stage + lane] = x[32 * step + lane]
            bar_arrive(1 + stage, 64)
        else:
            bar_sync(1 + stage, 64)
            y[32 * step + lane] = ring[32 * stage + 31 - lane]
            if step < _STEPS - 2:
                bar_arrive(3 + stage, 64)


def _memory_case(instruction, kernel, x, y_type=None, *, variant="", spread=1, smem=False):
    """The output is `spread` times as large as the input; shared memory as large as the output."""
    y_type = y_type or x.dtype.type
    n_bytes = spread * x.nbytes
    return InstructionCase(
        instruction.__name__,
        variant,
        kernel,
        (x,),
        (((n_bytes // np.dtype(y_type).itemsize,), y_type),),
        smem_bytes=n_bytes if smem else 0,
    )


def _memory_cases() -> list[InstructionCase]:
    x = random_floats(4 * THREADS)
    words, halves = x.view(np.uint32), x.view(np.uint16)
    pairs = slice(2 * THREADS)
    cases = []

    def load_global(instruction, x, register, step, variant=""):
        kernel = _load_global(instruction, x.dtype.type, register, step)
        cases.append(_memory_case(instruction, kernel, x, register, variant=variant))

    def store_global(instruction, x, storage, n, step, variant=""):
        kernel = _store_global(instruction, storage, x.dtype.type, n, step)
        cases.append(_memory_case(instruction, kernel, x, storage, variant=variant, spread=2))

    def shared(instruction, kernel, x, y_type=None, spread=1, variant=""):
        options = {"spread": spread, "smem": True, "variant": variant}
        cases.append(_memory_case(instruction, kernel, x, y_type, **options))

    load_global(ld_global_v4_u32, words, u32, 4, "from u32")
    load_global(ld_global_v4_u32, halves, u32, 8, "from u16")
    load_global(ld_global_v4_f32, x, f32, 4)
    for instruction, storage, register in (
        (ld_global_pair_b16, u8, u16),
        (ld_global_pair_b32, u16, u32),
        (ld_global_pair_b64, f32, u64),
    ):
        kernel = _load_pair(instruction, storage, register)
        elements = words.view(storage)[: 2 * THREADS]
        cases.append(_memory_case(instruction, kernel, elements, register))
    store_global(st_global_v4_f32, x, f32, 4, 4)
    store_global(st_global_v2_f32, x[pairs], f32, 2, 2)
    store_global(st_global_v2_u32, words[pairs], u32, 2, 2, "to u32")
    store_global(st_global_v2_u32, words[pairs], u16, 2, 4, "to u16")
    store_global(st_global_v4_u32, words, u32, 4, 4, "to u32")
    store_global(st_global_v4_u32, words, u16, 4, 8, "to u16")
    shared(ld_shared_v4_f32, _load_shared(ld_shared_v4_f32, f32, f32, 4), x)
    bits = _load_shared(ld_shared_v4_f32, u32, f32, 4)
    shared(ld_shared_v4_f32, bits, words, f32, variant="of words")
    shared(ld_shared_v4_u32, _load_shared(ld_shared_v4_u32, u32, u32, 4), words)
    shared(ld_shared_v2_f32, _load_shared(ld_shared_v2_f32, u32, f32, 2), words[pairs], f32)
    shared(ld_shared_u32, _load_shared_word, words)
    shared(st_shared_v4_f32, _store_shared_vector(st_shared_v4_f32, f32), x, spread=2)
    bits = _store_shared_vector(st_shared_v4_f32, f32, u32)
    shared(st_shared_v4_f32, bits, x, u32, spread=2, variant="to words")
    shared(st_shared_v4_u32, _store_shared_vector(st_shared_v4_u32, u32), words, spread=2)
    shared(st_shared_f32, _store_shared(st_shared_f32, f32), x)
    shared(st_shared_u32, _store_shared(st_shared_u32, u32), words)
    return cases


def _register_cases() -> list[InstructionCase]:
    x = np.arange(THREADS, dtype=np.uint32) * np.uint32(2654435761)
    return [InstructionCase("mov_tid_x", "", _thread_index, (x,), (((2 * THREADS,), np.uint32),))]


def _sum_cases() -> list[InstructionCase]:
    """Sums that begin with what memory holds, -1, and overflow."""
    x = np.random.default_rng(4).integers(-(2**63), 2**63 - 1, THREADS, np.int64)
    return [
        InstructionCase("red_global_add_s64", "", _sum_in_memory, (x,), (((8,), np.int64),)),
    ]


def _branch_cases() -> list[InstructionCase]:
    x = np.resize(np.concatenate([NANS, [0.0, -0.0, 1.0, np.inf, TINY]]).astype(f32), THREADS)
    return [InstructionCase("bra_over_barrier", "", _branch, (x,), (((THREADS,), np.uint32),))]


def _barrier_cases() -> list[InstructionCase]:
    steps = np.arange(64 * _STEPS, dtype=np.uint32) * np.uint32(2654435761)
    return [
        InstructionCase(
            "bar_sync",
            "",
            _exchange,
            (steps,),
            (((64 * _STEPS + 32,), np.uint32),),
            block=96,
        ),
        InstructionCase(
            "bar_arrive",
            "",
            _produce_consume,
            (steps[: 32 * _STEPS],),
            (((32 * _STEPS,), np.uint32),),
        ),
    ]


def _block_cases() -> list[InstructionCase]:
    """Of one block, as all cases are; `tests.sim.test_fp8_attention` has several."""
    x = np.arange(1, 1 + THREADS, dtype=np.uint32)
    return [InstructionCase("mov_ctaid_x", "", _block_index, (x,), (((2 * THREADS,), np.uint32),))]


BASIC_CASES = [
    *ARITHMETIC_CASES,
    *_memory_cases(),
    *_register_cases(),
    *_sum_cases(),
    *_branch_cases(),
    *_barrier_cases(),
]
CASES: dict[str, list[InstructionCase]] = {}
"""Instruction name -> its cases."""
for _case in [
    *BASIC_CASES,
    *_block_cases(),
    *FP8_CASES,
    *TENSOR_CORE_CASES,
    *ASYNC_COPY_CASES,
    *MBARRIER_CASES,
    *BULK_COPY_CASES,
    *BULK_ROW_CASES,
    *CLUSTER_CASES,
    *WGMMA_CASES,
]:
    CASES.setdefault(_case.instruction, []).append(_case)
