"""Backward for an array whose elements a program finds by computing: dS scattered into sums.

    fixed_sums[offset(i, j)] += dS[i, j] * (derivative of the score by the element)

A table of relative positions is such an array. Sums of floats would depend on the order in which
blocks come, so the sums are integers, which have none: 64 bits, in units of a power of two by
which the sum of all absolute values, that `backward_rows` has found, stays below 2 ** 61. Each
summand loses less than one unit. The bits are the same in every run.

A block owns tile_m rows of Q and dO and walks over K and V in tiles of tile_n. A thread adds up
neighbours that belong to one element before it goes to memory: distant keys of such a table do.
`shared.fixed_point` clears the sums, and makes floats of them.
"""

from dataclasses import replace

from numflash.configs import Traits
from numflash.kernels.arguments import (
    Pointer,
    Shape,
    Statistics,
    Tensor,
    given_of,
    mask_of,
    scores_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.shared.score_gradients import ScoreGradients
from numflash.ptx import cuda, device_function, f32, i32, i64, mov_ctaid_x, red_global_add_s64
from numflash.tiles.blocks import (
    last_of,
    make_place_of_queries,
    sequence_of,
    tiles_seen,
    tiles_seen_whole,
)
from numflash.tiles.features import make_args_of_head, make_offset
from numflash.tiles.fixed_point import is_finite_sum, scale_of_sum
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.scores import Corner, make_place
from numflash.tiles.steps import make_steps_of, make_tile_at
from numflash.tiles.unrolled import make_unrolled

# What the kernel is about where nobody asks: a table of relative positions.
_TABLE = "1;float32[1u];score=add(aux0[sub(j,i)],s)"


def of_a_read(traits: Traits) -> Traits:
    """The traits themselves, or without a read those of one of a table."""
    return traits if traits.read else replace(traits, program=_TABLE, read="0")


def make_scatter_kernel(config, traits: Traits, of_tiles: ScoreGradients) -> Kernel:
    """The kernel of an implementation for one config; see the module's docstring."""
    tile_m, tile_n = config.tile_m, config.tile_n
    load_queries, load_keys, wait = of_tiles.load_queries, of_tiles.load_keys, of_tiles.wait
    compute, place, beyond = of_tiles.compute, of_tiles.place, of_tiles.beyond
    rows, n_scores = of_tiles.rows, of_tiles.n_scores
    memory, alignment = of_tiles.memory, of_tiles.alignment
    storage = ELEMENTS[traits.dtype].storage
    place_of_queries = make_place_of_queries(tile_m)
    steps_of, tile_at = make_steps_of(traits, tile_n), make_tile_at(traits, tile_n)
    args_of_head, place_of_score = make_args_of_head(traits), make_place(True)
    known_of_head, offset = make_offset(traits)

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
        shape: Shape,
        scores: scores_of(traits.program),
    ):
        smem = cuda.shared.array(0, memory, alignment=alignment)
        s_acc = cuda.local.array(n_scores, f32)
        ds_acc = cuda.local.array(n_scores, f32)
        lses = cuda.local.array(rows, f32)
        deltas = cuda.local.array(rows, f32)
        sums = cuda.local.array(2, i64)

        m_start, head, head_kv, batch, _ = place_of_queries(mov_ctaid_x(), shape)
        sequence, inputs = sequence_of(shape, mask), (q, k, v, do, tile_statistics)
        args, known = args_of_head(scores, batch, head), known_of_head(of_sums, batch, head)
        scale, _ = scale_of_sum(absolute_sum[0])
        # The element that the last summands belong to, and their sum.
        sums[0], sums[1] = i64(0), i64(0)

        # Tiles of keys that some of these rows see, and those that all of them see.
        row, column = place()
        last_query = last_of(m_start, tile_m, sequence.seqlen_q)
        tiles = tiles_seen(m_start, last_query, tile_n, sequence)
        n_begin, n_end = steps_of(mask, batch, head, m_start, tiles)
        if not is_finite_sum(absolute_sum[0]):
            # All sums will be NaN, and there is no unit.
            n_end = n_begin
        # Without keys nothing would wait for Q and dO.
        if n_begin < n_end:
            load_queries(smem, lses, deltas, inputs, batch, head, m_start, sequence, shape)
        whole = tiles_seen_whole(m_start, last_query, tile_n, sequence)
        for step in range(n_begin, n_end):
            n_block, is_full = tile_at(mask, step)
            n_start = i32(n_block * tile_n)
            # All threads have read the K and V before these, whose place they take.
            cuda.syncthreads()
            load_keys(smem, inputs, batch, head_kv, n_start, sequence, shape)
            # Q, dO, K and V of all threads must have arrived.
            wait()
            cuda.syncthreads()
            is_whole = n_start >= whole.first and n_start <= whole.last
            tile, of_rows = (m_start, n_start, is_whole, is_full), (lses, deltas)
            compute(ds_acc, s_acc, smem, of_rows, tile, sequence, scores, args)
            corner = Corner(i32(m_start + row), i32(n_start + column), sequence, is_full)
            add_all(0, ds_acc, sums, fixed_sums, scale, corner, scores, known)
        if sums[1] != 0:
            red_global_add_s64(fixed_sums, sums[0], sums[1])

    return Kernel(config.family, backward_scatter, config.num_threads, config.smem_bytes(traits))
