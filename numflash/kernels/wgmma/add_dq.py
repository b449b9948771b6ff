"""One thread of a Hopper block adds dQ of its tiles to the sums in global memory, in turn.

Warpgroups leave dQ of a tile in shared memory, in a buffer of the channel DQ. The thread waits for
the block's turn at the tile (`tiles.wgmma.turns_of_blocks`), and adds the buffer by a bulk
reduction. The first block of a tile stores it instead.
"""

from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.kernels.arguments import BlockMask
from numflash.kernels.mma.queries import make_steps_of_heads
from numflash.kernels.wgmma.places import make_each
from numflash.ptx import device_function, i32, i64, u32
from numflash.ptx.between_blocks import (
    fence_proxy_async_global,
    ld_acquire_gpu_u32,
    st_release_gpu_u32,
)
from numflash.ptx.bulk_copies import cp_async_bulk_commit_group, cp_async_bulk_wait_group_read
from numflash.ptx.bulk_rows import (
    cp_async_bulk_store,
    cp_async_bulk_wait_group,
    cp_reduce_async_bulk_add_f32,
)
from numflash.ptx.mbarriers import mbarrier_arrive
from numflash.tiles import steps
from numflash.tiles.division import quotient
from numflash.tiles.wgmma.turns_of_blocks import (
    make_adds_last,
    make_has_place,
    make_places_of,
    make_rank_of,
    place_of_tile,
)


def make_dq_buffer(buffers: int):
    """dq_buffer(number): the buffer of dQ of a block's tile `number`, and its phase's parity."""

    @device_function
    def dq_buffer(number):
        if buffers == 1:
            return i32(0), u32(number & 1)
        return i32(number & 1), u32(number >> 1 & 1)

    return dq_buffer


def _make_mask_of_queries(traits: Traits):
    """mask_of_queries(mask): the mask by which tiles of queries list keys."""

    @device_function
    def mask_itself(mask):
        return mask

    @device_function
    def mask_of_queries(mask):
        return BlockMask(mask.lo, mask.hi, mask.lists_of_queries)

    return mask_of_queries if traits.blocks else mask_itself


def make_add_dq(config: Sm90BackwardConfig, traits: Traits, DQ, walk_of, places):
    """add_dq(smem, barriers, given): one thread adds dQ of each tile in global memory, in turn."""
    tile_m = config.tile_m
    words, dq_smem = tile_m * traits.head_dim, config.smem_offsets(traits)["dq"]
    n_bytes = u32(4 * words)
    dq_buffer = make_dq_buffer(config.dq_buffers(traits))
    tile_n = config.tile_n
    rank_of, adds_last = (make(tile_m, tile_n, traits) for make in (make_rank_of, make_adds_last))
    places_of, has_place = make_places_of(tile_m, traits), make_has_place(traits)
    mask_of_queries = _make_mask_of_queries(traits)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)

    @device_function
    def add_in_turn(smem, barriers, sums, at, source, rank, buffer, added):
        dq_sums, turns = sums
        # Hazard: sums in another order are not the same bits.
        while ld_acquire_gpu_u32(turns, i64(at) + 1) != rank:
            pass
        # Hazard: the copy would not see what the block before has added.
        fence_proxy_async_global()
        if rank == u32(0):
            cp_async_bulk_store(dq_sums, i64(at) * words, smem, source, n_bytes)
        else:
            cp_reduce_async_bulk_add_f32(dq_sums, i64(at) * words, smem, source, n_bytes)
        # Hazard: the two waits below would not wait for this copy.
        cp_async_bulk_commit_group()
        # Hazard: the next dQ would overwrite this one while it is read.
        cp_async_bulk_wait_group_read()
        mbarrier_arrive(barriers, DQ.empty + buffer)
        turn = u32(0) if adds_last(*added) else u32(rank + u32(1))
        # Hazard: the next block would add before this sum is in memory.
        cp_async_bulk_wait_group()
        st_release_gpu_u32(turns, i64(at) + 1, turn)

    @device_function
    def add_dq_of_place(smem, barriers, given, drawn, turn, number):
        _, (_, _, dq_sums, turns), mask, shape, _ = given
        by_queries = mask_of_queries(mask)
        # The place before may be stored long before its last dQ has its turn.
        places.give_back_alone(barriers)
        place, sequence, walk = walk_of(drawn, mask, shape)
        block, tiles = quotient(place.start, tile_n), places_of(place.batch, shape)
        step, head, end = first_step(walk)
        after = i32(number + count_steps(walk))
        while number < after:
            buffer, parity = dq_buffer(number)
            source = i32(dq_smem + buffer * words)
            tile, _ = tile_at(mask, step)
            added = block, tile, head, place.batch, sequence, by_queries
            rank = rank_of(*added)
            at = place_of_tile(tile, head, tiles)
            # Hazard: warpgroups may not have written this dQ yet.
            DQ.wait(barriers, buffer, parity)
            if has_place(tile, tiles):
                add_in_turn(smem, barriers, (dq_sums, turns), at, source, rank, buffer, added)
            else:
                mbarrier_arrive(barriers, DQ.empty + buffer)
            step, head, end = next_step(walk, step, head, end)
            number = i32(number + 1)
        return number, turn

    add_dq_of_places = make_each(places, add_dq_of_place)

    @device_function
    def add_dq(smem, barriers, given):
        add_dq_of_places(smem, barriers, given, i32(0))

    return add_dq
