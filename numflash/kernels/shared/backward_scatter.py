"""Backward for an array whose elements a program finds by computing: dS scattered into sums.

    fixed_sums[offset(i, j)] += dS[i, j] * (derivative of the score by the element)

A table of relative positions is such an array. Sums of floats would depend on the order in which
blocks come, so the sums are integers, which have none: 64 bits, in units of a power of two by
which the sum of all absolute values, that `backward_rows` has found, stays below 2 ** 61. Each
summand loses less than one unit. The bits are the same in every run.

A block owns tile_m rows of Q and dO and walks over K and V (`shared.keys`). A thread adds up
neighbours that belong to one element before it goes to memory: distant keys of such a table do.
`shared.fixed_point` clears the sums, and makes floats of them.
"""

from dataclasses import replace

from numflash.configs import Traits
from numflash.kernels.arguments import (
    Pointer,
    Statistics,
    Tensor,
    given_of,
    mask_of,
    scores_of,
    shape_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.shared.keys import Block, make_walk_over_keys
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, i64, mov_ctaid_x, red_global_add_s64
from numflash.tiles import blocks, features, sequences
from numflash.tiles.fixed_point import is_finite_sum, scale_of_sum
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.scores import make_place
from numflash.tiles.unrolled import make_unrolled

# What the kernel is about where nobody asks: a table of relative positions.
_TABLE = "1;float32[1u];score=add(aux0[sub(j,i)],s)"


def of_a_read(traits: Traits) -> Traits:
    """The traits themselves, or without a read those of one of a table."""
    return traits if traits.read else replace(traits, program=_TABLE, read="0")


def make_scatter_kernel(config, traits: Traits, of_tiles: ScoreGradients) -> Kernel:
    """The kernel of an implementation for one config; see the module's docstring."""
    beyond, n_scores = of_tiles.beyond, of_tiles.n_scores
    memory, alignment = of_tiles.memory, of_tiles.alignment
    storage = ELEMENTS[traits.dtype].storage
    place_of_queries = blocks.make_place_of_queries(config.tile_m, traits)
    sequence_of, is_idle = sequences.make_sequence_of(traits), blocks.make_is_idle(traits)
    args_of_head, place_of_score = features.make_args_of_head(traits), make_place(True)
    known_of_head, offset = features.make_offset(traits)

    @device_function
    def add(e, ds_acc, sums, fixed_sums, scale, corner, scores, known):
        """Take in score e: `sums` are the element that the last went to, and its sum."""
        summand = i64(ds_acc[e] * scale)
        if summand != 0:
            r, c = beyond(e)
            i, j = place_of_score(corner, r, c, scores)
            target = offset(f32(0), i, j, known)
            if target != sums[0]:
                if sums[1] != 0:
                    red_global_add_s64(fixed_sums, sums[0], sums[1])
                sums[0], sums[1] = target, i64(0)
            sums[1] += summand

    # As a loop the compiler would not unroll it, and scores would lie in local memory.
    add_all = make_unrolled(add, n_scores)

    @device_function
    def take(ds_acc, sums, corner, scores, more):
        fixed_sums, scale, known = more
        add_all(0, ds_acc, sums, fixed_sums, scale, corner, scores, known)

    walk = make_walk_over_keys(config, traits, of_tiles, take)

    def backward_scatter(
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim)
        v: Tensor[storage],  # (batch, seqlen_k, num_heads_kv, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        tile_statistics: Statistics,  # both (batch, num_heads_q, seqlen_q)
        absolute_sum: Pointer(f32),  # (1,)
        fixed_sums: Pointer(i64),  # the array's shape, contiguous
        of_sums: given_of(traits.program),  # `scores.given` with the strides of fixed_sums
        mask: mask_of(traits),
        shape: shape_of(traits),
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, memory, alignment=alignment)
        sums = cuda.local.array(2, i64)
        # The grid is as long as a list of tiles may be: this one may be shorter.
        if is_idle(mov_ctaid_x(), shape.num_heads_q, shape):
            return
        at = place_of_queries(mov_ctaid_x(), shape, mask)
        m_start, head, head_kv, batch, _ = at[:5]
        sequence, inputs = sequence_of(at, shape, mask), (q, k, v, do, tile_statistics)
        args, known = args_of_head(scores, batch, head), known_of_head(of_sums, batch, head)
        scale, _ = scale_of_sum(absolute_sum[0])
        # The element that the last summands belong to, and their sum.
        sums[0], sums[1] = i64(0), i64(0)
        # Else all sums will be NaN, and there is no unit.
        if is_finite_sum(absolute_sum[0]):
            block = Block(m_start, head, head_kv, batch, sequence)
            more = fixed_sums, scale, known
            walk(smem, sums, inputs, block, mask, shape, scores, args, more)
        if sums[1] != 0:
            red_global_add_s64(fixed_sums, sums[0], sums[1])

    return Kernel(config.family, backward_scatter, config.num_threads, config.smem_bytes(traits))
