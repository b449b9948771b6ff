"""Combine: O and lse of a forward whose keys were split, from its parts.

    lse = log sum_s exp(lse_s),   O = sum_s exp(lse_s - lse) O_s

Here the row ends (`tiles.rows`): parts are rows by themselves, without what features join to one.

One block computes one row. Split s belongs to chain s % 16; each chain is summed up in order, one
warp at a time, and the chains in order at the end. The order depends on a split's number alone:
not on how many there are, nor on how many warps share the chains. The parts are float32,
contiguous: (split, batch, seqlen, head, padded head_dim_v) and (split, batch, head, seqlen).

Where sequences have lengths of their own, only some tiles are split. They are listed on the device
(`sequences.schedule`): a block has a row of a listed tile, and blocks behind the list have nothing
to do. Then parts are (slot, packed head, row of the tile, padded head_dim_v), and part_lses the
same without the last axis; the splits of a tile have neighbouring slots.

Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding.
"""

from functools import cache
from typing import NamedTuple

from numflash.configs import CombineConfig, Traits
from numflash.configs.features import Features
from numflash.kernels.arguments import Pointer, SplitTiles, Tensor, shape_of
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, device_function, f32, i32, i64
from numflash.ptx.arithmetic import fma_rn_f32, max_f32
from numflash.ptx.memory import ld_global_v4_f32, ld_shared_v4_f32, st_shared_f32, st_shared_v4_f32
from numflash.tiles import addresses, blocks, rows
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import divide, quotient
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.portable.softmax import exp_f32
from numflash.tiles.rows import LOWEST

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
    end_of_row, lse_of_row = rows.make_end_of_row(traits.features, rows.NATURAL)
    ragged, is_idle, row_of = traits.ragged, blocks.make_is_idle(traits), _make_row_of(traits)
    add_round, add_torn_round = (
        _make_add_round(config, pitch, torn, ragged) for torn in (False, True)
    )

    def combine(
        parts: Pointer(f32),  # (split, batch, seqlen_q, num_heads_q, padded head_dim_v), or slots
        part_lses: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q), or slots
        out: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        shape: shape_of(traits),
        num_splits: i32,
        tiles: SplitTiles,
        features: Features,
    ):
        smem = cuda.shared.array(0, f32, alignment=16)
        sums = cuda.local.array(n_sums, f32)
        totals = cuda.local.array(chains_per_warp, f32)
        part = cuda.local.array(4, f32)
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        # From `blockIdx` the loop over parts is 12 instructions shorter than from `mov_ctaid_x`.
        if is_idle(cuda.blockIdx.x, tiles.rows * quotient(shape.num_heads_q, tiles.pack), shape):
            return
        at = row_of(cuda.blockIdx.x, shape, num_splits, tiles)
        if ragged and at.row < 0:
            return
        lse_step, lse_row, part_row = at.step, at.lse, at.part
        begin, end = at.splits

        # Finite: a row that sees no key has lse -inf in every part, and -inf - -inf would be NaN.
        largest = LOWEST
        for split in range(begin + lane, end, 32):
            largest = max_f32(largest, part_lses[split * lse_step + lse_row])
        for distance in (16, 8, 4, 2, 1):
            largest = max_f32(largest, cuda.shfl_xor_sync(FULL_WARP, largest, distance))

        for i in range(chains_per_warp):
            totals[i] = f32(0)
        for i in range(n_sums):
            sums[i] = f32(0)
        whole_rounds = end // chains * chains
        first_round = begin // chains * chains
        # The first round, if the row's first split is in its middle.
        if ragged and begin > first_round:
            place = i32(first_round + warp), begin, end, lse_step, lse_row, part_row
            add_torn_round(sums, totals, parts, part_lses, largest, place)
            first_round += chains
        for first in range(first_round, whole_rounds, chains):
            place = i32(first + warp), begin, end, lse_step, lse_row, part_row
            add_round(sums, totals, parts, part_lses, largest, place)
        if whole_rounds < end and (not ragged or first_round < end):
            place = i32(whole_rounds + warp), begin, end, lse_step, lse_row, part_row
            add_torn_round(sums, totals, parts, part_lses, largest, place)

        for i in range(n_loads):
            column = 4 * lane + _WARP_COLUMNS * (i % groups)
            if column < pitch:
                chain = warp + num_warps * (i // groups)
                st_shared_v4_f32(smem, pitch * chain + column, sums[4 * i : 4 * i + 4])
        if lane == 0:
            for i in range(chains_per_warp):
                st_shared_f32(smem, totals_smem + warp + num_warps * i, totals[i])
        # Hazard: the chains of a warp would be missing.
        cuda.syncthreads()

        # The place is computed again, so that no register keeps it through the loop.
        at = row_of(cuda.blockIdx.x, shape, num_splits, tiles)
        row, head, batch = at.row, at.head, at.batch
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
            # Where all are of one length it is `lse_row`; to compute it again takes instructions.
            lse[at.lse_of_all if ragged else lse_row] = lse_of_row(top, whole)

    return Kernel(config.family, combine, num_threads, config.smem_bytes(traits))


class _Row(NamedTuple):
    """A row of the result, and its parts.

    Attributes:
        row, head, batch: of the result; row is -1 where a tile has no such row.
        lse_of_all: the offset of its lse in the result.
        lse: the offset that split 0 has, or would have, in `part_lses`.
        part: the number of the row that split 0 has, or would have, in `parts`.
        step: rows from one split to the next, in both.
        splits: (first, end) of the numbers of its splits.
    """

    row: i32
    head: i32
    batch: i32
    lse_of_all: i64
    lse: i64
    part: i64
    step: i64
    splits: tuple


@cache
def _make_row_of(traits: Traits):
    """row_of(block, shape, num_splits, tiles): the `_Row` of a block."""
    first_of_statistics = addresses.make_first_of_statistics(traits)

    @device_function
    def row_of(block, shape, num_splits, tiles):
        row, head, batch = place_in_heads(block, shape.seqlen_q, shape.num_heads_q)
        lse = first_of_statistics(batch, head, shape) + row
        step = i64(shape.batch_size) * shape.num_heads_q * shape.seqlen_q
        part = (i64(batch) * shape.seqlen_q + row) * shape.num_heads_q + head
        return _Row(row, head, batch, lse, lse, part, step, (i32(0), num_splits))

    @device_function
    def row_of_list(block, shape, num_splits, tiles):
        packed_heads = quotient(shape.num_heads_q, tiles.pack)
        number, i = divide(block, tiles.rows)
        number, packed_head = divide(number, packed_heads)
        at, listed = 8 + 8 * number, shape.records
        first, seqlen_q, slot, start = listed[at], listed[at + 1], listed[at + 2], listed[at + 4]
        begin, end, batch = listed[at + 5], listed[at + 6], listed[at + 7]
        token, packed = divide(i32(start + i), tiles.pack)
        head = i32(packed_head * tiles.pack + packed)
        step = i64(packed_heads) * tiles.rows
        part = i64(slot - begin) * step + packed_head * tiles.rows + i
        row = i32(first + token if token < seqlen_q else -1)
        lse = first_of_statistics(batch, head, shape) + row
        return _Row(row, head, batch, lse, part, part, step, (begin, end))

    return row_of_list if traits.ragged else row_of


def _make_add_round(config: CombineConfig, pitch: int, torn: bool, ragged: bool):
    """add_round(sums, totals, parts, part_lses, shift, place)

    A warp adds a split to each of its chains. `place` is (first split of the warp, first split of
    the row, end of the splits, and `step`, `lse` and `part` of a `_Row`). A torn round may have
    fewer splits than chains: the last ones are missing, or if `ragged` also the first.
    """
    num_warps, chains = config.num_warps, config.num_chains // config.num_warps
    groups = -(-pitch // _WARP_COLUMNS)
    n_loads, n_sums = groups * chains, 4 * groups * chains

    @device_function
    def add_round(sums, totals, parts, part_lses, shift, place):
        part = cuda.local.array(n_sums, f32)
        weights = cuda.local.array(chains, f32)
        first, begin, end, lse_step, lse_row, part_row = place
        lane = cuda.threadIdx.x % 32
        # All loads before the sums, so that they wait for memory together.
        for i in range(n_loads):
            split = first + num_warps * (i // groups)
            # Lanes without columns load the last ones, and do not store them.
            column = min(4 * lane + _WARP_COLUMNS * (i % groups), pitch - 4)
            if not torn or (split < end and (not ragged or split >= begin)):
                offset = (split * lse_step + part_row) * pitch + column
                ld_global_v4_f32(part[4 * i : 4 * i + 4], parts, offset)
            else:
                for j in range(4):
                    part[4 * i + j] = f32(0)
        for i in range(chains):
            split = first + num_warps * i
            weights[i] = f32(0)
            if not torn or (split < end and (not ragged or split >= begin)):
                weights[i] = exp_f32(part_lses[split * lse_step + lse_row] - shift)
            totals[i] += weights[i]
        for i in range(n_sums):
            sums[i] = fma_rn_f32(weights[i // 4 // groups], part[i], sums[i])

    return add_round
