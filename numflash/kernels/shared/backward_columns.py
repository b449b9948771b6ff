"""Backward for an array with an element for each key: the share of each head.

    column_gradients[j] = the sum over queries i of dS[i, j] * (derivative by the element)

A block owns tile_n keys of one query head and walks over Q and dO in tiles of tile_m. A thread
sums its rows, then the lanes of a column, then the warps, each in order; `shared.array_sums` adds
up the heads that share an element. No atomics: the same bits in every run.
"""

from numflash.configs import Traits
from numflash.kernels.arguments import Pointer, Shape, Statistics, Tensor, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x, st_shared_f32
from numflash.tiles import features, steps
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import quotient, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.sequences import (
    last_of,
    seen_from_keys,
    sequence_of_all,
    tiles_seen,
    tiles_seen_whole,
)


def make_columns_kernel(config, traits: Traits, of_tiles: ScoreGradients) -> Kernel:
    """The kernel of an implementation for one config; see the module's docstring."""
    tile_m, tile_n = config.tile_m, config.tile_n
    num_warps, num_threads = config.num_warps, config.num_threads
    load_queries, load_keys = of_tiles.load_queries, of_tiles.load_keys
    commit, wait, compute, place = of_tiles.commit, of_tiles.wait, of_tiles.compute, of_tiles.place
    rows, n_scores = of_tiles.rows, of_tiles.n_scores
    memory, alignment = of_tiles.memory, of_tiles.alignment
    storage = ELEMENTS[traits.dtype].storage
    columns = of_tiles.columns
    column_of = of_tiles.column_of
    columns_beyond = of_tiles.columns_beyond
    sum_of_column, leads_column = of_tiles.sum_of_column, of_tiles.leads_column
    read_float = of_tiles.read_float
    args_of_head = features.make_args_of_head(traits)
    steps_of = steps.make_steps_of(traits, tile_m, by_keys=True)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)

    def backward_columns(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        tile_statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        column_gradients: Pointer(f32),  # (batch, num_heads_q, seqlen_k)
        mask: mask_of(traits),
        shape: Shape,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, memory, alignment=alignment)
        s_acc = cuda.local.array(n_scores, f32)
        ds_acc = cuda.local.array(n_scores, f32)
        sums = cuda.local.array(columns, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)

        sequence, inputs = sequence_of_all(shape, mask), (q, k, v, do, tile_statistics)
        num_tiles = tiles_of(sequence.seqlen_k, tile_n)
        n_block, head, batch = place_in_heads(i32(mov_ctaid_x()), num_tiles, shape.num_heads_q)
        n_start, head_kv = i32(n_block * tile_n), quotient(head, shape.group_size)
        args = args_of_head(scores, batch, head)
        for c in range(columns):
            sums[c] = f32(0)

        # Tiles of queries that see some of these keys, and those that see all of them.
        from_keys, last_key = seen_from_keys(sequence), last_of(n_start, tile_n, sequence.seqlen_k)
        tiles = tiles_seen(n_start, last_key, tile_m, from_keys)
        m_begin, m_end = steps_of(mask, batch, head, n_start, tiles)
        whole = tiles_seen_whole(n_start, last_key, tile_m, from_keys)
        # Without queries nothing would wait for K and V.
        if m_begin < m_end:
            load_keys(smem, 0, inputs, batch, head_kv, n_start, sequence, shape)
        for step in range(m_begin, m_end):
            m_block, is_full = tile_at(mask, step)
            m_start = i32(m_block * tile_m)
            # All threads have read the Q and dO before these, whose place they take.
            cuda.syncthreads()
            load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape)
            # K, V, Q and dO of all threads must have arrived.
            commit()
            wait()
            cuda.syncthreads()
            is_whole = m_start >= whole.first and m_start <= whole.last
            tile, of_rows = (m_start, n_start, is_whole, is_full), (lses, deltas)
            compute(ds_acc, s_acc, smem, 0, of_rows, tile, sequence, scores, args)
            for i in range(n_scores):
                sums[column_of(i)] += ds_acc[i]

        _, column = place()
        warp = cuda.threadIdx.x // 32
        # All threads have read the tiles, whose place the sums take.
        cuda.syncthreads()
        for c in range(columns):
            total = sum_of_column(sums[c])
            if leads_column():
                st_shared_f32(smem, tile_n * warp + column + columns_beyond(c), total)
        # The sums of all warps must have arrived.
        cuda.syncthreads()
        first_key = i64(batch * shape.num_heads_q + head) * shape.seqlen_k + sequence.first_k
        for c in range(cuda.threadIdx.x, tile_n, num_threads):
            if n_start + c < sequence.seqlen_k:
                total = f32(0)
                for w in range(num_warps):
                    total += read_float(smem, tile_n * w + c)
                column_gradients[first_key + n_start + c] = total

    return Kernel(config.family, backward_columns, num_threads, config.smem_bytes(traits))
