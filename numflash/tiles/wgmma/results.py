"""A warpgroup's results: from its accumulator through shared memory to a tensor."""

from functools import cache

from numflash.ptx import (
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_5d_store,
    cp_async_bulk_wait_group_read,
    cuda,
    device_function,
    fence_proxy_async,
    i32,
    mov_tid_x,
    st_global_v2_f32,
    stmatrix_x4,
    u32,
)
from numflash.tiles.addresses import token_of_row
from numflash.tiles.mma.fragments import ROW_STEP, accumulator_column
from numflash.tiles.wgmma.products import PACK_TWO, SLAB_BYTES
from numflash.tiles.wgmma.turns import leads, meet

_ROWS = 64
_SLAB_WORDS = SLAB_BYTES // 4
_BLOCKS_PER_SLAB = 4  # of 16 columns


@cache
def make_store_slabs(dtype, n_tiles):
    """store_slabs(acc, smem, tile, group, tensor_map, token, head, batch)

    64 rows of 16-bit elements to `tile` in shared memory, and from there to the tensor, a slab of
    64 columns at a time. The copy is committed: the thread that leads the warpgroup must wait for
    it before anything else is written there.
    """
    pack_two, slabs = PACK_TWO[dtype], -(-n_tiles // 8)

    @device_function
    def store_slabs(acc, smem, tile, group, tensor_map, token, head, batch):
        words = cuda.local.array(4, u32)
        thread = mov_tid_x()
        if leads():
            # Hazard: new results would overwrite those that a copy still reads.
            cp_async_bulk_wait_group_read()
        # Hazard: the other warps would write before the leader has waited; and O that replaces Q
        # would overwrite what another warp's product still reads.
        meet(group)
        # This lane names row lane % 16 of its warp's 16, and one of two chunks.
        row, chunk = thread // 32 % 4 * 16 + thread % 16, thread % 32 // 16
        for block in range(n_tiles // 2):
            i = 8 * block
            words[0] = pack_two(acc[i], acc[i + 1])
            words[1] = pack_two(acc[i + 2], acc[i + 3])
            words[2] = pack_two(acc[i + 4], acc[i + 5])
            words[3] = pack_two(acc[i + 6], acc[i + 7])
            slab = tile + block // _BLOCKS_PER_SLAB * _ROWS * _SLAB_WORDS
            swizzled = (block % _BLOCKS_PER_SLAB * 2 + chunk) ^ (row % 8)
            stmatrix_x4(smem, slab + row * _SLAB_WORDS + 4 * swizzled, words)
        # Hazard: the copy goes through another proxy, and would not see these writes.
        fence_proxy_async()
        # Hazard: the leader would store what other warps have not written yet.
        meet(group)
        if leads():
            for slab in range(slabs):
                cp_async_bulk_tensor_5d_store(
                    tensor_map,
                    i32(slab * 64),
                    0,
                    token,
                    head,
                    batch,
                    smem,
                    i32(tile + slab * _ROWS * _SLAB_WORDS),
                )
            # Hazard: a wait for copies would not wait for these.
            cp_async_bulk_commit_group()

    return store_slabs


@cache
def make_store_part(n_tiles, is_padded=True):
    """store_part(acc, target, base, first, end, pack, num_columns)

    Float32 results of this warp's 16 rows to global memory; `first` is this lane's first row. Rows
    from `end` on are left out, `target`, `base` and `pack` are as in
    `tiles.mma.copies.make_copy_tile`. So are columns from num_columns on, unless the target is
    padded. Its rows begin at multiples of 8 bytes.
    """
    columns = 8 * n_tiles

    @device_function
    def store_two(target, offset, two, left):
        if left > 1:
            st_global_v2_f32(target, offset, two)
        elif left > 0:
            target[offset] = two[0]

    @device_function
    def store_part(acc, target, base, first, end, pack, num_columns):
        column = accumulator_column()
        above = token_of_row(first, pack)
        below = token_of_row(first + ROW_STEP, pack)
        above_base = base + above * target.row + (first - above * pack) * target.head + column
        below_base = base + below * target.row + column
        below_base += (first + ROW_STEP - below * pack) * target.head
        is_above, is_below = first < end, first + ROW_STEP < end
        for tile in range(n_tiles):
            left = i32(columns if is_padded else num_columns - column - 8 * tile)
            if is_above:
                store_two(target.data, above_base + 8 * tile, acc[4 * tile : 4 * tile + 2], left)
            if is_below:
                store_two(
                    target.data, below_base + 8 * tile, acc[4 * tile + 2 : 4 * tile + 4], left
                )

    return store_part
