"""Combine: O and lse of a forward whose keys were split, from its parts.

    lse = log sum_s exp(lse_s),   O = sum_s exp(lse_s - lse) O_s

One warp computes one row. The parts are float32, contiguous: (split, batch, seqlen, head, padded
head_dim_v) and (split, batch, head, seqlen).

Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding.
"""

import math

from numflash.configs import CombineConfig, Traits
from numflash.kernels.kernel import Kernel
from numflash.ptx import Pointer, cuda, f32, fma_rn_f32, i32, i64, max_f32
from numflash.tiles.elements import ELEMENTS
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.scores import NEG_INF
from numflash.tiles.softmax import exp_f32


def make_combine_kernel(config: CombineConfig, traits: Traits) -> Kernel:
    """The combine kernel for one config; see the module's docstring."""
    element, num_warps = ELEMENTS[traits.dtype], config.num_warps
    storage, from_f32 = element.storage, element.from_f32
    pitch, columns_per_lane = traits.head_dim_v, traits.head_dim_v // 32

    def combine(
        parts: Pointer(f32),
        part_lses: Pointer(f32),
        out: Pointer(storage),
        lse: Pointer(f32),
        out_batch: i64,
        out_row: i64,
        out_head: i64,
        batch_size: i32,
        seqlen_q: i32,
        num_heads_q: i32,
        head_dim_v: i32,
        num_splits: i32,
    ):
        sums = cuda.local.array(columns_per_lane, f32)
        lane = cuda.threadIdx.x % 32
        num_blocks = (seqlen_q + num_warps - 1) // num_warps
        row = cuda.blockIdx.x % num_blocks * num_warps + cuda.threadIdx.x // 32
        head_of_batch = cuda.blockIdx.x // num_blocks
        batch, head = head_of_batch // num_heads_q, head_of_batch % num_heads_q
        if row < seqlen_q:
            lse_row = i64(head_of_batch) * seqlen_q + row
            lse_step = i64(batch_size) * num_heads_q * seqlen_q
            part_row = (i64(batch) * seqlen_q + row) * num_heads_q + head

            largest = NEG_INF
            for split in range(lane, num_splits, 32):
                largest = max_f32(largest, part_lses[split * lse_step + lse_row])
            for distance in (16, 8, 4, 2, 1):
                largest = max_f32(largest, cuda.shfl_xor_sync(FULL_WARP, largest, distance))
            # A row that sees no key has lse -inf in every part, and -inf - -inf would be NaN.
            shift = largest if largest > NEG_INF else f32(0)
            total = f32(0)
            for i in range(columns_per_lane):
                sums[i] = f32(0)
            for split in range(num_splits):
                weight = exp_f32(part_lses[split * lse_step + lse_row] - shift)
                total += weight
                for i in range(columns_per_lane):
                    column = lane + 32 * i
                    if column < head_dim_v:
                        offset = (split * lse_step + part_row) * pitch + column
                        sums[i] = fma_rn_f32(weight, parts[offset], sums[i])

            reciprocal = f32(1) / total if total != f32(0) else f32(0)
            for i in range(columns_per_lane):
                column = lane + 32 * i
                if column < head_dim_v:
                    offset = batch * out_batch + row * out_row + head * out_head + column
                    out[offset] = from_f32(sums[i] * reciprocal)
            if lane == 0:
                row_lse = NEG_INF
                if total != f32(0):
                    row_lse = shift + f32(math.log(total))
                lse[lse_row] = row_lse

    return Kernel(config.family, combine, config.num_threads, 0)
