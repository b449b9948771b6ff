"""Estimate: the error that 8 bits would make in the result of each key-value head.

From sums that the quantisation makes for blocks of tokens, of squares and of squared errors:

    error ** 2 = score noise + V's relative noise + P's relative noise
    score noise = softmax_scale ** 2 / rotated dims * (|q|^2 |dk|^2 + |dq|^2 |k|^2)

with the largest |q|^2, |dq|^2 a token of any block of the group's query heads, likewise of k. A
change ds of a score changes its probability by the factor 1 + ds; independent changes of
probabilities change the result by as much, relative to its size where it is small because many
values cancel. Rotated rows make errors of all directions alike, which the formula assumes.

A warp estimates one key-value head and decides: 8 bits where the estimate is within the budget.
"""

import math

from numflash.configs import EstimateConfig, Traits
from numflash.kernels.arguments import Pointer, Shape
from numflash.kernels.kernel import Kernel
from numflash.kernels.quantize.arguments import Squares
from numflash.ptx import cuda, device_function, f32, fma_rn_f32, i32, i64, max_f32
from numflash.tiles.division import divide, tiles_of
from numflash.tiles.portable.lanes import FULL_WARP

P_NOISE = f32(7.05e-4)
"""Mean square of e4m3's relative rounding error: 2 ** -6 / 12 times the mean of 1 / m ** 2 for
m = 1 to 2, spread as logarithms are: 3 / 8 / log 2."""


def make_estimate_kernel(config: EstimateConfig, traits: Traits) -> Kernel:
    """The estimating kernel; see the module's docstring."""

    @device_function
    def largest_of_warp(x):
        for distance in (16, 8, 4, 2, 1):
            x = max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, distance))
        return x

    @device_function
    def largest_per_token(squares, first, blocks, kind, seqlen):
        """The largest mean over the tokens of a block; infinite if one is not a number."""
        largest = f32(0)
        for i in range(cuda.threadIdx.x, blocks, 32):
            _, block = divide(i, tiles_of(seqlen, squares.tokens))
            count = min(squares.tokens, seqlen - block * squares.tokens)
            mean = squares.data[2 * (first + i) + kind] / f32(count)
            largest = mean if mean > largest else largest
            if mean != mean:
                largest = f32(math.inf)
        return largest_of_warp(largest)

    @device_function
    def largest_share(statistics, first, blocks):
        """The largest squared error relative to the squares of a block."""
        largest = f32(0)
        for i in range(cuda.threadIdx.x, blocks, 32):
            squares, errors = statistics[2 * (first + i)], statistics[2 * (first + i) + 1]
            share = errors / squares if squares != f32(0) else f32(0)
            largest = share if share > largest else largest
            if share != share:
                largest = f32(math.inf)
        return largest_of_warp(largest)

    def estimate(
        q: Squares,  # (batch, num_heads_q, blocks of tokens, 2)
        k: Squares,  # (batch, num_heads_kv, blocks of tokens, 2)
        v: Squares,  # (batch, num_heads_kv, blocks of tokens, 2)
        estimate: Pointer(f32),  # (batch, num_heads_kv)
        in_fp8: Pointer(i32),  # (batch, num_heads_kv)
        shape: Shape,
        rotated_dims: i32,
        softmax_scale: f32,
        max_rel_error: f32,
    ):
        head = cuda.blockIdx.x
        q_blocks = tiles_of(shape.seqlen_q, q.tokens) * shape.group_size
        k_blocks, v_blocks = tiles_of(shape.seqlen_k, k.tokens), tiles_of(shape.seqlen_k, v.tokens)
        q_first, k_first = i64(head) * q_blocks, i64(head) * k_blocks
        q_size = largest_per_token(q, q_first, q_blocks, 0, shape.seqlen_q)
        dq_size = largest_per_token(q, q_first, q_blocks, 1, shape.seqlen_q)
        k_size = largest_per_token(k, k_first, k_blocks, 0, shape.seqlen_k)
        dk_size = largest_per_token(k, k_first, k_blocks, 1, shape.seqlen_k)
        scale = softmax_scale * softmax_scale / f32(rotated_dims)
        scores = fma_rn_f32(q_size, dk_size, dq_size * k_size)
        values = largest_share(v.data, i64(head) * v_blocks, v_blocks)
        noise = fma_rn_f32(scale, scores, values + P_NOISE)
        if cuda.threadIdx.x == 0:
            error = f32(math.sqrt(noise))
            estimate[head] = error
            in_fp8[head] = i32(1) if error <= max_rel_error else i32(0)

    return Kernel(config.family, estimate, config.num_threads, config.smem_bytes(traits))
