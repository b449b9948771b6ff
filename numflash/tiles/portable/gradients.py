"""The softmax backward on a tile in registers: P again from the scores, and dS.

    P  = exp(S - lse)                           from the forward's log-sum-exp
    dS = P * (softmax_scale dP - delta)         delta = softmax_scale rowsum(O * dO)

dS is the gradient of Q K^T before scaling. It is as large as the terms that dQ and dK sum up, so
that it fits a type that they fit.

lse and delta belong to queries, which are the rows of a tile in the dQ kernel and the columns in
the dK, dV kernel; `by_row` says which.
"""

import math
from functools import cache

from numflash.ptx import device_function, f32, fma_rn_f32, st_shared_f32
from numflash.tiles.portable.dropout import make_weight
from numflash.tiles.portable.lanes import COLUMN_LANES, ROW_LANES
from numflash.tiles.portable.softmax import exp_f32
from numflash.tiles.scores import NEG_INF


@cache
def make_load_query_statistics(count, step):
    """load_query_statistics(lses, deltas, statistics, base, first, end)

    lses[i], deltas[i] of the queries first + step * i, from the `lse` and `delta` of `statistics`
    behind `base`. A query past `end`, and one that saw no key, gets lse +inf, which makes its P
    zero everywhere.
    """

    @device_function
    def load_query_statistics(lses, deltas, statistics, base, first, end):
        for i in range(count):
            query = first + step * i
            lses[i] = f32(math.inf)
            deltas[i] = f32(0)
            if query < end and statistics.lse[base + query] != NEG_INF:
                lses[i] = statistics.lse[base + query]
                deltas[i] = statistics.delta[base + query]

    return load_query_statistics


@cache
def make_softmax_backward(rows, columns, traits, by_row, of_scores=False):
    """softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, kept)

    S -> P and dP -> dS, in place; `scales` are softmax_scale and the factor of weights that
    dropout keeps, over which `delta` is.

    `slopes` holds the derivative of each score by the scaled product, if a function of `traits`
    bends scores, but where dS is to be `of_scores`, as they go into the softmax. With dropout
    `kept` says of which scores P and dP count (`tiles.portable.dropout`).
    """
    n_scores, weight, drops = rows * columns, make_weight(traits.features), traits.drops_weights
    has_slopes = traits.bends_scores and not of_scores
    slopes_are_finite = not traits.program_bends

    @device_function
    def softmax_backward(s_acc, dp_acc, slopes, lses, deltas, scales, kept):
        softmax_scale, factor = scales
        for i in range(n_scores):
            query = i // columns if by_row else i % columns
            probability = exp_f32(s_acc[i] - lses[query])
            if drops:
                probability *= factor
            gradient = weight(kept, i, dp_acc[i])
            gradient = probability * fma_rn_f32(gradient, softmax_scale, -deltas[query])
            if has_slopes:
                gradient *= slopes[i]
                if not slopes_are_finite:
                    # A function may bend without bound where P is 0, as the logarithm at 0.
                    gradient = gradient if probability > f32(0) else f32(0)
            s_acc[i] = weight(kept, i, probability)
            dp_acc[i] = gradient

    return softmax_backward


@cache
def make_store_scores(rows, columns, pitch):
    """store_scores(acc, smem, p): a tile of P or dS to shared memory, for the next product.

    `p` is this thread's first element of the tile.
    """

    @device_function
    def store_scores(acc, smem, p):
        for r in range(rows):
            for c in range(columns):
                target = p + ROW_LANES * pitch * r + COLUMN_LANES * c
                st_shared_f32(smem, target, acc[columns * r + c])

    return store_scores
