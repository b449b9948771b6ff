"""Codes change places through shared memory: from rows of a head to its columns, tokens innermost.

A thread has the codes of four tokens that stand together in `numflash.reference.tokens_innermost`:
position p of 16 holds token 2 (p // 4) + p % 2 + 8 (p // 2 % 2), so quad k of a group of 16 is
tokens 2 k, 2 k + 1, 2 k + 8, 2 k + 9. It makes one word of them for each of its columns.

In shared memory a column is a row of words, its groups of 16 tokens 16-byte chunks, which are
swizzled by the column's eighth so that neither access conflicts: lanes that store have eighths
and quads of their own, lanes that load have chunks of their own. Where a row is shorter than all
banks, eight columns are followed by a gap of one.
"""

from collections.abc import Callable
from functools import cache

from numflash.ptx import (
    cuda,
    device_function,
    f32,
    i64,
    ld_shared_v4_f32,
    prmt_b32,
    st_global_v4_f32,
    st_shared_u32,
    u32,
)
from numflash.tiles.unrolled import make_unrolled

GROUP = 16


@device_function
def first_token_of_quad(quad):
    """The first of the four tokens of a quad; the others are 1, 8 and 9 later."""
    return quad // 4 * GROUP + quad % 4 * 2


@cache
def make_chunk_of(tokens: int) -> tuple[Callable, int]:
    """(chunk_of, pitch): where chunks of 16 tokens lie in the tile of a block of `tokens`.

    chunk_of(eighth, i, group): the word at which the 16 tokens of `group` begin, of column
    8 eighth + i; `pitch` words further is the next column of this eighth.
    """
    groups, pitch = tokens // GROUP, tokens // 4
    gap = 1 if groups < 8 else 0
    eighths_apart = max(1, 8 // groups)

    @device_function
    def chunk_of(eighth, i, group):
        column = 8 * eighth + gap * eighth + i
        return pitch * column + 4 * (group ^ eighth // eighths_apart % min(groups, 8))

    return chunk_of, pitch


@device_function
def transpose_four(words, a, b, c, d):
    """words[i] = byte i of a, b, c and d, in this order."""
    low = prmt_b32(a, b, u32(0x5140))
    high = prmt_b32(c, d, u32(0x5140))
    words[0] = prmt_b32(low, high, u32(0x5410))
    words[1] = prmt_b32(low, high, u32(0x7632))
    low = prmt_b32(a, b, u32(0x7362))
    high = prmt_b32(c, d, u32(0x7362))
    words[2] = prmt_b32(low, high, u32(0x5410))
    words[3] = prmt_b32(low, high, u32(0x7632))


@cache
def make_store_quad(tokens: int, columns: int) -> Callable:
    """store_quad(tile, codes, step, eighth, quad): four tokens of `columns` neighbouring columns.

    codes[step * t + w] has columns 4 w to 4 w + 3 of the quad's token t; the columns begin at
    8 `eighth`.
    """
    chunk_of, pitch = make_chunk_of(tokens)

    @device_function
    def store_four_columns(w, words, tile, codes, step, eighth, quad):
        a, b = codes[w], codes[step + w]
        transpose_four(words, a, b, codes[2 * step + w], codes[3 * step + w])
        place = chunk_of(eighth + w // 2, w % 2 * 4, quad // 4) + quad % 4
        for i in range(4):
            st_shared_u32(tile, place + pitch * i, words[i])

    n_words = columns // 4
    store_each = make_unrolled(store_four_columns, n_words, 4)
    n_bytes = 4 * n_words

    @device_function
    def store_quad(tile, codes, step, eighth, quad):
        words = cuda.local.array(n_bytes, u32)
        store_each(0, words, tile, codes, step, eighth, quad)

    return store_quad


@cache
def make_store_columns(tokens: int, columns: int, num_threads: int) -> Callable:
    """store_columns(tile, target, offset, pitch, tokens_left): the tile to global memory.

    target[offset + pitch * c + t] = token position t of column c, below tokens_left, a multiple
    of 16. All threads call it together, after a barrier.
    """
    chunk_of, _ = make_chunk_of(tokens)
    groups = tokens // GROUP
    pieces = columns * groups
    passes, is_even = -(-pieces // num_threads), pieces % num_threads == 0

    @device_function
    def store_columns(tile, target, offset, pitch, tokens_left):
        piece = cuda.local.array(4, f32)
        for p in range(passes):
            i = cuda.threadIdx.x + p * num_threads
            column, group = i // groups, i % groups
            if (is_even or i < pieces) and group * GROUP < tokens_left:
                ld_shared_v4_f32(piece, tile, chunk_of(column // 8, column % 8, group))
                st_global_v4_f32(target, offset + i64(column) * pitch + group * GROUP, piece)

    return store_columns
