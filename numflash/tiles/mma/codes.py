"""Tiles of K and V that are e4m3 codes in global memory, and operands of 16 bits in the products.

Codes are copied to shared memory as they are, asynchronously where that can be, and decoded from
there to a tile that is swizzled like any other. A thread decodes what it has copied itself: no
barrier lies between, and its part may be copied over once it has decoded.
"""

from collections.abc import Callable
from functools import cache

from numflash.ptx import (
    cp_async_16,
    cuda,
    device_function,
    i32,
    ld_global_v4_u32,
    ld_shared_v4_u32,
    mov_tid_x,
    st_shared_v4_u32,
    u32,
)
from numflash.tiles.addresses import row_of_head
from numflash.tiles.mma.layouts import TileLayout, make_word
from numflash.tiles.pages import row_in_pages

CODES_PER_CHUNK = 16
_CHUNK_WORDS = 4


@cache
def make_copy_codes(
    layout: TileLayout, rows, num_threads, vectorized, asynchronous, address=row_of_head
) -> Callable:
    """copy_codes(smem, codes, source, origin, first, end, num_columns)

    The codes at word `codes`, as `decode_tile` reads them, of rows first to first + rows of
    `source`; the rest as in `mma.copies.make_copy_tile`.
    """
    code_chunks = layout.chunks // 2
    chunks = rows * code_chunks
    passes, is_exact = -(-chunks // num_threads), chunks % num_threads == 0
    is_paged, cp_async = address is row_in_pages, vectorized and asynchronous

    @device_function
    def load_codes(frag, source, offset, columns):
        for w in range(4):
            word = u32(0)
            for b in range(4):
                if 4 * w + b < columns:
                    word |= u32(source[offset + 4 * w + b]) << u32(8 * b)
            frag[w] = word

    @device_function
    def copy_codes(smem, codes, source, origin, first, end, num_columns):
        frag = cuda.local.array(4, u32)
        thread = mov_tid_x()
        for p in range(passes):
            i = i32(thread + p * num_threads)
            if is_exact or i < chunks:
                row, column = i // code_chunks, i % code_chunks * CODES_PER_CHUNK
                source_row, columns = i32(first + row), i32(num_columns - column)
                offset = address(source, origin, source_row)
                is_inside = source_row < end and columns > 0
                if is_paged:
                    is_inside = is_inside and offset >= 0
                target = codes + _CHUNK_WORDS * i
                if cp_async:
                    n_bytes = 16 if is_inside else 0
                    cp_async_16(smem, target, source.data, offset + column, n_bytes)
                else:
                    frag[0], frag[1], frag[2], frag[3] = u32(0), u32(0), u32(0), u32(0)
                    if is_inside:
                        if vectorized:
                            ld_global_v4_u32(frag, source.data, offset + column)
                        else:
                            load_codes(frag, source.data, offset + column, columns)
                    st_shared_v4_u32(smem, target, frag)

    return copy_codes


@cache
def make_decode_tile(decode: Callable, layout: TileLayout, rows, num_threads) -> Callable:
    """decode_tile(smem, tile, codes): the tile at word `tile` of this thread's codes.

    `decode` is of `quantize.conversions.make_decode`.
    """
    code_chunks, word = layout.chunks // 2, make_word(layout)
    chunks = rows * code_chunks
    passes, is_exact = -(-chunks // num_threads), chunks % num_threads == 0

    @device_function
    def decode_tile(smem, tile, codes):
        frag = cuda.local.array(4, u32)
        low, high = cuda.local.array(4, u32), cuda.local.array(4, u32)
        thread = mov_tid_x()
        for p in range(passes):
            i = i32(thread + p * num_threads)
            if is_exact or i < chunks:
                row, chunk = i // code_chunks, i % code_chunks
                ld_shared_v4_u32(frag, smem, codes + _CHUNK_WORDS * i)
                decode(frag[0], low[0:2])
                decode(frag[1], low[2:4])
                decode(frag[2], high[0:2])
                decode(frag[3], high[2:4])
                st_shared_v4_u32(smem, tile + word(row, 2 * chunk), low)
                st_shared_v4_u32(smem, tile + word(row, 2 * chunk + 1), high)

    return decode_tile


__all__ = ["make_copy_codes", "make_decode_tile"]
