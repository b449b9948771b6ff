"""Tiles from global to swizzled shared memory, and accumulators to global memory.

All threads of a block call `copy_tile` together. Asynchronous copies must be committed and waited
for (`numflash.ptx.async_copies`); a barrier makes them visible to all.
"""

import math
from functools import cache

from numflash.ptx import (
    cp_async_4,
    cp_async_16,
    cuda,
    device_function,
    f32,
    float_as_bits,
    i32,
    i64,
    ld_global_v4_u32,
    mov_tid_x,
    st_global_v2_f32,
    st_global_v4_u32,
    st_shared_u32,
    st_shared_v4_u32,
    u16,
    u32,
)
from numflash.tiles.addresses import row_of_head, token_of_row
from numflash.tiles.mma.elements import MmaElement
from numflash.tiles.mma.fragments import MMA_ROWS, ROW_STEP
from numflash.tiles.mma.layouts import TileLayout, make_word
from numflash.tiles.pages import row_in_pages
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.unrolled import make_unrolled

# Addresses: address(source, origin, row) is the offset of the first element of a row. `source` is
# a record with `data` and strides, `origin` what the address needs beside them.


@device_function
def row_of_packed_heads(source, origin, row):
    """The address of a row where heads are packed.

    `origin` is (offset of row 0, pack): `pack` rows are a token of as many heads.
    """
    base, pack = origin
    token = token_of_row(row, pack)
    return base + token * source.row + (row - token * pack) * source.head


