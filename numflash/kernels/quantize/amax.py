"""Maxima for scales that more tokens share than one block owns: of blocks, then of the blocks'.

    measure     the largest finite |x| of each block of tokens, after the rotation
    amax        the largest of each group of neighbouring values, at least 2 ** -100; and descale

Both write every result once, from one block: no atomics, the same bits in every run.
"""

from collections.abc import Callable
from functools import cache

from numflash.configs import AmaxConfig, QuantizeConfig, Traits
from numflash.kernels.arguments import Pointer, Tensor
from numflash.kernels.kernel import Kernel
from numflash.kernels.quantize.arguments import Signs, Sizes
from numflash.ptx import cuda, device_function, f32, i32, i64, max_f32, mov_ctaid_x, u32
from numflash.tiles.addresses import first_of_head
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import divide, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize.hadamard import make_apply_signs, make_rotate
from numflash.tiles.quantize.rows import (
    Rows,
    make_largest,
    make_load_rows,
    make_max_of_block,
    make_place_of_thread,
    make_to_f32,
    make_tokens,
)

SMALLEST_AMAX = f32(2.0**-100)


def rows_of(config: QuantizeConfig, traits: Traits) -> Rows:
    """The rows that the threads of a block have."""
    lanes = config.lanes(traits)
    return Rows(
        lanes,
        config.rows_per_thread(traits),
        traits.head_dim // (lanes * config.columns),
        config.columns,
        config.num_threads // lanes,
        config.transposed,
    )


@cache
def make_load_values(config: QuantizeConfig, traits: Traits) -> Callable:
    """load_values(values, x, base, token, sizes, lane, signs)

    A thread's rows as float32, rotated if the config says so. `token` is that of its first row.
    """
    rows = rows_of(config, traits)
    n_rows, columns = rows.rows, rows.columns
    words_per_load = columns * traits.dtype_bytes // 4
    n_loads = n_rows * rows.chunks
    n_words = n_loads * words_per_load
    load_rows = make_load_rows(rows, traits.dtype_bytes, traits.vectorized)
    to_f32, hadamard = make_to_f32(traits.dtype, n_loads), config.hadamard
    apply_signs = make_apply_signs(rows.lanes, rows.chunks, n_rows)
    rotate = make_rotate(rows.lanes, rows.chunks, traits.head_dim & -traits.head_dim, n_rows)

    @device_function
    def load_values(values, x, base, token, sizes, lane, signs):
        words = cuda.local.array(n_words, u32)
        column = lane * columns
        load_rows(words, x, base + column, token, sizes.seqlen, i32(sizes.head_dim - column))
        to_f32(0, values, words)
        if hadamard:
            bits = cuda.local.array(8, u32)
            bits[0], bits[1], bits[2], bits[3], bits[4], bits[5], bits[6], bits[7] = signs
            apply_signs(values, bits, lane)
            rotate(values, lane)

    return load_values


def make_measure_kernel(config: QuantizeConfig, traits: Traits) -> Kernel:
    """The kernel that only finds the maxima; see the module's docstring."""
    rows = rows_of(config, traits)
    n_values = rows.rows * rows.chunks * rows.columns
    storage, block_tokens = ELEMENTS[traits.dtype].storage, config.block_tokens
    load_values = make_load_values(config, traits)
    first_token_of_row, _ = make_tokens(rows)
    place_of_thread = make_place_of_thread(rows.lanes)
    largest, max_of_block = make_largest(n_values), make_max_of_block(config.num_warps)

    def measure(
        x: Tensor[storage],  # (batch, seqlen, num_heads, head_dim)
        maxima: Pointer(f32),  # (batch, num_heads, blocks of tokens)
        sizes: Sizes,
        signs: Signs,
    ):
        values = cuda.local.array(n_values, f32)
        smem = cuda.shared.array(0, f32)
        num_blocks = tiles_of(sizes.seqlen, block_tokens)
        block, head, batch = place_in_heads(mov_ctaid_x(), num_blocks, sizes.num_heads)
        row, lane = place_of_thread()
        token = i32(block * block_tokens + first_token_of_row(row))
        base = first_of_head(x, batch, head)
        load_values(values, x, base, token, sizes, lane, signs)
        found = max_of_block(largest(values), smem, 0)
        if cuda.threadIdx.x == 0:
            maxima[cuda.blockIdx.x] = found

    return Kernel(config.family, measure, config.num_threads, config.smem_bytes(traits))


def make_amax_kernel(config: AmaxConfig, traits: Traits) -> Kernel:
    """The kernel that reduces maxima; see the module's docstring."""
    num_threads, max_of_block = config.num_threads, make_max_of_block(config.num_warps)

    def amax(
        maxima: Pointer(f32),  # (rows, per_row)
        amax: Pointer(f32),  # (rows, groups)
        descale: Pointer(f32),  # (rows, groups)
        per_row: i32,
        per_group: i32,
        groups: i32,
        peak: f32,
    ):
        smem = cuda.shared.array(0, f32)
        row, group = divide(mov_ctaid_x(), groups)
        begin = group * per_group
        end, base = min(begin + per_group, per_row), i64(row) * per_row
        found = SMALLEST_AMAX
        for i in range(begin + cuda.threadIdx.x, end, num_threads):
            found = max_f32(found, maxima[base + i])
        found = max_of_block(found, smem, 0)
        if cuda.threadIdx.x == 0:
            amax[cuda.blockIdx.x] = found
            descale[cuda.blockIdx.x] = found / peak

    return Kernel(config.family, amax, config.num_threads, config.smem_bytes(traits))
