"""The walk of a block that owns queries and wants dS: tiles of keys, one after another.

A block owns tile_m rows of Q and dO, and walks over K and V in tiles of tile_n. There are buffers
in shared memory for `ScoreGradients.num_stages` tiles; copies run num_stages - 1 tiles ahead of
the products.
"""

from typing import NamedTuple

from numflash.configs import Traits
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, i32
from numflash.tiles import steps
from numflash.tiles.scores import Corner
from numflash.tiles.sequences import last_of, tiles_seen, tiles_seen_whole


class Block(NamedTuple):
    """What a block owns: the queries from `m_start` on of a head, in a `Sequence`."""

    m_start: i32
    head: i32
    head_kv: i32
    batch: i32
    sequence: object


def make_walk_over_keys(config, traits: Traits, of_tiles: ScoreGradients, take):
    """walk(smem, sums, inputs, block, mask, shape, scores, args, more)

    For each tile, in order, it calls take(ds_acc, sums, corner, scores, more) with dS of the tile;
    `corner` is the thread's, and `sums` and `more` are the caller's. All threads of a block call
    it together.
    """
    tile_m, tile_n, num_stages = config.tile_m, config.tile_n, of_tiles.num_stages
    load_queries, load_keys = of_tiles.load_queries, of_tiles.load_keys
    commit, wait, compute = of_tiles.commit, of_tiles.wait, of_tiles.compute
    place, rows, n_scores = of_tiles.place, of_tiles.rows, of_tiles.n_scores
    steps_of, tile_at = steps.make_steps_of(traits, tile_n), steps.make_tile_at(traits, tile_n)

    @device_function
    def walk(smem, sums, inputs, block, mask, shape, scores, args, more):
        s_acc = cuda.local.array(n_scores, f32)
        ds_acc = cuda.local.array(n_scores, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)
        m_start, head, head_kv, batch, sequence = block
        row, column = place()

        # Tiles of keys that some of these rows see, and those that all of them see.
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(m_start, last_query, tile_n, sequence)
        n_begin, n_end = steps_of(mask, batch, head, m_start, tiles)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        # Without keys nothing would wait for Q and dO.
        if n_begin < n_end:
            load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape)
        for stage in range(num_stages - 1):
            n = i32(n_begin + stage)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                n_start = i32(n_block * tile_n)
                load_keys(smem, stage, inputs, batch, head_kv, n_start, sequence, shape)
            commit()

        stage = i32(0)
        last_stage = i32(num_stages - 1)
        for step in range(n_begin, n_end):
            # The tile must have arrived, unless there is only one stage. The barrier shows it to
            # all threads, and all have read the tile before it, whose buffer is written again.
            if num_stages > 1:
                wait()
            cuda.syncthreads()
            n = i32(step + num_stages - 1)
            if n < n_end:
                n_block, _ = tile_at(mask, n)
                n_start = i32(n_block * tile_n)
                load_keys(smem, last_stage, inputs, batch, head_kv, n_start, sequence, shape)
            commit()
            if num_stages == 1:
                # The only buffer must have been filled, for all threads.
                wait()
                cuda.syncthreads()
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            is_whole = n_start >= whole.first and n_start <= whole.last
            tile, of_rows = (m_start, n_start, is_whole, is_full), (lses, deltas)
            compute(ds_acc, s_acc, smem, stage, of_rows, tile, sequence, scores, args)
            corner = Corner(i32(m_start + row), i32(n_start + column), sequence, is_full)
            take(ds_acc, sums, corner, scores, more)
            last_stage = stage
            stage = i32(stage + 1 if stage + 1 < num_stages else 0)

    return walk
