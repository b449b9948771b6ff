"""The elements of a tile that a lane holds, and where it reads them.

Lane l stands at (g, t) = (l // 4, l % 4). Rows and columns are relative to the warp's part of the
tile. An accumulator is made of 16 x 8 products; register 4 (n_tiles i + j) + e of a thread is

    row 16 i + g + 8 (e // 2),   column 8 j + 2 t + e % 2

so that a thread has two rows in each 16, a row lies in four neighbouring lanes, and two
neighbouring products are, packed, an operand A of the next product.
"""

from functools import cache

from numflash.ptx import cuda, device_function, i32, mov_tid_x
from numflash.tiles.mma.layouts import TileLayout, make_word

MMA_ROWS = 16
MMA_COLUMNS = 8
ROW_STEP = 8  # from one row of a thread to its next


@device_function
def accumulator_row(rows_per_warp):
    """This thread's first row in the block's tile; the next ones follow in steps of `ROW_STEP`.

    Computed where it is needed, like `accumulator_column`: masks are rare, and products need the
    registers that would keep it.
    """
    thread = mov_tid_x()
    return thread // 32 * rows_per_warp + thread % 32 // 4


@device_function
def accumulator_column():
    """This thread's first column in an accumulator."""
    return mov_tid_x() % 4 * 2


@device_function
def place_of_column(i):
    """Where numbers of the columns of an accumulator hold that of column i, in words.

    A thread has the columns 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1 of 16: they lie side by side.
    """
    within = i % 16
    return i32(i - within + within % 8 // 2 * 4 + within // 8 * 2 + within % 2)


@device_function
def row_operand_row(lane):
    """The row whose address a lane gives to ldmatrix for 16 rows x 2 chunks, rows first."""
    return lane % 16


@device_function
def row_operand_chunk(lane):
    """The chunk, 0 or 1, whose address a lane gives for 16 rows x 2 chunks, rows first."""
    return lane // 16


@device_function
def column_operand_row(lane):
    """The row whose address a lane gives to ldmatrix for 16 rows x 2 chunks, chunks first."""
    return lane % 8 + lane // 16 * 8


@device_function
def column_operand_chunk(lane):
    """The chunk, 0 or 1, whose address a lane gives for 16 rows x 2 chunks, chunks first."""
    return lane // 8 % 2


@device_function
def first_row_of_warp(rows_per_warp):
    """This warp's first row in a tile."""
    return cuda.threadIdx.x // 32 * rows_per_warp


@cache
def make_operands(layout: TileLayout):
    """(row_operand(row, chunk, lane), column_operand(row, chunk, lane)): where a lane reads.

    The word of the tile whose address a lane gives to ldmatrix for the 16 rows x 2 chunks that
    begin at `row` and `chunk`: rows first, as operand A lies in registers, or chunks first, as B.
    """
    word = make_word(layout)

    @device_function
    def row_operand(row, chunk, lane):
        return word(row + row_operand_row(lane), chunk + row_operand_chunk(lane))

    @device_function
    def column_operand(row, chunk, lane):
        return word(row + column_operand_row(lane), chunk + column_operand_chunk(lane))

    return row_operand, column_operand
