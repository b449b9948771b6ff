"""Blocks of the backward on Hopper: their buffers and channels, their copies and their warps.

A block owns rows: of queries with dO, or of keys with values. They come at the channel `OWNED`,
once, or once for each of its `places`. The rows that it walks over come in tiles, each matrix by a
channel of its own, which has `num_stages` buffers.
"""

from functools import cache
from typing import NamedTuple

from numflash.kernels.wgmma.channels import Channel, make_channel
from numflash.kernels.wgmma.ring import SLAB_WORDS, Buffers
from numflash.ptx import cuda, device_function, i32, mov_tid_x, u32, u64
from numflash.ptx.bulk_copies import cp_async_bulk_tensor_4d
from numflash.ptx.warpgroups import elect_sync, fence_mbarrier_init, make_setmaxnreg
from numflash.tiles.wgmma.products import SLAB_BYTES, advance, make_operand

_SLAB_ELEMENTS = 64


class Matrix(NamedTuple):
    """The buffers of a matrix: `stages` of `rows` rows, made of slabs of 64 columns.

    Attributes:
        buffers: where they are.
        rows: of a buffer.
        slabs: side by side.
        n_bytes: that arrive in one.
    """

    buffers: Buffers
    rows: int
    slabs: int
    n_bytes: int


def matrix_of(config, traits, name: str) -> Matrix:
    """The buffers of "q", "k", "v" or "do"."""
    rows = config.tile_m if name in ("q", "do") else config.tile_n
    slabs = config.slabs(traits.head_dim if name in ("q", "k") else traits.head_dim_v)
    words = rows * slabs * SLAB_WORDS
    return Matrix(Buffers(config.smem_offsets(traits)[name], words), rows, slabs, 4 * words)


@cache
def make_operand_of(matrix: Matrix):
    """operand_of(start, stage): the operand of products that the buffer `stage` holds.

    `start` is the address of the block's shared memory, asked for again in each tile: kept,
    descriptors would take registers.
    """
    first, words = matrix.buffers
    # Operands count in units of 16 bytes.
    operand, step = make_operand(matrix.rows * SLAB_BYTES, first), words >> 2

    @device_function
    def operand_of(start, stage):
        return advance(operand(start), stage, step)

    return operand_of


def channels_of(config, traits, count: int) -> tuple[Channel, ...]:
    """OWNED, and `count` channels of `num_stages` buffers.

    The first two of these are filled by bulk copies, the third by the threads that assist, and the
    fourth by one warpgroup for another: such buffers are full when each warp has arrived.
    """
    first, stages = config.smem_offsets(traits)["barriers"] // 2, config.num_stages
    groups = config.num_warpgroups
    owned = make_channel(first, first + 1, 1, 4, groups)
    of_each = ((groups, 1), (groups, 1), (groups, config.assisting_threads // 32), (1, 4))
    starts = [first + 2 + 2 * stages * i for i in range(count)]
    return owned, *(
        make_channel(at, at + stages, stages, 4, *each)
        for at, each in zip(starts, of_each[:count], strict=True)
    )


@cache
def make_fetch(matrix: Matrix, policy):
    """fetch(smem, barriers, full, tensor_map, stage, row, head, batch)

    Rows from `row` on of a head to the buffer `stage`, counted by the mbarrier `full`. By one
    thread, which has claimed the buffer and announced its bytes.
    """
    first, words, rows, slabs = *matrix.buffers, matrix.rows, matrix.slabs

    @device_function
    def fetch(smem, barriers, full, tensor_map, stage, row, head, batch):
        for slab in range(slabs):
            target = i32(first + stage * words + slab * rows * SLAB_WORDS)
            column = i32(slab * _SLAB_ELEMENTS)
            cp_async_bulk_tensor_4d(
                smem, target, tensor_map, barriers, full, policy, column, row, head, batch
            )

    return fetch


def _make_init(channels):
    """init(barriers): make the mbarriers of all channels, by one thread."""
    init_first = channels[0].init
    if len(channels) == 1:
        return init_first
    init_others = _make_init(channels[1:])

    @device_function
    def init(barriers):
        init_first(barriers)
        init_others(barriers)

    return init


def make_run_block(config, channels, produce, assist, consume, write=None, registers=None):
    """run_block(maps, given): the warps of a block, each with its part.

    produce(smem, barriers, maps, given)     one thread of the last warpgroup
    assist(smem, barriers, given)            the warps behind it that assist
    write(smem, barriers, given)             one thread of the warp behind them
    consume(smem, barriers, given)           all warpgroups before it

    `registers` are those of warps that copy and of those that multiply, if not the config's.
    """
    num_consumers, (few, many) = 32 * config.num_warps, registers or config.registers
    assisting = config.assisting_threads
    give_registers, take_registers = make_setmaxnreg("dec", few), make_setmaxnreg("inc", many)
    init, writes = _make_init(channels), write is not None

    @device_function
    def run_block(maps, given):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(0, u64, alignment=1024)
        if mov_tid_x() == 0:
            init(barriers)
            # Hazard: bulk copies would not see the mbarriers at which they complete.
            fence_mbarrier_init()
        # Hazard: a thread would wait at an mbarrier that has not been made.
        cuda.syncthreads()
        if mov_tid_x() >= num_consumers:
            # Hazard: consumers wait in `take_registers` until all warps that copy have given.
            give_registers()
            if mov_tid_x() < num_consumers + 32:
                if elect_sync() != 0:
                    produce(smem, barriers, maps, given)
            elif mov_tid_x() < num_consumers + 32 + assisting:
                assist(smem, barriers, given)
            # `writes` is a constant, tested by itself: the compiler removes the branch.
            elif writes:  # noqa: SIM102
                if mov_tid_x() < num_consumers + 64 + assisting and elect_sync() != 0:
                    write(smem, barriers, given)
        else:
            # Hazard: without it accumulators would not fit into a thread's registers.
            take_registers()
            consume(smem, barriers, given)

    return run_block
