"""FlexAttention's lists as tiles: the blocks that they name, and those that they call full.

A warp has a row of blocks. It writes zeros first, then marks what the row's two lists name. What
is out of range touches nothing: a count is cut to the length of the list, and an index that is no
column is passed over, as no kernel can raise an error.
"""

from numflash.configs import MaskScatterConfig, Traits
from numflash.kernels.arguments import Pointer
from numflash.kernels.kernel import Kernel
from numflash.kernels.masks.arguments import BlockSizes, RowLists
from numflash.ptx import cuda, device_function, i32, i64, mov_ctaid_x, u8
from numflash.tiles.division import divide
from numflash.tiles.portable.lanes import FULL_WARP


def make_mask_scatter_kernel(config: MaskScatterConfig, traits: Traits) -> Kernel:
    """The kernel; see the module's docstring."""
    num_warps = config.num_warps

    @device_function
    def mark(tiles, first, lists, batch, head, row, lane, columns):
        """Mark the columns that the list of a row names."""
        at = batch * lists.count_batch + head * lists.count_head + row * lists.count_row
        count = min(i32(lists.counts[at]), lists.length)
        at = batch * lists.batch + head * lists.head + row * lists.row
        for place in range(lane, count, 32):
            column = i32(lists.indices[at + place * lists.step])
            if column >= 0 and column < columns:
                tiles[first + column] = u8(1)

    def mask_scatter(
        partial: RowLists,
        whole: RowLists,
        kept: Pointer(u8),  # (batch, heads, rows, columns)
        full: Pointer(u8),  # (batch, heads, rows, columns)
        sizes: BlockSizes,
        has_whole: i32,
    ):
        number = i32(mov_ctaid_x() * num_warps + cuda.threadIdx.x // 32)
        lane = i32(cuda.threadIdx.x % 32)
        of_head, row = divide(number, sizes.rows)
        batch, head = divide(of_head, sizes.heads)
        if batch < sizes.batch:
            first = i64(number) * sizes.columns
            for column in range(lane, sizes.columns, 32):
                kept[first + column] = u8(0)
                full[first + column] = u8(0)
            # A zero of one lane would come after the mark of another.
            cuda.syncwarp(FULL_WARP)
            mark(kept, first, partial, batch, head, row, lane, sizes.columns)
            if has_whole != 0:
                mark(kept, first, whole, batch, head, row, lane, sizes.columns)
                mark(full, first, whole, batch, head, row, lane, sizes.columns)

    return Kernel(config.family, mask_scatter, config.num_threads, 0)
