"""Backward for what a head gives all of its scores: the share of each row of queries.

    row_gradients[i] = the sum over keys j of dS[i, j] * (derivative of the score by the argument)

The derivative is the feature's that has such an argument: of ALiBi's slope -|i - j|. Without one
it is 1. With `traits.read` it is that by the element that the program reads.

A block owns tile_m rows of Q and dO and walks over K and V in tiles of tile_n, as the dQ kernel
does; `shared.head_sums` and `shared.array_sums` add up rows. No atomics: the same bits in every
run.
"""

from numflash.configs import BackwardRowsConfig, Traits
from numflash.kernels.arguments import Pointer, Shape, Statistics, Tensor, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.portable.score_gradients import make_score_gradients
from numflash.ptx import cuda, f32, i32, mov_ctaid_x
from numflash.tiles.blocks import (
    first_of_statistics,
    last_of,
    make_place_of_queries,
    sequence_of,
    tiles_seen,
    tiles_seen_whole,
)
from numflash.tiles.features import make_args_of_head, make_gradient_of_score
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES
from numflash.tiles.portable.softmax import row_sum_of_lanes
from numflash.tiles.steps import make_steps_of, make_tile_at


def make_backward_rows_kernel(config: BackwardRowsConfig, traits: Traits) -> Kernel:
    """The kernel for one config; see the module's docstring."""
    tile_m, tile_n = config.tile_m, config.tile_n
    of_tiles = make_score_gradients(config, traits, before_program=True)
    load_queries, load_keys = of_tiles.load_queries, of_tiles.load_keys
    compute, place, rows, columns = (
        of_tiles.compute,
        of_tiles.place,
        of_tiles.rows,
        of_tiles.columns,
    )
    n_scores, storage = rows * columns, ELEMENTS[traits.dtype].storage
    place_of_queries = make_place_of_queries(tile_m)
    steps_of, tile_at = make_steps_of(traits, tile_n), make_tile_at(traits, tile_n)
    args_of_head = make_args_of_head(traits)
    gradient_of_score = make_gradient_of_score(traits)

    def backward_rows(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        plain_statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        row_gradients: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        mask: mask_of(traits),
        shape: Shape,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        s_acc = cuda.local.array(n_scores, f32)
        ds_acc = cuda.local.array(n_scores, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)
        shares = cuda.local.array(rows, f32)

        m_start, head, head_kv, batch, _ = place_of_queries(mov_ctaid_x(), shape)
        sequence, inputs = sequence_of(shape, mask), (q, k, v, do, plain_statistics)
        args = args_of_head(scores, batch, head)
        load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape)
        for r in range(rows):
            shares[r] = f32(0)

        # Tiles of keys that some of these rows see, and those that all of them see.
        row, column = place()
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(m_start, last_query, tile_n, sequence)
        n_begin, n_end = steps_of(mask, batch, head, m_start, tiles)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        for step in range(n_begin, n_end):
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            # All threads have read the K and V before these, whose place they take.
            cuda.syncthreads()
            load_keys(smem, inputs, batch, head_kv, n_start, sequence, shape)
            # Q, dO, K and V of all threads must have arrived.
            cuda.syncthreads()
            is_whole = n_start >= whole.first and n_start <= whole.last
            tile, of_rows = (m_start, n_start, is_whole, is_full), (lses, deltas)
            compute(ds_acc, s_acc, smem, of_rows, tile, sequence, scores, args)
            distance = f32(i32(m_start + row + scores.shift - n_start - column))
            for i in range(n_scores):
                more = ROW_LANES * (i // columns) - COLUMN_LANES * (i % columns)
                shares[i // columns] += gradient_of_score(ds_acc[i], distance + f32(more))

        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        for r in range(rows):
            share, i = row_sum_of_lanes(shares[r]), m_start + row + ROW_LANES * r
            if column == 0 and i < sequence.seqlen_q:
                row_gradients[first_query + i] = share

    return Kernel(config.family, backward_rows, config.num_threads, config.smem_bytes(traits))
