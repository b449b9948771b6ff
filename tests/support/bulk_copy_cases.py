"""Cases of bulk tensor copies: tiles in and beyond tensors of two to five dimensions."""

from dataclasses import dataclass

import numpy as np

from numflash.problem.tensor_maps import TensorLayout
from numflash.ptx import (
    EVICT_FIRST,
    EVICT_LAST,
    EVICT_NORMAL,
    TensorMap,
    cp_async_bulk_commit_group,
    cp_async_bulk_tensor_2d,
    cp_async_bulk_tensor_2d_store,
    cp_async_bulk_tensor_3d,
    cp_async_bulk_tensor_3d_store,
    cp_async_bulk_tensor_4d,
    cp_async_bulk_tensor_4d_store,
    cp_async_bulk_tensor_5d,
    cp_async_bulk_tensor_5d_store,
    cp_async_bulk_wait_group_read,
    cuda,
    fence_mbarrier_init,
    fence_proxy_async,
    fence_proxy_tensormap,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    prefetch_tensormap,
    u32,
    u64,
)
from numflash.runtime.views import Pointer
from tests.support.instruction_harness import THREADS, InstructionCase

LOADS = {
    2: cp_async_bulk_tensor_2d,
    3: cp_async_bulk_tensor_3d,
    4: cp_async_bulk_tensor_4d,
    5: cp_async_bulk_tensor_5d,
}
STORES = {
    2: cp_async_bulk_tensor_2d_store,
    3: cp_async_bulk_tensor_3d_store,
    4: cp_async_bulk_tensor_4d_store,
    5: cp_async_bulk_tensor_5d_store,
}
_STORAGE = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "uint8": np.uint8}


@dataclass(frozen=True)
class Tile:
    """A tensor within an array whose first row is longer, and the coordinates of a tile."""

    layout: TensorLayout
    coordinates: tuple[int, ...]

    @property
    def storage(self) -> type:
        return _STORAGE[self.layout.dtype]

    @property
    def n_elements(self) -> int:
        """Elements of the array that holds the tensor."""
        layout, last = self.layout, len(self.layout.extents) - 1
        steps = layout.extents[-1] - (last in layout.row_axes)
        return layout.strides[-1] // np.dtype(self.storage).itemsize * steps

    @property
    def n_bytes(self) -> int:
        """Bytes of the tile."""
        return int(np.prod(self.layout.box)) * np.dtype(self.storage).itemsize


