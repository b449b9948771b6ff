"""A warpgroup's tile from registers to shared memory, transposed: dS^T becomes dS.

Its rows are 64 keys, its columns queries. In shared memory rows are queries, and the 64 keys of a
warpgroup are a slab: an operand A of `make_product_kn`, as bulk copies would have left it.
"""

from functools import cache

from numflash.ptx import device_function, i32, mov_tid_x, stmatrix_x4_trans
from numflash.tiles.unrolled import make_unrolled
from numflash.tiles.wgmma.products import SLAB_BYTES
from numflash.tiles.wgmma.turns import WARPGROUP

_ROW_WORDS = SLAB_BYTES // 4
_STEP = 16  # queries


@cache
def make_store_transposed(queries):
    """store_transposed(packed, smem, first): 64 keys x `queries`, as `make_pack` leaves them.

    `first` is the word of the slab plus `transposed_place()`. Who reads the slab by products needs
    a fence and a barrier after it.
    """

    @device_function
    def store_step(step, packed, smem, first):
        stmatrix_x4_trans(smem, first + _STEP * _ROW_WORDS * step, packed)

    loop = make_unrolled(store_step, queries // _STEP, 4)

    @device_function
    def store_transposed(packed, smem, first):
        loop(0, packed, smem, first)

    return store_transposed


@device_function
def transposed_place():
    """The word, in a slab, of the row and chunk that this lane names for the first 16 queries.

    Lanes 8 m to 8 m + 7 name the rows of matrix m: queries 0 to 7 of the warp's first and of its
    last eight keys, then queries 8 to 15. Eight lanes name all eight chunks: no two of them meet
    at a bank.
    """
    thread = mov_tid_x()
    warp, lane = thread // 32 % 4, thread % 32
    row, chunk = lane // 16 * 8 + lane % 8, 2 * warp + lane // 8 % 2
    return i32(row * _ROW_WORDS + 4 * (chunk ^ (lane % 8)))


@cache
def make_place_in_slabs(queries):
    """place_in_slabs(): `transposed_place` in this warpgroup's slab of those side by side."""
    slab_words = queries * _ROW_WORDS

    @device_function
    def place_in_slabs():
        return i32(mov_tid_x() // WARPGROUP * slab_words + transposed_place())

    return place_in_slabs