@cache
def make_copy_tile(
    element: MmaElement,
    layout: TileLayout,
    rows,
    num_threads,
    vectorized,
    asynchronous,
    address=row_of_head,
):
    """copy_tile(smem, tile, source, origin, first, end, num_columns)

    The tile at word `tile` = rows first to first + rows of `source`, which lie where
    `address(source, origin, row)` says; zeros from row `end` and from `num_columns` on, and for
    rows whose page does not exist.
    """
    chunks, per_chunk = layout.chunks, element.per_chunk
    # Neighbouring threads copy neighbouring chunks: as many of them share a row as divide it.
    threads_per_row = math.gcd(chunks, num_threads)
    row_step = num_threads // threads_per_row
    row_passes, chunk_passes = -(-rows // row_step), chunks // threads_per_row
    is_exact = rows % row_step == 0
    # The swizzle is the same eight rows further on.
    repeats, row_words = row_step % 8 == 0, row_step * layout.pitch
    word = make_word(layout)
    is_float32, cp_async = element.storage is f32, vectorized and asynchronous
    per_word, is_strided = per_chunk // 4, address is row_of_head
    is_paged = address is row_in_pages

    @device_function
    def load_word(source, offset, columns):
        bits = u32(0)
        if columns > 0:
            bits = float_as_bits(source[offset]) if is_float32 else u32(source[offset])
        if not is_float32 and columns > 1:
            bits |= u32(source[offset + 1]) << u32(16)
        return bits

    @device_function
    def load_chunk(frag, source, offset, is_inside, columns):
        if vectorized:
            frag[0], frag[1], frag[2], frag[3] = u32(0), u32(0), u32(0), u32(0)
            if is_inside and columns > 0:
                ld_global_v4_u32(frag, source, offset)
        else:
            left = columns if is_inside else 0
            frag[0] = load_word(source, offset, left)
            frag[1] = load_word(source, offset + per_word, left - per_word)
            frag[2] = load_word(source, offset + 2 * per_word, left - 2 * per_word)
            frag[3] = load_word(source, offset + 3 * per_word, left - 3 * per_word)

    @device_function
    def copy_tile(smem, tile, source, origin, first, end, num_columns):
        frag = cuda.local.array(4, u32)
        # Copies are few and registers scarce in the loops around them: nothing is kept.
        thread = mov_tid_x()
        my_row, my_chunk = thread // threads_per_row, thread % threads_per_row
        # Rows are 32-bit and offsets grow by a step: one addition and one comparison a chunk.
        first_row = i32(first + my_row)
        step = row_step * source.row
        for p in range(chunk_passes):
            chunk = my_chunk + p * threads_per_row
            first_target = tile + word(my_row, chunk)
            if is_strided:
                offset = address(source, origin, first_row) + per_chunk * chunk
            for r in range(row_passes):
                row = my_row + r * row_step
                source_row = i32(first_row + r * row_step)
                is_inside = source_row < end
                if not is_strided:
                    offset = address(source, origin, source_row)
                    if is_paged:
                        is_inside = is_inside and offset >= 0
                    offset += per_chunk * chunk
                elif r > 0:
                    offset += step
                if repeats:
                    target = first_target + r * row_words
                else:
                    target = tile + word(row, chunk)
                if is_exact or row < rows:
                    if cp_async:
                        n_bytes = 16 if is_inside and per_chunk * chunk < num_columns else 0
                        cp_async_16(smem, target, source.data, offset, n_bytes)
                    else:
                        load_chunk(
                            frag, source.data, offset, is_inside, num_columns - per_chunk * chunk
                        )
                        st_shared_v4_u32(smem, target, frag)

    return copy_tile


@cache
def make_fetch_tile(copy_tile, first_word, tile_words, rows):
    """fetch_tile(smem, source, origin, n, stage, end, num_columns)

    Tile n of `rows` rows goes to buffer `stage` of those that begin at `first_word`, `tile_words`
    apart; the rest as in `make_copy_tile`.
    """

    @device_function
    def fetch_tile(smem, source, origin, n, stage, end, num_columns):
        tile = first_word + tile_words * stage
        copy_tile(smem, tile, source, origin, i32(n * rows), end, num_columns)

    return fetch_tile


@cache
def make_copy_vector(rows, num_threads, asynchronous):
    """copy_vector(smem, target, source, base, first, end): `rows` float32; zeros from `end` on."""
    passes = -(-rows // num_threads)

    @device_function
    def copy_vector(smem, target, source, base, first, end):
        for p in range(passes):
            i = cuda.threadIdx.x + p * num_threads
            if i < rows:
                is_inside = first + i < end
                if asynchronous:
                    n_bytes = 4 if is_inside else 0
                    cp_async_4(smem, target + i, source, base + first + i, n_bytes)
                else:
                    bits = u32(0)
                    if is_inside:
                        bits = float_as_bits(source[base + first + i])
                    st_shared_u32(smem, target + i, bits)

    return copy_vector


@cache
def make_store_rows(
    element: MmaElement,
    m_tiles,
    n_tiles,
    vectorized,
    as_float32=False,
    address=row_of_head,
    written_out=False,
):
    """store_rows(acc, target, origin, first, end, num_columns)

    Each warp writes its accumulator to `target`, a record as the source of `make_copy_tile`, whose
    rows lie where `address(target, origin, row)` says; `first` is this lane's first row. Rows from
    `end` and columns from `num_columns` on are left out. With `as_float32` the target holds
    float32, otherwise the element type. A loop that is `written_out` is unrolled, however long.
    """
    rows, groups, pack_two = 2 * m_tiles, n_tiles // 4, element.pack_two
    as_float32 = as_float32 or pack_two is None

    @device_function
    def locate_rows(offsets, widths, target, origin, first, end, columns):
        """The offset at which this thread's rows begin, and the number of their columns."""
        for r in range(rows):
            row = i32(first + ROW_STEP * r)
            widths[r] = columns if row < end else i32(0)
            offsets[r] = address(target, origin, row)

    @device_function
    def store_two(x, acc, target, offsets, widths, first_column):
        r, j = x // n_tiles, x % n_tiles
        i = 4 * (n_tiles * (r // 2) + j) + r % 2 * 2
        column = first_column + 8 * j
        left, offset = widths[r] - column, offsets[r] + column
        if vectorized:
            if left > 0:
                st_global_v2_f32(target.data, offset, acc[i : i + 2])
        else:
            if left > 0:
                target.data[offset] = acc[i]
            if left > 1:
                target.data[offset + 1] = acc[i + 1]

    store_all = make_unrolled(store_two, rows * n_tiles) if written_out else None

    @device_function
    def store_float32(acc, target, origin, first, end, columns):
        offsets = cuda.local.array(rows, i64)
        widths = cuda.local.array(rows, i32)
        locate_rows(offsets, widths, target, origin, first, end, columns)
        first_column = cuda.threadIdx.x % 4 * 2
        if store_all is not None:
            store_all(i32(0), acc, target, offsets, widths, first_column)
        else:
            for x in range(rows * n_tiles):
                store_two(x, acc, target, offsets, widths, first_column)

    @device_function
    def store_word(target, offset, columns, word):
        if columns > 0:
            target[offset] = u16(word & 0xFFFF)
        if columns > 1:
            target[offset + 1] = u16(word >> 16)

    @device_function
    def store_packed(acc, target, origin, first, end, columns):
        offsets = cuda.local.array(rows, i64)
        widths = cuda.local.array(rows, i32)
        locate_rows(offsets, widths, target, origin, first, end, columns)
        words = cuda.local.array(4, u32)
        t = cuda.threadIdx.x % 4
        for x in range(rows * groups):
            r, group = x // groups, x % groups
            i = 4 * (n_tiles * (r // 2) + 4 * group) + r % 2 * 2
            words[0] = pack_two(acc[i], acc[i + 1])
            words[1] = pack_two(acc[i + 4], acc[i + 5])
            words[2] = pack_two(acc[i + 8], acc[i + 9])
            words[3] = pack_two(acc[i + 12], acc[i + 13])
            if vectorized:
                transpose_quad(words, t)
                column = 32 * group + 8 * t
                if column < widths[r]:
                    st_global_v4_u32(target.data, offsets[r] + column, words)
            else:
                column = 32 * group + 2 * t
                left, offset = widths[r] - column, offsets[r] + column
                store_word(target.data, offset, left, words[0])
                store_word(target.data, offset + 8, left - 8, words[1])
                store_word(target.data, offset + 16, left - 16, words[2])
                store_word(target.data, offset + 24, left - 24, words[3])

    return store_float32 if as_float32 else store_packed


@cache
def make_store_scores(element: MmaElement, n_tiles, layout: TileLayout):
    """store_scores(acc, smem, tile): each warp's 16 rows of scores, packed, to shared memory.

    Words of eight rows go to different banks.
    """
    word, pack_two, layout_pitch = make_word(layout), element.pack_two, layout.pitch

    @device_function
    def store_scores(acc, smem, tile):
        thread = mov_tid_x()
        row = thread // 32 * MMA_ROWS + thread % 32 // 4
        for j in range(n_tiles):
            above = tile + word(row, j) + thread % 4
            st_shared_u32(smem, above, pack_two(acc[4 * j], acc[4 * j + 1]))
            below = above + ROW_STEP * layout_pitch
            st_shared_u32(smem, below, pack_two(acc[4 * j + 2], acc[4 * j + 3]))

    return store_scores


@device_function
def transpose_quad(words, t):
    """words[j] of lane t of each quad of lanes becomes words[t] of lane j.

    A lane that holds two elements of each of four 16-byte chunks then holds one chunk whole.
    """
    for i in range(2):
        # Lanes whose bit i of t differs swap the words whose bit i of j is the other's.
        bit = 1 << i
        for k in range(2):
            low = k << 1 if i == 0 else k
            high = low + bit
            sent = words[low] if t & bit else words[high]
            received = u32(cuda.shfl_xor_sync(FULL_WARP, i32(sent), bit))
            if t & bit:
                words[low] = received
            else:
                words[high] = received
