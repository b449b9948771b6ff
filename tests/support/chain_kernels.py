"""A kernel whose blocks add rows to the same sums in turn, and what can be wrong with it.

As Hopper's backward adds tiles of dQ: a warp computes a row into a buffer, another one adds it to
global memory by a bulk copy when it is the block's turn, and makes it the next one's.
"""

from collections.abc import Callable

import numpy as np

from numflash.ptx import (
    bar_arrive,
    bar_sync,
    cp_async_bulk_commit_group,
    cp_async_bulk_store,
    cp_async_bulk_wait_group,
    cp_async_bulk_wait_group_read,
    cp_reduce_async_bulk_add_f32,
    cuda,
    f32,
    fence_proxy_async,
    fence_proxy_async_global,
    i32,
    ld_acquire_gpu_u32,
    st_release_gpu_u32,
    st_shared_f32,
    u32,
)
from numflash.runtime.views import Pointer

ROW, THREADS = 64, 64
SMEM_BYTES = 4 * ROW
FULL, EMPTY = 1, 2
FAULTS = (
    "turn",
    "acquired late",
    "global fence",
    "fence",
    "store",
    "read",
    "complete",
    "released early",
    "released by another early",
    "release",
    "plain release",
    "rank of a neighbour",
    "all ranks up",
)


def ascending(num_blocks: int, num_rows: int, group: int = 0) -> list[list[tuple[int, int]]]:
    """By block: (row, rank) of each step. All start at the first row."""
    return [[(row, block) for row in range(num_rows)] for block in range(num_blocks)]


def falling(num_blocks: int, num_rows: int, group: int = 0) -> list[list[tuple[int, int]]]:
    """Of a causal mask: the first block has the last rows, block n all from row n on."""
    last = num_blocks - 1
    return [[(row, min(row, last) - n) for row in range(n, num_rows)] for n in range(last, -1, -1)]


def shifted(num_blocks: int, num_rows: int, group: int) -> list[list[tuple[int, int]]]:
    """Groups of blocks that start at rows of their own and walk round."""
    found = []
    for block in range(num_blocks):
        first, r = block - block % group, block % group
        size = min(group, num_blocks - first)
        start = r * num_rows // size
        steps = []
        for row in [*range(start, num_rows), *range(start)]:
            count = ((row + 1) * size - 1) // num_rows + 1
            steps.append((row, first + (count - 1 - r) % size))
        found.append(steps)
    return found


def make_chain(without: str = ""):
    """The kernel; `without` names what is left out, or wrong: one of FAULTS."""
    waits_for_turn, fences = without != "turn", without != "fence"
    fences_global, stores = without != "global fence", without != "store"
    reads, completes = without != "read", without != "complete"
    acquires_late = without == "acquired late"
    released_early, by_another = without == "released early", "by another" in without
    releases, plainly = without != "release", without == "plain release"

    def chain(x: Pointer(f32), y: Pointer(f32), turns: Pointer(u32), steps: Pointer(i32), n: i32):
        smem = cuda.shared.array(0, u32, alignment=16)
        t = cuda.threadIdx.x
        warp, lane, block = t // 32, t % 32, cuda.blockIdx.x
        if warp == 0:
            for step in range(n):
                row = steps[(block * n + step) * 2]
                if row < 0:
                    break
                # Hazard: the row before is still read.
                bar_sync(EMPTY, THREADS)
                for i in range(lane, ROW, 32):
                    value = x[(block * n + row) * ROW + i]
                    st_shared_f32(smem, i, value)
                # Hazard: the bulk copy would not see the row.
                if fences:
                    fence_proxy_async()
                bar_arrive(FULL, THREADS)
            return
        bar_arrive(EMPTY, THREADS)
        for step in range(n):
            row, rank = steps[(block * n + step) * 2], steps[(block * n + step) * 2 + 1]
            if row < 0:
                break
            # Hazard: the row is not complete.
            bar_sync(FULL, THREADS)
            if lane == 0:
                # Hazard: blocks before would add their rows later, in any order.
                while (
                    waits_for_turn
                    and not acquires_late
                    and ld_acquire_gpu_u32(turns, row) != u32(rank)
                ):
                    pass
                # Hazard: the copy would not see what the acquire has seen.
                if fences_global:
                    fence_proxy_async_global()
                if rank == 0 and stores:
                    cp_async_bulk_store(y, row * ROW, smem, i32(0), u32(4 * ROW))
                else:
                    cp_reduce_async_bulk_add_f32(y, row * ROW, smem, i32(0), u32(4 * ROW))
                cp_async_bulk_commit_group()
                while acquires_late and ld_acquire_gpu_u32(turns, row) != u32(rank):
                    pass
                # Hazard: the buffer would be written again while the copy reads it.
                if reads:
                    cp_async_bulk_wait_group_read()
            cuda.syncwarp()
            if step + 1 < n and steps[(block * n + step + 1) * 2] >= 0:
                bar_arrive(EMPTY, THREADS)
            if by_another and lane == 1:
                st_release_gpu_u32(turns, row, u32(rank + 1))
            if by_another:
                cuda.syncwarp()
            if lane == 0:
                if released_early:
                    st_release_gpu_u32(turns, row, u32(rank + 1))
                # Hazard: the next block would add to what is not there yet.
                if completes:
                    cp_async_bulk_wait_group()
                if plainly:
                    turns[row] = u32(rank + 1)
                elif releases and not by_another and not released_early:
                    st_release_gpu_u32(turns, row, u32(rank + 1))

    return chain


class Chain:
    """A problem for the kernel: rows that blocks add, and in which order."""

    def __init__(self, order: Callable, num_blocks: int, num_rows: int, group: int = 0):
        self.num_blocks, self.num_rows = num_blocks, num_rows
        self.steps = order(num_blocks, num_rows, group)
        rng = np.random.default_rng(num_blocks)
        self.x = rng.standard_normal((num_blocks, num_rows, ROW)).astype(np.float32)

    def arrays(self, without: str = "") -> tuple[np.ndarray, ...]:
        """(x, y, turns, steps) of a launch; y holds nothing."""
        table = np.full((self.num_blocks, self.num_rows, 2), -1, np.int32)
        for block, steps in enumerate(self.steps):
            table[block, : len(steps)] = steps
        if without == "rank of a neighbour":
            rows = table[:, :, 0] == self.num_rows - 1
            table[rows, 1] = np.where(table[rows, 1] == 2, 1, table[rows, 1])
        if without == "all ranks up":
            table[:, :, 1] += 1
        y = np.full((self.num_rows, ROW), np.nan, np.float32)
        return self.x, y, np.zeros(self.num_rows, np.uint32), table

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(sums in the order of ranks, where the turns end)."""
        y = np.zeros((self.num_rows, ROW), np.float32)
        turns = np.zeros(self.num_rows, np.uint32)
        adders = sorted(
            (rank, row, block) for block, steps in enumerate(self.steps) for row, rank in steps
        )
        for rank, row, block in adders:
            y[row] = y[row] + self.x[block, row] if rank else self.x[block, row]
            turns[row] += 1
        return y, turns


CHAINS = {
    "ascending": Chain(ascending, 6, 4),
    "falling": Chain(falling, 5, 6),
    "shifted": Chain(shifted, 6, 7, 3),
}
