"""How long a turn takes on a GPU: what the order of blocks in Hopper's backward rests on.

A block adds a tile of dQ to global memory by a bulk reduction when it is its turn, waits until the
sum is there, and makes it the next block's turn (`kernels.wgmma.backward`). Its warpgroups may
write the tile's buffer again when the reduction has read it. `TIMES` says what is measured, each
by many repetitions in one launch.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from numflash.kernels.arguments import Pointer
from numflash.kernels.kernel import Kernel
from numflash.runtime.mode import SIMULATED

TILE_WORDS = 64 * 128
"""float32 numbers of a tile of dQ at head_dim 128."""
# More than half of an SM's, so that no two blocks share one, as those of the backward.
_SMEM_BYTES = 120 * 1024
_THREADS = 32


class Time(NamedTuple):
    """What is measured.

    Attributes:
        name: as the page has it.
        in_turn: whether blocks add to one tile, one after the other, or each to its own.
        blocks: of the launch; 0 is one for each SM.
        laps: reductions of each block.
    """

    name: str
    in_turn: bool
    blocks: int
    laps: int


TIMES = (
    Time("a turn, from one block's to the next one's", True, 8192, 1),
    Time("a buffer is free, one block", False, 1, 2048),
    Time("a buffer is free, all SMs at once", False, 0, 2048),
)
_REHEARSED_BLOCKS, _REHEARSED_LAPS, _REHEARSED_WORDS = 3, 2, 64


@cache
def kernel_of(words: int) -> Kernel:
    """The kernel that adds tiles of `words` ones to sums, in turn or not."""
    from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x, mov_tid_x, u32
    from numflash.ptx.between_blocks import (
        fence_proxy_async_global,
        ld_acquire_gpu_u32,
        st_release_gpu_u32,
    )
    from numflash.ptx.bulk_copies import cp_async_bulk_commit_group, cp_async_bulk_wait_group_read
    from numflash.ptx.bulk_rows import cp_async_bulk_wait_group, cp_reduce_async_bulk_add_f32
    from numflash.ptx.memory import st_shared_f32
    from numflash.ptx.warpgroups import fence_proxy_async

    n_bytes = u32(4 * words)

    def turn_times(sums: Pointer(f32), turns: Pointer(u32), blocks: i32, laps: i32, in_turn: i32):
        smem = cuda.shared.array(0, u32, alignment=128)
        for i in range(mov_tid_x(), words, _THREADS):
            st_shared_f32(smem, i, f32(1))
        # Hazard: reductions would not see these writes.
        fence_proxy_async()
        # Hazard: other lanes may not have written yet.
        cuda.syncwarp()
        if mov_tid_x() == 0:
            rank = u32(mov_ctaid_x())
            tile = i64(0) if in_turn != 0 else i64(rank)
            if in_turn != 0:
                while ld_acquire_gpu_u32(turns, i64(0)) != rank:
                    pass
                fence_proxy_async_global()
            for _ in range(laps):
                cp_reduce_async_bulk_add_f32(sums, tile * words, smem, i32(0), n_bytes)
                cp_async_bulk_commit_group()
                cp_async_bulk_wait_group_read()
            cp_async_bulk_wait_group()
            if in_turn != 0:
                # The last block makes it 0 again, for the next launch.
                last = rank == u32(blocks - 1)
                st_release_gpu_u32(turns, i64(0), u32(0) if last else u32(rank + u32(1)))

    return Kernel("turn-times", turn_times, _THREADS, max(_SMEM_BYTES, 4 * words))


def launcher(ordinal: int, blocks: int, arguments: dict[str, int], words: int):
    """A `SimulatedLaunch` or `DriverLaunch` of the kernel with these numbers."""
    from numflash.calls.launch import DriverLaunch, SimulatedLaunch
    from numflash.machine_code.compiler import compile_kernel
    from numflash.runtime.driver import limits_of_device

    kernel = kernel_of(words)
    if SIMULATED:
        return SimulatedLaunch(kernel, blocks, arguments)
    cubin = compile_kernel(lambda: kernel, limits_of_device(ordinal))
    return DriverLaunch(cubin, ordinal, blocks, arguments)


def measure(
    device: Any,
    ordinal: int,
    is_rehearsal: bool,
    milliseconds_of: Callable[[str, Callable[[], None]], float],
) -> dict[str, float]:
    """Milliseconds of one repetition of each of `TIMES`, by its name.

    Args:
        device: a `bench.measuring.device.Device`.
        ordinal: of the GPU.
        is_rehearsal: few blocks and small tiles, which the simulator runs in a second.
        milliseconds_of: (name, call) -> of a call, which is one launch.

    Raises:
        RuntimeError: sums are wrong.
    """
    from numflash.runtime.arrays import library_of
    from numflash.runtime.driver import machine_of

    words, found = _REHEARSED_WORDS if is_rehearsal else TILE_WORDS, {}
    for each in TIMES:
        blocks, laps = each.blocks or machine_of(ordinal).num_sms, each.laps
        if is_rehearsal:
            blocks, laps = min(blocks, _REHEARSED_BLOCKS), min(laps, _REHEARSED_LAPS)
        sums = device.upload(np.zeros((1 if each.in_turn else blocks) * words, np.float32))
        turns = device.upload(np.zeros(1, np.int32))
        library = library_of(sums, "sums")
        operands = {"sums": library.operand(sums), "turns": library.operand(turns)}
        numbers = {"blocks": blocks, "laps": laps, "in_turn": int(each.in_turn)}
        launch = launcher(ordinal, blocks, numbers, words).bind(operands)
        call = partial(launch, library.stream(ordinal))
        call()
        repetitions = blocks * laps if each.in_turn else laps
        if wrong := int((device.download(sums) != repetitions).sum()):
            raise RuntimeError(f"{each.name}: {wrong} of {len(sums)} sums are wrong")
        found[each.name] = milliseconds_of(each.name, call) / repetitions
    return found
