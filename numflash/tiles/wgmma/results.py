"""A warpgroup's results: from its accumulator through shared memory to a tensor."""

from functools import cache

from numflash.ptx import (
    bar_sync,
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_5d_store,
    cp_async_bulk_wait_group_read,
    cuda,
    device_function,
    fence_proxy_async,
    i32,
    mov_tid_x,
    stmatrix_x4,
    u32,
)
from numflash.tiles.wgmma.products import PACK_TWO, SLAB_BYTES

_ROWS = 64
_FIRST_BARRIER = 4
_SLAB_WORDS = SLAB_BYTES // 4
_BLOCKS_PER_SLAB = 4  # of 16 columns


@cache
def make_store_slabs(dtype, n_tiles):
    """store_slabs(acc, smem, tile, group, tensor_map, token, head, batch)

    64 rows of 16-bit elements to `tile` in shared memory, and from there to the tensor, a slab of
    64 columns at a time. The copy is committed: the thread that leads the warpgroup must wait for
    it before anything else is written there. Named barriers 4 and up, one a warpgroup, are theirs.
    """
    pack_two, slabs = PACK_TWO[dtype], -(-n_tiles // 8)

    @device_function
    def store_slabs(acc, smem, tile, group, tensor_map, token, head, batch):
        words = cuda.local.array(4, u32)
        thread = mov_tid_x()
        leads = thread % 128 == 0
        if leads:
            # What was stored from here before has left.
            cp_async_bulk_wait_group_read()
        bar_sync(_FIRST_BARRIER + group, 128)
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
        fence_proxy_async()
        bar_sync(_FIRST_BARRIER + group, 128)
        if leads:
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
            cp_async_bulk_commit_group()

    return store_slabs
