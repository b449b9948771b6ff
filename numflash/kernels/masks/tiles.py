"""Tiles of a function: the blocks of which it keeps anything, and those of which it keeps all.

A warp has one block of block_m queries and block_n keys, and asks the function about each pair
that lies inside both sequences. No array of (seqlen_q, seqlen_k) is made; the results are two
bytes a block.
"""

from numflash.configs import MaskTilesConfig, Traits
from numflash.kernels.arguments import Pointer, given_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.masks.arguments import BlockSizes
from numflash.ptx import cuda, i32, mov_ctaid_x, u8
from numflash.tiles import programs
from numflash.tiles.division import divide
from numflash.tiles.portable.lanes import FULL_WARP


def make_mask_tiles_kernel(config: MaskTilesConfig, traits: Traits) -> Kernel:
    """The kernel of a program and a block size; see the module's docstring."""
    num_warps, (block_m, block_n) = config.num_warps, traits.blocks
    functions = programs.make_program(traits.program)
    known_of_head, keep = functions.known_of_head, functions.keep
    n_places = block_m * block_n

    def mask_tiles(
        kept: Pointer(u8),  # (batch, heads, rows, columns)
        full: Pointer(u8),  # (batch, heads, rows, columns)
        sizes: BlockSizes,
        given: given_of(traits.program),
    ):
        number = i32(mov_ctaid_x() * num_warps + cuda.threadIdx.x // 32)
        lane = i32(cuda.threadIdx.x % 32)
        of_row, column = divide(number, sizes.columns)
        of_head, row = divide(of_row, sizes.rows)
        batch, head = divide(of_head, sizes.heads)
        # Warps beyond the last block vote for themselves.
        if batch < sizes.batch:
            known = known_of_head(given, batch, i32(head + given.first_head))
            some, every = False, True
            for place in range(lane, n_places, 32):
                r, c = divide(place, block_n)
                i, j = i32(row * block_m + r), i32(column * block_n + c)
                if i < sizes.seqlen_q and j < sizes.seqlen_k:
                    is_kept = keep(i32(i + given.row), i32(j + given.column), known)
                    some, every = some or is_kept, every and is_kept
            some = cuda.any_sync(FULL_WARP, some)
            every = cuda.all_sync(FULL_WARP, every)
            if lane == 0:
                kept[number] = u8(1 if some else 0)
                full[number] = u8(1 if every else 0)

    return Kernel(config.family, mask_tiles, config.num_threads, 0)
