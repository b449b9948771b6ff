"""Blocks of a cluster, which have one tile of rows together and fetch its K and V for each other.

A cluster takes a place of the walk (`tiles.blocks.make_walk`), and each of its blocks tile_m of
the rows. K and V of a stage come to all blocks: each fetches the rows of its rank, and the copy is
a multicast to the same places in the shared memory of all. Nothing of this is in the machine code
where a block is alone.
"""

from functools import cache

from numflash.ptx import cuda, device_function, i32, u16
from numflash.ptx.bulk_copies import cp_async_bulk_tensor_4d, cp_async_bulk_tensor_5d
from numflash.ptx.clusters import (
    barrier_cluster_arrive,
    barrier_cluster_wait,
    cp_async_bulk_tensor_4d_multicast,
    cp_async_bulk_tensor_5d_multicast,
    mov_cluster_ctarank,
)
from numflash.tiles.blocks import Place, RaggedPlace


@device_function
def meet_cluster():
    """All threads of all blocks of a cluster wait for each other, with what they have written."""
    # Hazard: the barrier is of whole warps, and one lane of a warp may have worked alone.
    cuda.syncwarp()
    # Hazard: a block would use what another has not made yet, or has given up already.
    barrier_cluster_arrive()
    barrier_cluster_wait()


@device_function
def _all_of_them(place):
    return place


@cache
def make_own_rows(cluster, tile_m, traits):
    """own_rows(place): the `Place` of this block's rows in the place of its cluster.

    Rows past the end are of no block: it may begin there.
    """
    if cluster == 1:
        return _all_of_them
    ragged = traits.ragged

    @device_function
    def own_rows(place):
        start, head, head_kv, batch, split = place[:5]
        start = i32(start + mov_cluster_ctarank() * tile_m)
        if ragged:
            sequence, tiles, slot = place.sequence, place.tiles, place.slot
            return RaggedPlace(start, head, head_kv, batch, split, sequence, tiles, slot)
        return Place(start, head, head_kv, batch, split)

    return own_rows


@cache
def make_share(cluster, rows):
    """first_of_share(): the first of `rows` rows of a buffer that this block fetches for all."""
    share = rows // cluster

    @device_function
    def first_of_share():
        return i32(mov_cluster_ctarank() * share) if cluster > 1 else i32(0)

    return first_of_share


@cache
def make_loads(cluster):
    """(load_4d, load_5d): `cp_async_bulk_tensor_4d` and `_5d`, to all blocks of a cluster."""
    if cluster == 1:
        return cp_async_bulk_tensor_4d, cp_async_bulk_tensor_5d
    blocks = u16((1 << cluster) - 1)

    @device_function
    def load_4d(target, offset, tensor_map, barriers, index, policy, c0, c1, c2, c3):
        cp_async_bulk_tensor_4d_multicast(
            target, offset, tensor_map, barriers, index, policy, blocks, c0, c1, c2, c3
        )

    @device_function
    def load_5d(target, offset, tensor_map, barriers, index, policy, c0, c1, c2, c3, c4):
        cp_async_bulk_tensor_5d_multicast(
            target, offset, tensor_map, barriers, index, policy, blocks, c0, c1, c2, c3, c4
        )

    return load_4d, load_5d
