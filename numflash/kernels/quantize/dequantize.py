"""Dequantisation: numbers from codes and scales, rotated back where they had been rotated.

Four threads compute a row. The operations are those of `numflash.reference.dequantize_fp8`; the
result is rounded to the element type at the end.
"""

from collections.abc import Callable
from functools import cache

from numflash.configs import DequantizeConfig, Traits
from numflash.kernels.arguments import Tensor
from numflash.kernels.kernel import Kernel
from numflash.kernels.quantize.arguments import Codes, Grouped, Signs, Sizes
from numflash.ptx import cuda, device_function, f32, i32, mov_ctaid_x, u16, u32
from numflash.ptx.arithmetic import cvt_f32_f16, mul_rn_f32
from numflash.tiles.addresses import first_of_head
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import quotient, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize.hadamard import COLUMNS, make_apply_signs, make_rotate
from numflash.tiles.quantize.rows import make_decode, make_place_of_thread


def make_dequantize_kernel(config: DequantizeConfig, traits: Traits) -> Kernel:
    """The dequantisation kernel for one config; see the module's docstring."""
    element, head_dim, lanes = ELEMENTS[traits.dtype], traits.head_dim, config.lanes
    storage, from_f32, store_four = element.storage, element.from_f32, element.store_four
    chunks, chunk_columns = head_dim // (lanes * COLUMNS), lanes * COLUMNS
    rows, vectorized = config.block_rows, traits.vectorized
    transposed, hadamard = config.transposed, config.hadamard
    place_of_thread = make_place_of_thread(lanes)
    decode_eight = _make_decode_eight(config)
    apply_signs = make_apply_signs(lanes, chunks, 1)
    rotate = make_rotate(lanes, chunks, head_dim & -head_dim, 1)
    n_values, n_words = chunks * COLUMNS, 2 * chunks

    def dequantize(
        data: Codes,  # (batch, seqlen, num_heads, padded head_dim)
        descale: Grouped,  # (batch, num_heads, groups of tokens)
        out: Tensor[storage],  # (batch, seqlen, num_heads, head_dim)
        sizes: Sizes,
        signs: Signs,
    ):
        values = cuda.local.array(n_values, f32)
        words = cuda.local.array(n_words, u32)
        row, lane = place_of_thread()
        num_blocks = tiles_of(sizes.seqlen, rows)
        block, head, batch = place_in_heads(mov_ctaid_x(), num_blocks, sizes.num_heads)
        token = i32(block * rows + row)
        # Lanes without a token compute another's row, so that all take part in the shuffles.
        t = min(token, sizes.seqlen - 1)
        # Position 4 k + i of each 16 holds token 2 k + i, or, for i > 1, 2 k + i + 6.
        position = t - t % 16 + t % 8 // 2 * 4 + t % 2 + t % 16 // 8 * 2 if transposed else t

        first = first_of_head(data, batch, head) + position * data.row
        for c in range(chunks):
            column = lane * COLUMNS + chunk_columns * c
            _load_eight(words[2 * c : 2 * c + 2], data, first + column * data.column)
        group = quotient(t, descale.tokens)
        scale = descale.data[first_of_head(descale, batch, head) + group]
        for c in range(chunks):
            eight = values[COLUMNS * c : COLUMNS * c + COLUMNS]
            decode_eight(eight, words[2 * c : 2 * c + 2], scale)
        if hadamard:
            # The transform is its own inverse; of the signs before and after it those before
            # undo what `rotate` begins with.
            rotate(values, lane)
            bits = cuda.local.array(8, u32)
            bits[0], bits[1], bits[2], bits[3], bits[4], bits[5], bits[6], bits[7] = signs
            apply_signs(values, bits, lane)

        if token < sizes.seqlen:
            out_base = first_of_head(out, batch, head) + token * out.row
            for c in range(chunks):
                column = lane * COLUMNS + chunk_columns * c
                for i in range(0, COLUMNS, 4):
                    j = COLUMNS * c + i
                    if vectorized:
                        if column + i < sizes.head_dim:
                            store_four(out.data, out_base + column + i, values[j : j + 4])
                    else:
                        for h in range(4):
                            if column + i + h < sizes.head_dim:
                                out.data[out_base + column + i + h] = from_f32(values[j + h])

    return Kernel(config.family, dequantize, config.num_threads, 0)


@device_function
def _load_eight(words, data, offset):
    """The codes of eight columns."""
    for w in range(2):
        words[w] = u32(0)
        for i in range(4):
            words[w] |= u32(data.data[offset + (4 * w + i) * data.column]) << u32(8 * i)


@cache
def _make_decode_eight(config: DequantizeConfig) -> Callable:
    """decode_eight(values, words, scale): eight numbers from their codes."""
    decode = make_decode(config.format, config.generation)

    @device_function
    def decode_eight(values, words, scale):
        # The butterflies' sums must not fuse with the products, which are rounded first.
        halves = cuda.local.array(2, u32)
        for w in range(2):
            decode(words[w], halves)
            for i in range(2):
                values[4 * w + 2 * i] = mul_rn_f32(
                    cvt_f32_f16(u16(halves[i] & u32(0xFFFF))), scale
                )
                values[4 * w + 2 * i + 1] = mul_rn_f32(
                    cvt_f32_f16(u16(halves[i] >> u32(16))), scale
                )

    return decode_eight
