"""Lists of tiles: for each row of blocks those that are kept, from the first to the last.

A warp makes one list, 32 blocks at a time: lanes whose block is kept count those before it by a
vote. No atomics: the order is that of the blocks. Of columns the same, with rows and columns
exchanged in the strides.
"""

from numflash.configs import MaskListsConfig, Traits
from numflash.kernels.arguments import Pointer
from numflash.kernels.kernel import Kernel
from numflash.kernels.masks.arguments import BlockSizes, TileFlags
from numflash.ptx import cuda, i32, mov_ctaid_x, u32
from numflash.tiles.division import divide
from numflash.tiles.portable.lanes import FULL_WARP


def make_mask_lists_kernel(config: MaskListsConfig, traits: Traits) -> Kernel:
    """The kernel; see the module's docstring."""
    num_warps = config.num_warps

    def mask_lists(
        kept: TileFlags,
        full: TileFlags,
        entries: Pointer(i32),  # (batch, heads, rows, columns)
        counts: Pointer(i32),  # (batch, heads, rows)
        sizes: BlockSizes,
        has_full: i32,
    ):
        number = i32(mov_ctaid_x() * num_warps + cuda.threadIdx.x // 32)
        lane = i32(cuda.threadIdx.x % 32)
        of_head, row = divide(number, sizes.rows)
        batch, head = divide(of_head, sizes.heads)
        if batch < sizes.batch:
            at_kept = batch * kept.batch + head * kept.head + row * kept.row
            at_full = batch * full.batch + head * full.head + row * full.row
            before, count = u32(u32(u32(1) << u32(lane)) - u32(1)), i32(0)
            for begin in range(0, sizes.columns, 32):
                column = i32(begin + lane)
                is_kept = False
                if column < sizes.columns:
                    is_kept = kept.data[at_kept + column * kept.column] != 0
                votes = u32(cuda.ballot_sync(FULL_WARP, is_kept))
                if is_kept:
                    entry = i32(2 * column)
                    if has_full != 0 and full.data[at_full + column * full.column] != 0:
                        entry = i32(entry + 1)
                    place = i32(count + i32(cuda.popc(u32(votes & before))))
                    entries[i32(number * sizes.columns + place)] = entry
                count = i32(count + i32(cuda.popc(votes)))
            if lane == 0:
                counts[number] = count

    return Kernel(config.family, mask_lists, config.num_threads, 0)
