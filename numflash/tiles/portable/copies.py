"""Tiles between global and shared memory, and results from registers to global memory.

All threads of a block call `load_tile` together; a `cuda.syncthreads()` must follow before the
tile is read, and precede when the tile's last readers may still be at work.
"""

import math
from functools import cache

from numflash.ptx import cuda, device_function, f32, i32, st_shared_f32, st_shared_v4_f32
from numflash.tiles.addresses import row_of_head
from numflash.tiles.pages import row_in_pages
from numflash.tiles.portable.elements import Element
from numflash.tiles.portable.lanes import COLUMN_LANES, OUTPUT_STEP, ROW_LANES

# Loads in flight per thread before the first is used: hides memory latency.
_BATCH = 4


@cache
def make_load_tile(
    element: Element, rows, columns, pitch, num_threads, vectorized, address=row_of_head
):
    """load_tile(smem, tile, source, origin, first_row, end_row, num_columns)

    smem[tile + pitch * r + c] = the element in row first_row + r and column c of `source`, whose
    rows lie where `address(source, origin, row)` says, for the rows x columns of the tile; zero
    from end_row and from num_columns on, and for rows whose page does not exist.
    """
    vector = element.vector if vectorized else 1
    # Neighbouring threads read neighbouring bytes: as many of them share a row as divide it.
    threads_per_row = math.gcd(columns // vector, num_threads)
    row_step = num_threads // threads_per_row
    batch = max(1, min(_BATCH, rows // row_step))
    batch_rows, column_step, n_values = batch * row_step, threads_per_row * vector, batch * vector
    load_vector, to_f32 = element.load_vector, element.to_f32
    is_paged = address is row_in_pages

    @device_function
    def load_tile(smem, tile, source, origin, first_row, end_row, num_columns):
        values = cuda.local.array(n_values, f32)
        my_row = cuda.threadIdx.x // threads_per_row
        my_column = cuda.threadIdx.x % threads_per_row * vector
        valid_rows = min(rows, end_row - first_row)
        for column in range(my_column, columns, column_step):
            for row in range(my_row, rows, batch_rows):
                for i in range(n_values):
                    values[i] = f32(0)
                if not is_paged:
                    offset = address(source, origin, first_row + row) + column
                for i in range(batch):
                    is_inside = row + i * row_step < valid_rows and column < num_columns
                    if is_paged:
                        element_offset = address(
                            source, origin, i32(first_row + row + i * row_step)
                        )
                        is_inside = is_inside and element_offset >= 0
                        element_offset += column
                    else:
                        element_offset = offset + i * row_step * source.row
                    if is_inside:
                        if vectorized:
                            load_vector(
                                values[i * vector : (i + 1) * vector], source.data, element_offset
                            )
                        else:
                            values[i] = to_f32(source.data[element_offset])
                target = tile + row * pitch + column
                for i in range(batch):
                    if row + i * row_step < rows:
                        if vectorized:
                            for j in range(0, vector, 4):
                                four = values[i * vector + j : i * vector + j + 4]
                                st_shared_v4_f32(smem, target + i * row_step * pitch + j, four)
                        else:
                            st_shared_f32(smem, target + i * row_step * pitch, values[i])

    return load_tile


@cache
def make_store_rows(element: Element, rows, groups, vectorized):
    """store_rows(acc, target, base, first_row, end_row, num_columns)

    Each thread writes its part of an output accumulator (see `lanes`) to `target`, a record with
    `data` and `row`, whose first row begins at `base`: `first_row` is the thread's first;
    rows from end_row and columns from num_columns on are left out.
    """
    store_four, from_f32 = element.store_four, element.from_f32

    @device_function
    def store_rows(acc, target, base, first_row, end_row, num_columns):
        first_column = 4 * (cuda.threadIdx.x % COLUMN_LANES)
        for r in range(rows):
            row = first_row + ROW_LANES * r
            if row < end_row:
                for g in range(groups):
                    column = first_column + OUTPUT_STEP * g
                    offset = base + row * target.row + column
                    i = 4 * (groups * r + g)
                    if vectorized:
                        if column < num_columns:
                            store_four(target.data, offset, acc[i : i + 4])
                    else:
                        for j in range(4):
                            if column + j < num_columns:
                                target.data[offset + j] = from_f32(acc[i + j])

    return store_rows
