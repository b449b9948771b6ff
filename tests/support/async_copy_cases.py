"""Cases of asynchronous copies: what they bring, and how far each wait waits."""

import numpy as np

from numflash.ptx import (
    CP_ASYNC_WAIT_GROUP,
    cp_async_4,
    cp_async_16,
    cp_async_commit_group,
    cuda,
    u16,
    u32,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase

wait_for_all, wait_for_all_but_one = CP_ASYNC_WAIT_GROUP[:2]


def _copy(instruction, storage, n_words, n_elements):
    """Thread t copies to the vector `THREADS - 1 - t`, from element n_elements t of the source.

    Of every three threads the last copies nothing, and names a source behind the end.
    """

    def copy(x: Pointer(storage), y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=16)
        t = cuda.threadIdx.x
        target = n_words * (THREADS - 1 - t)
        copies = t % 3 < 2
        n_bytes = 4 * n_words if copies else 0
        instruction(smem, target, x, n_elements * (t if copies else THREADS + t), n_bytes)
        cp_async_commit_group()
        wait_for_all()
        cuda.syncthreads()
        for i in range(n_words):
            y[n_words * t + i] = smem[n_words * t + i]

    return copy


def _copy_in_groups(pending):
    """`pending` + 1 groups: read the first when the others need not be there, then all."""
    wait = CP_ASYNC_WAIT_GROUP[pending]
    groups, words = pending + 1, 4 * THREADS

    def copy(x: Pointer(u32), y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=16)
        t = cuda.threadIdx.x
        for group in range(groups):
            start = words * group
            cp_async_16(smem, start + 4 * t, x, start + 4 * t, 16)
            cp_async_commit_group()
        wait()
        cuda.syncthreads()
        for i in range(t, words, THREADS):
            y[i] = smem[words - 1 - i]
        wait_for_all()
        cuda.syncthreads()
        for i in range(t, groups * words, THREADS):
            y[words + i] = smem[groups * words - 1 - i]

    return copy


def _commit(x: Pointer(u32), y: Pointer(u32)):
    """A group of two copies; then an empty one, which counts like any other."""
    smem = cuda.shared.array(0, u32, alignment=16)
    t = cuda.threadIdx.x
    for half in range(2):
        start = 4 * (THREADS * half + t)
        cp_async_16(smem, start, x, start, 16)
    cp_async_commit_group()
    cp_async_commit_group()
    wait_for_all_but_one()
    cuda.syncthreads()
    for i in range(t, 8 * THREADS, THREADS):
        y[i] = smem[8 * THREADS - 1 - i]


def _words(n: int) -> np.ndarray:
    """Distinct, never 0."""
    return np.arange(1, n + 1, dtype=np.uint32) * np.uint32(2654435761)


def _copy_case(instruction, variant, storage, n_words) -> InstructionCase:
    words = _words(n_words * THREADS)
    kernel = _copy(instruction, storage, n_words, 4 * n_words // np.dtype(storage).itemsize)
    return InstructionCase(
        instruction.__name__,
        variant,
        kernel,
        (words.view(storage),),
        ((words.shape, np.uint32),),
        smem_bytes=words.nbytes,
    )


def _group_case(pending: int) -> InstructionCase:
    words = _words(4 * THREADS * (pending + 1))
    return InstructionCase(
        f"cp_async_wait_group_{pending}",
        "",
        _copy_in_groups(pending),
        (words,),
        (((words.size + 4 * THREADS,), np.uint32),),
        smem_bytes=words.nbytes,
    )


def _commit_case() -> InstructionCase:
    words = _words(8 * THREADS)
    outputs = ((words.shape, np.uint32),)
    return InstructionCase(
        "cp_async_commit_group", "", _commit, (words,), outputs, smem_bytes=words.nbytes
    )


ASYNC_COPY_CASES = [
    _copy_case(cp_async_16, "from u32", u32, 4),
    _copy_case(cp_async_16, "from u16", u16, 4),
    _copy_case(cp_async_4, "", u32, 1),
    _commit_case(),
    *(_group_case(pending) for pending in range(len(CP_ASYNC_WAIT_GROUP))),
]
