"""The rows and columns of a tile that belong to each thread.

A warp is a grid of 4 x 8 lanes. Its rows are shared out over the 4 lane rows, the columns over the
8 lane columns, so that a row of scores lies in 8 neighbouring lanes, three shuffles wide:

    rows     lane // 8 + 4 r                     r < rows per thread, from the warp's first row
    scores   lane %  8 + 8 c                     c < columns per thread
    outputs  4 (lane % 8) + 32 g + i             i < 4: four neighbours, one 16-byte access

With the pitches of `configs.SmemLayout` every 16-byte access to shared memory in these patterns is
free of bank conflicts (tests/host/numflash/test_lanes.py proves it).
"""

from numflash.ptx import cuda, device_function

ROW_LANES = 4
COLUMN_LANES = 8
# Output columns that one warp covers with 16 bytes a lane: head dims are padded to this.
OUTPUT_STEP = 4 * COLUMN_LANES
FULL_WARP = 0xFFFFFFFF


def rows_per_thread(rows: int, num_warps: int) -> int:
    """Rows of a tile that one thread owns."""
    return rows // (ROW_LANES * num_warps)


def columns_per_thread(columns: int) -> int:
    """Score columns of a tile that one thread owns."""
    return columns // COLUMN_LANES


def groups_per_thread(head_dim: int) -> int:
    """Groups of four output columns that one thread owns; head_dim is padded."""
    return head_dim // OUTPUT_STEP


@device_function
def first_row_of_thread(rows_per_warp):
    """This thread's first row in a tile."""
    return cuda.threadIdx.x // 32 * rows_per_warp + cuda.threadIdx.x % 32 // COLUMN_LANES