def _tile(dtype, extents, box, coordinates, swizzle_bytes=128) -> Tile:
    """The rows of the tensor are padded to 16 bytes, and then by 16 more."""
    item = np.dtype(_STORAGE[dtype]).itemsize
    strides = [-(-extents[0] * item // 16) * 16 + 16]
    for extent in extents[1:-1]:
        strides.append(strides[-1] * extent)
    return Tile(TensorLayout(dtype, extents, tuple(strides), box, swizzle_bytes), coordinates)


def _ragged_tile(extents, strides, box, axes, coordinates) -> Tile:
    return Tile(TensorLayout("float16", extents, strides, box, row_axes=axes), coordinates)


TILES = {
    "inside": _tile("float16", (128, 40), (64, 16), (64, 8)),
    "over the end": _tile("float16", (100, 21), (64, 16), (64, 9)),
    "before the start": _tile("float16", (100, 21), (64, 16), (-7, -3)),
    "beyond": _tile("float16", (64, 21), (64, 8), (0, 21)),
    "bytes": _tile("uint8", (200, 11), (128, 8), (96, 5)),
    "float32": _tile("float32", (50, 9), (32, 8), (20, 2)),
    "not swizzled": _tile("float16", (72, 21), (24, 8), (56, 15), swizzle_bytes=0),
    "rows of 64 bytes": _tile("float16", (100, 21), (32, 16), (80, 9), swizzle_bytes=64),
    "rows of 32 bytes": _tile("float32", (50, 21), (8, 16), (-3, 2), swizzle_bytes=32),
    "three": _tile("bfloat16", (64, 5, 7), (64, 3, 4), (0, 3, -2)),
    "keys": _tile("bfloat16", (96, 33, 3, 2), (64, 16, 1, 1), (64, 25, 2, 1)),
    "packed": _tile("float16", (80, 4, 9, 2, 2), (64, 4, 8, 1, 1), (64, 0, 5, 1, 1)),
    # The last 7 of 9 rows, of which the sequence's first is row 6 of 20.
    "ragged keys": _ragged_tile(
        *((64, 20, 2, 21), (272, 128, 272), (64, 16, 1, 1), (1, 3)),
        coordinates=(0, 20 - 9 + 2, 1, 6 + 9),
    ),
    "ragged queries": _ragged_tile(
        *((64, 2, 20, 2, 21), (128, 528, 256, 528), (64, 2, 8, 1, 1), (2, 4)),
        coordinates=(0, 0, 20 - 9 + 2, 1, 6 + 9),
    ),
    # Of a page of 8 rows the first 5.
    "a page": _ragged_tile(
        *((64, 8, 2, 9, 5), (256, 128, 256, 2064), (64, 8, 1, 1, 1), (1, 3)),
        coordinates=(0, 8 - 5, 1, 5, 3),
    ),
}


def _load(tile: Tile, policy, prefetch=False):
    load, rank, n_bytes = LOADS[len(tile.coordinates)], len(tile.coordinates), tile.n_bytes
    n_words = n_bytes // 4
    c0, c1, c2, c3, c4 = (*tile.coordinates, 0, 0, 0)[:5]

    def copy(x: TensorMap, y: Pointer(u32)):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(1, u64)
        t = cuda.threadIdx.x
        if t == 0:
            if prefetch:
                prefetch_tensormap(x)
            mbarrier_init(barriers, 0, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(barriers, 0, n_bytes)
            if rank == 2:
                load(smem, 0, x, barriers, 0, policy, c0, c1)
            elif rank == 3:
                load(smem, 0, x, barriers, 0, policy, c0, c1, c2)
            elif rank == 4:
                load(smem, 0, x, barriers, 0, policy, c0, c1, c2, c3)
            else:
                load(smem, 0, x, barriers, 0, policy, c0, c1, c2, c3, c4)
        cuda.syncthreads()
        mbarrier_wait_parity(barriers, 0, 0)
        for i in range(t, n_words, THREADS):
            y[i] = smem[i]

    return copy


def _store(tile: Tile):
    store, rank, n_words = STORES[len(tile.coordinates)], len(tile.coordinates), tile.n_bytes // 4
    c0, c1, c2, c3, c4 = (*tile.coordinates, 0, 0, 0)[:5]

    def copy(x: Pointer(u32), y: TensorMap):
        smem = cuda.shared.array(0, u32, alignment=1024)
        t = cuda.threadIdx.x
        for i in range(t, n_words, THREADS):
            smem[i] = x[i]
        fence_proxy_async()
        cuda.syncthreads()
        if t == 0:
            if rank == 2:
                store(y, c0, c1, smem, 0)
            elif rank == 3:
                store(y, c0, c1, c2, smem, 0)
            elif rank == 4:
                store(y, c0, c1, c2, c3, smem, 0)
            else:
                store(y, c0, c1, c2, c3, c4, smem, 0)
            cp_async_bulk_commit_group()
            cp_async_bulk_wait_group_read()

    return copy


def _fence_tensormap(x: TensorMap, y: Pointer(u32)):
    """The fence is never executed: a parameter does not lie in global memory."""
    t = cuda.threadIdx.x
    if t >= THREADS:
        fence_proxy_tensormap(x)
    y[t] = u32(t)


def elements_of(tile: Tile) -> np.ndarray:
    """What a load's array holds."""
    return (np.arange(1, tile.n_elements + 1, dtype=np.uint32) * 40503).astype(tile.storage)


def _load_case(name, tile, policy=EVICT_NORMAL, instruction=None, prefetch=False):
    return InstructionCase(
        instruction or LOADS[len(tile.coordinates)].__name__,
        name,
        _load(tile, policy, prefetch),
        (elements_of(tile),),
        (((tile.n_bytes // 4,), np.uint32),),
        smem_bytes=tile.n_bytes,
        tensor_maps=(tile.layout,),
    )


def _store_case(name, tile, instruction=None) -> InstructionCase:
    words = np.arange(1, tile.n_bytes // 4 + 1, dtype=np.uint32) * np.uint32(2654435761)
    return InstructionCase(
        instruction or STORES[len(tile.coordinates)].__name__,
        name,
        _store(tile),
        (words,),
        (((tile.n_elements,), tile.storage),),
        smem_bytes=tile.n_bytes,
        tensor_maps=(None, tile.layout),
    )


BULK_COPY_CASES = [
    *(_load_case(name, tile) for name, tile in TILES.items()),
    *(_store_case(name, tile) for name, tile in TILES.items()),
    _load_case("inside", TILES["inside"], EVICT_FIRST, "prefetch_tensormap", prefetch=True),
    _load_case("keys", TILES["keys"], EVICT_LAST, "mbarrier_arrive_expect_tx"),
    _store_case("inside", TILES["inside"], "cp_async_bulk_commit_group"),
    _store_case("inside", TILES["inside"], "cp_async_bulk_wait_group_read"),
    _store_case("inside", TILES["inside"], "fence_proxy_async"),
    InstructionCase(
        "fence_proxy_tensormap",
        "",
        _fence_tensormap,
        (elements_of(TILES["inside"]),),
        (((THREADS,), np.uint32),),
        tensor_maps=(TILES["inside"].layout,),
    ),
]
