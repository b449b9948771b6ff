"""The walk of a block that owns keys: tiles of queries, head after head of the group.

A tile is `tile_m` rows of Q and dO with their lse and delta. `config.num_stages` tiles have their
buffers in shared memory; copies run num_stages - 1 tiles ahead of the products.
"""

from functools import cache

from numflash.configs import MmaBackwardConfig, MmaBackwardDkDvConfig, Traits
from numflash.ptx import device_function, i32
from numflash.tiles.blocks import first_of_rows, first_of_statistics
from numflash.tiles.mma.copies import make_copy_tile, make_copy_vector, make_fetch_tile
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.layouts import TileLayout


@cache
def make_fetch_queries(config: MmaBackwardDkDvConfig | MmaBackwardConfig, traits: Traits):
    """fetch_queries(smem, stage, tile, q, do, statistics, batch, sequence, shape)

    The copies of a tile, (m_block, head), to a stage. `statistics` are a `Statistics`. All threads
    of the block call it together.
    """
    element, tile_m = MMA_ELEMENTS[config.generation, traits.dtype], config.tile_m
    offsets = config.smem_offsets(traits)
    lse_smem, delta_smem = offsets["lse"], offsets["delta"]
    q_layout = TileLayout(traits.head_dim // element.per_chunk, config.swizzled)
    do_layout = TileLayout(traits.head_dim_v // element.per_chunk, config.swizzled)
    asynchronous = config.generation != "sm75" and traits.vectorized
    copy = (config.num_threads, traits.vectorized, asynchronous)
    copy_q = make_copy_tile(element, q_layout, tile_m, *copy)
    copy_do = make_copy_tile(element, do_layout, tile_m, *copy)
    fetch_q = make_fetch_tile(copy_q, offsets["q"], tile_m * q_layout.pitch, tile_m)
    fetch_do = make_fetch_tile(copy_do, offsets["do"], tile_m * do_layout.pitch, tile_m)
    copy_vector = make_copy_vector(tile_m, config.num_threads, asynchronous)

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
