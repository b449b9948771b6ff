"""The walk of a block that owns keys: tiles of queries, head after head of the group.

A tile is `tile_m` rows of Q and dO with their lse and delta. `config.num_stages` tiles have their
buffers in shared memory; copies run num_stages - 1 tiles ahead of the products.
"""

from functools import cache
from typing import NamedTuple

from numflash.configs import MmaBackwardConfig, MmaBackwardDkDvConfig, Traits
from numflash.ptx import device_function, i32
from numflash.tiles import addresses, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.mma import copies, elements
from numflash.tiles.mma.layouts import TileLayout


@cache
def make_fetch_queries(config: MmaBackwardDkDvConfig | MmaBackwardConfig, traits: Traits):
    """fetch_queries(smem, stage, tile, q, do, statistics, batch, sequence, shape)

    The copies of a tile, (m_block, head), to a stage. `statistics` are a `Statistics`. All threads
    of the block call it together.
    """
    element, tile_m = elements.MMA_ELEMENTS[config.generation, traits.dtype], config.tile_m
    offsets = config.smem_offsets(traits)
    lse_smem, delta_smem = offsets["lse"], offsets["delta"]
    q_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    do_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (config.num_threads, traits.vectorized, asynchronous)
    copy_q = copies.make_copy_tile(element, q_layout, tile_m, *copy)
    copy_do = copies.make_copy_tile(element, do_layout, tile_m, *copy)
    fetch_q = copies.make_fetch_tile(copy_q, offsets["q"], tile_m * q_layout.pitch, tile_m)
    fetch_do = copies.make_fetch_tile(copy_do, offsets["do"], tile_m * do_layout.pitch, tile_m)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    copy_vector = copies.make_copy_vector(tile_m, config.num_threads, asynchronous)

    @device_function
    def fetch_queries(smem, stage, tile, q, do, statistics, batch, sequence, shape):
        m_block, head = tile
        end = sequence.seqlen_q
        q_base = first_of_rows(q, batch, head, sequence.first_q)
        do_base = first_of_rows(do, batch, head, sequence.first_q)
        first = first_of_statistics(batch, head, shape) + sequence.first_q
        m_start, vector = i32(m_block * tile_m), tile_m * stage
        fetch_q(smem, q, q_base, m_block, stage, end, shape.head_dim)
        fetch_do(smem, do, do_base, m_block, stage, end, shape.head_dim_v)
        copy_vector(smem, lse_smem + vector, statistics.lse, first, m_start, end)
        copy_vector(smem, delta_smem + vector, statistics.delta, first, m_start, end)

    return fetch_queries


@device_function
def following(m_block, head, m_begin, m_end):
    """(m_block, head) of the tile after this one; the first of the next head after the last."""
    m_block = i32(m_block + 1)
    if m_block == m_end:
        return m_begin, i32(head + 1)
    return m_block, head


class Walk(NamedTuple):
    """The walk of a block over the tiles of queries that see its keys.

    Attributes:
        mask: by which keys list queries.
        batch, n_start: of the block.
        first_head, num_heads: its query heads.
        tiles: the `Keys` of tiles of queries that the band leaves.
    """

    mask: object
    batch: i32
    n_start: i32
    first_head: i32
    num_heads: i32
    tiles: object


@cache
def make_steps_of_heads(traits: Traits, tile_m: int):
    """Functions of a `Walk`, of which a step is (number, head, end of the head's numbers).

    count_steps(walk) -> the steps of all heads
    first_step(walk) -> the first step; its number is not below its end if there is none
    next_step(walk, number, head, end) -> the step after; behind a head's last the next head's
    """
    steps_of = steps.make_steps_of(traits, tile_m, by_keys=True)

    @device_function
    def count_steps(walk):
        return i32((walk.tiles.end - walk.tiles.begin) * walk.num_heads)

    @device_function
    def first_step(walk):
        return walk.tiles.begin, walk.first_head, walk.tiles.end

    @device_function
    def next_step(walk, number, head, end):
        number, head = following(number, head, walk.tiles.begin, walk.tiles.end)
        return number, head, end

    @device_function
    def count_listed_steps(walk):
        count = i32(0)
        for head in range(walk.first_head, walk.first_head + walk.num_heads):
            begin, end = steps_of(walk.mask, walk.batch, head, walk.n_start, walk.tiles)
            count = i32(count + end - begin)
        return count

    @device_function
    def first_from(walk, head):
        """The first step of a head or, where its list is empty, of one behind it."""
        begin, end = i32(0), i32(0)
        while begin >= end and head < walk.first_head + walk.num_heads:
            begin, end = steps_of(walk.mask, walk.batch, head, walk.n_start, walk.tiles)
            head = i32(head + 1)
        return begin, i32(head - 1), end

    @device_function
    def first_listed_step(walk):
        return first_from(walk, walk.first_head)

    @device_function
    def next_listed_step(walk, number, head, end):
        if number + 1 < end:
            return i32(number + 1), head, end
        return first_from(walk, i32(head + 1))

    if traits.blocks:
        return count_listed_steps, first_listed_step, next_listed_step
    return count_steps, first_step, next_step
