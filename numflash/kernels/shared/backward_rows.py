"""Backward for what a head gives all of its scores: the share of each row of queries.

    row_gradients[i] = the sum over keys j of dS[i, j] * (derivative of the score by the argument)

The derivative is the feature's that has such an argument: of ALiBi's slope -|i - j|. Without one
it is 1. With `traits.read` it is that by the element that the program reads.

A block owns tile_m rows of Q and dO and walks over K and V, as the dQ kernel does without its last
product (`shared.keys`); `shared.array_sums` adds up rows. No atomics: the same bits in every run.
"""

from numflash.configs import Traits
from numflash.kernels.arguments import Pointer, Statistics, Tensor, mask_of, scores_of, shape_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.shared.keys import Block, make_walk_over_keys
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, i32, mov_ctaid_x
from numflash.tiles import addresses, blocks, features, sequences
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.unrolled import make_unrolled


def make_rows_kernel(config, traits: Traits, of_tiles: ScoreGradients) -> Kernel:
    """The kernel of an implementation for one config; see the module's docstring."""
    place, beyond, rows_beyond = of_tiles.place, of_tiles.beyond, of_tiles.rows_beyond
    row_of, sum_of_row = of_tiles.row_of, of_tiles.sum_of_row
    rows, n_scores = of_tiles.rows, of_tiles.n_scores
    memory, alignment = of_tiles.memory, of_tiles.alignment
    storage = ELEMENTS[traits.dtype].storage
    place_of_queries = blocks.make_place_of_queries(config.tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    first_of_statistics = addresses.make_first_of_statistics(traits)
    args_of_head = features.make_args_of_head(traits)
    gradient_of_score = features.make_gradient_of_score(traits)

    @device_function
    def add(e, ds_acc, shares, distance):
        """Each thread adds up its part of the rows."""
        more_rows, more_columns = beyond(e)
        farther = distance + f32(more_rows - more_columns)
        shares[row_of(e)] += gradient_of_score(ds_acc[e], farther)

    # As a loop the compiler may not unroll it, and scores would lie in local memory.
    add_all = make_unrolled(add, n_scores)

    @device_function
    def take(ds_acc, shares, corner, scores, more):
        distance = f32(i32(corner.row + scores.shift + corner.sequence.shift - corner.column))
        add_all(0, ds_acc, shares, distance)

    walk = make_walk_over_keys(config, traits, of_tiles, take)

    def backward_rows(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        tile_statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        row_gradients: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, memory, alignment=alignment)
        shares = cuda.local.array(rows, f32)
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        at = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, head_kv, batch, _ = at[:5]
        sequence, inputs = sequence_of(at, shape, mask), (q, k, v, do, tile_statistics)
        args = args_of_head(scores, batch, head)
        for r in range(rows):
            shares[r] = f32(0)
        block = Block(m_start, head, head_kv, batch, sequence)
        walk(smem, shares, inputs, block, mask, shape, scores, args, 0)

        row, column = place()
        first_query = first_of_statistics(batch, head, shape) + sequence.first_q
        for r in range(rows):
            share, i = sum_of_row(shares[r]), i32(m_start + row + rows_beyond(r))
            if column == 0 and i < sequence.seqlen_q:
                row_gradients[first_query + i] = share

    return Kernel(config.family, backward_rows, config.num_threads, config.smem_bytes(traits))
