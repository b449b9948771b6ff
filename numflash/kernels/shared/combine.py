"""Combine: O and lse of a forward whose keys were split, from its parts.

    lse = log sum_s exp(lse_s),   O = sum_s exp(lse_s - lse) O_s

Here the row ends (`tiles.rows`): parts are rows by themselves, without what features join to one.

One block computes one row. Split s belongs to chain s % 16; each chain is summed up in order, one
warp at a time, and the chains in order at the end. The order depends on a split's number alone:
not on how many there are, nor on how many warps share the chains. The parts are float32,
contiguous: (split, batch, seqlen, head, padded head_dim_v) and (split, batch, head, seqlen).

Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding.
"""

from numflash.configs import CombineConfig, Traits
from numflash.configs.features import Features
from numflash.kernels.arguments import Pointer, Shape, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import (
    cuda,
    device_function,
    f32,
    fma_rn_f32,
    i32,
    i64,
    ld_global_v4_f32,
    ld_shared_v4_f32,
    max_f32,
    st_shared_f32,
    st_shared_v4_f32,
)
from numflash.tiles.blocks import first_of_rows, first_of_statistics, place_in_heads
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.portable.softmax import exp_f32
from numflash.tiles.rows import NATURAL, make_end_of_row

# The lowest float32 that is a number.
LOWEST = f32(-(2 - 2**-23) * 2.0**127)
# Columns that one warp covers with 16 bytes a lane.
_WARP_COLUMNS = 128


def make_combine_kernel(config: CombineConfig, traits: Traits) -> Kernel:
    """The combine kernel for one config; see the module's docstring."""
    element, num_warps, chains = ELEMENTS[traits.out_dtype], config.num_warps, config.num_chains
    storage, from_f32, store_four = element.storage, element.from_f32, element.store_four
    pitch, vectorized, num_threads = traits.head_dim_v, traits.vectorized, config.num_threads
    # A lane has four neighbouring columns of each group; a warp has every num_warps-th chain.
    groups, chains_per_warp = -(-pitch // _WARP_COLUMNS), chains // num_warps
    n_loads, totals_smem = groups * chains_per_warp, chains * pitch
    n_sums = 4 * n_loads
    end_of_row, lse_of_row = make_end_of_row(traits.features, NATURAL)
    add_round, add_last_round = (_make_add_round(config, pitch, last) for last in (False, True))

    def combine(
        parts: Pointer(f32),  # (split, batch, seqlen_q, num_heads_q, padded head_dim_v)
        part_lses: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q)
        out: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        shape: Shape,
        num_splits: i32,
        features: Features,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        sums = cuda.local.array(n_sums, f32)
        totals = cuda.local.array(chains_per_warp, f32)
        part = cuda.local.array(4, f32)
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        # From `blockIdx` the loop over parts is 12 instructions shorter than from `mov_ctaid_x`.
        row, head, batch = place_in_heads(cuda.blockIdx.x, shape.seqlen_q, shape.num_heads_q)
        lse_row = first_of_statistics(batch, head, shape) + row
        lse_step = i64(shape.batch_size) * shape.num_heads_q * shape.seqlen_q
        part_row = (i64(batch) * shape.seqlen_q + row) * shape.num_heads_q + head

        # Finite: a row that sees no key has lse -inf in every part, and -inf - -inf would be NaN.
        largest = LOWEST
        for split in range(lane, num_splits, 32):
            largest = max_f32(largest, part_lses[split * lse_step + lse_row])
        for distance in (16, 8, 4, 2, 1):
            largest = max_f32(largest, cuda.shfl_xor_sync(FULL_WARP, largest, distance))

        for i in range(chains_per_warp):
            totals[i] = f32(0)
        for i in range(n_sums):
            sums[i] = f32(0)
        whole_rounds = num_splits // chains * chains
        for first in range(0, whole_rounds, chains):
            place = i32(first + warp), num_splits, lse_step, lse_row, part_row
            add_round(sums, totals, parts, part_lses, largest, place)
        if whole_rounds < num_splits:
            place = i32(whole_rounds + warp), num_splits, lse_step, lse_row, part_row
            add_last_round(sums, totals, parts, part_lses, largest, place)

        for i in range(n_loads):
            column = 4 * lane + _WARP_COLUMNS * (i % groups)
            if column < pitch:
                chain = warp + num_warps * (i // groups)
                st_shared_v4_f32(smem, pitch * chain + column, sums[4 * i : 4 * i + 4])
        if lane == 0:
            for i in range(chains_per_warp):
                st_shared_f32(smem, totals_smem + warp + num_warps * i, totals[i])
        # The chains of all warps must have arrived.
        cuda.syncthreads()

        # The place is computed again, so that no register keeps it through the loop.
        row, head, batch = place_in_heads(cuda.blockIdx.x, shape.seqlen_q, shape.num_heads_q)
        whole = f32(0)
        for chain in range(chains):
            whole += smem[totals_smem + chain]
        factor, top, whole = end_of_row(largest, whole, features, batch, head)
        for column in range(4 * cuda.threadIdx.x, shape.head_dim_v, 4 * num_threads):
            for j in range(4):
                sums[j] = f32(0)
            for chain in range(chains):
                ld_shared_v4_f32(part, smem, pitch * chain + column)
                for j in range(4):
                    sums[j] += part[j]
            for j in range(4):
                sums[j] *= factor
            offset = first_of_rows(out, batch, head, row) + column
            if vectorized:
                store_four(out.data, offset, sums[0:4])
            else:
                for j in range(4):
                    if column + j < shape.head_dim_v:
                        out.data[offset + j] = from_f32(sums[j])
        if cuda.threadIdx.x == 0:
            lse[lse_row] = lse_of_row(top, whole)

    return Kernel(config.family, combine, num_threads, config.smem_bytes(traits))


def _make_add_round(config: CombineConfig, pitch: int, last: bool):
    """add_round(sums, totals, parts, part_lses, shift, place)

    A warp adds a split to each of its chains. `place` is (first split of the warp, num_splits,
    elements of part_lses a split, this row of part_lses, this row of a part). The last round may
    have fewer splits than chains.
    """
    num_warps, chains = config.num_warps, config.num_chains // config.num_warps
    groups = -(-pitch // _WARP_COLUMNS)
    n_loads, n_sums = groups * chains, 4 * groups * chains

    @device_function
    def add_round(sums, totals, parts, part_lses, shift, place):
        part = cuda.local.array(n_sums, f32)
        weights = cuda.local.array(chains, f32)
        first, num_splits, lse_step, lse_row, part_row = place
        lane = cuda.threadIdx.x % 32
        # All loads before the sums, so that they wait for memory together.
        for i in range(n_loads):
            split = first + num_warps * (i // groups)
            # Lanes without columns load the last ones, and do not store them.
            column = min(4 * lane + _WARP_COLUMNS * (i % groups), pitch - 4)
            if not last or split < num_splits:
                offset = (split * lse_step + part_row) * pitch + column
                ld_global_v4_f32(part[4 * i : 4 * i + 4], parts, offset)
            else:
                for j in range(4):
                    part[4 * i + j] = f32(0)
        for i in range(chains):
            split = first + num_warps * i
            weights[i] = f32(0)
            if not last or split < num_splits:
                weights[i] = exp_f32(part_lses[split * lse_step + lse_row] - shift)
            totals[i] += weights[i]
        for i in range(n_sums):
            sums[i] = fma_rn_f32(weights[i // 4 // groups], part[i], sums[i])

    return add_round
