"""Backward for an array with an element for each query and key, as a bias: its gradient.

    array_gradient[b, h, i, j] = the sum of dS * (derivative of the score by the element)

over the batch entries and heads that share the element. A block owns a tile of tile_m queries and
tile_n keys of the array, and walks over these batch entries and heads, the first to the last, with
S and dP computed again for each. So no sums of parts lie in memory, and without atomics the bits
are the same in every run. A tile that no query sees is written, as zeros.
"""

from numflash.configs import Traits
from numflash.kernels.arguments import (
    Pointer,
    Reduced,
    Shape,
    Statistics,
    Tensor,
    mask_of,
    scores_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, f32, i32, i64, mov_ctaid_x
from numflash.tiles import features, steps
from numflash.tiles.division import divide, quotient, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.sequences import Keys, last_of, sequence_of_all, tiles_seen, tiles_seen_whole


def make_tiles_kernel(config, traits: Traits, of_tiles: ScoreGradients) -> Kernel:
    """The kernel of an implementation for one config; see the module's docstring."""
    tile_m, tile_n = config.tile_m, config.tile_n
    load_queries, load_keys = of_tiles.load_queries, of_tiles.load_keys
    commit, wait, compute = of_tiles.commit, of_tiles.wait, of_tiles.compute
    place, beyond = of_tiles.place, of_tiles.beyond
    rows, n_scores = of_tiles.rows, of_tiles.n_scores
    memory, alignment = of_tiles.memory, of_tiles.alignment
    storage = ELEMENTS[traits.dtype].storage
    result = ELEMENTS[traits.dtype_of_read]
    from_f32 = result.from_f32
    args_of_head = features.make_args_of_head(traits)
    steps_of, tile_at = steps.make_steps_of(traits, tile_n), steps.make_tile_at(traits, tile_n)

    def backward_tiles(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        tile_statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        array_gradient: Pointer(result.storage),  # the array's shape, contiguous
        reduced: Reduced,
        mask: mask_of(traits),
        shape: Shape,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, memory, alignment=alignment)
        s_acc = cuda.local.array(n_scores, f32)
        ds_acc = cuda.local.array(n_scores, f32)
        sums = cuda.local.array(n_scores, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)

        sequence, inputs = sequence_of_all(shape, mask), (q, k, v, do, tile_statistics)
        above, n_block = divide(i32(mov_ctaid_x()), tiles_of(sequence.seqlen_k, tile_n))
        above, m_block = divide(above, tiles_of(sequence.seqlen_q, tile_m))
        first_batch, first_head = divide(above, reduced.kept.heads)
        m_start, n_start = i32(m_block * tile_m), i32(n_block * tile_n)
        row, column = place()
        for i in range(n_scores):
            sums[i] = f32(0)

        # The tile itself if some of its queries see some of its keys, else nothing.
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        seen = tiles_seen(m_start, last_query, tile_n, sequence)
        seen = Keys(i32(max(seen.begin, n_block)), i32(min(seen.end, n_block + 1)))
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        is_whole = n_start >= whole.first and n_start <= whole.last
        for batch in range(first_batch, first_batch + reduced.summed.batch):
            for head in range(first_head, first_head + reduced.summed.heads):
                begin, end = steps_of(mask, batch, head, m_start, seen)
                for step in range(begin, end):
                    _, is_full = tile_at(mask, step)
                    args = args_of_head(scores, batch, head)
                    # All threads have read the tiles of the head before, whose place these take.
                    cuda.syncthreads()
                    load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape)
                    head_kv = quotient(head, shape.group_size)
                    load_keys(smem, 0, inputs, batch, head_kv, n_start, sequence, shape)
                    # Q, dO, K and V of all threads must have arrived.
                    commit()
                    wait()
                    cuda.syncthreads()
                    tile, of_rows = (m_start, n_start, is_whole, is_full), (lses, deltas)
                    compute(ds_acc, s_acc, smem, 0, of_rows, tile, sequence, scores, args)
                    for i in range(n_scores):
                        sums[i] += ds_acc[i]

        base = reduced.first + i64(first_batch) * reduced.batch + i64(first_head) * reduced.head
        for i in range(n_scores):
            more_rows, more_columns = beyond(i)
            r, c = i32(m_start + row + more_rows), i32(n_start + column + more_columns)
            if r < sequence.seqlen_q and c < sequence.seqlen_k:
                place_of_sum = base + i64(r) * reduced.row + i64(c) * reduced.column
                array_gradient[place_of_sum] = from_f32(sums[i])

    return Kernel(config.family, backward_tiles, config.num_threads, config.smem_bytes(traits))
