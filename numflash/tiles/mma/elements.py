"""Element types of the tensor cores: their product, and how operands get into registers.

A step of any product is 32 bytes of a row of operand A: 16 elements of 16 bits, or 8 of tf32. With
it go `tiles_per_step` products side by side for 32 bytes of a row of the transposed operand B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from numflash.ptx import (
    bits_as_float,
    cvt_rn_bf16x2_f32,
    cvt_rn_f16_f32,
    cvt_rn_f16x2_f32,
    cvt_rna_tf32_f32,
    device_function,
    f32,
    ld_shared_u32,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k8_f16,
    mma_m16n8k8_tf32,
    mma_m16n8k16_bf16,
    mma_m16n8k16_f16,
    u16,
    u32,
)
from numflash.tiles.mma.fragments import row_operand_chunk, row_operand_row
from numflash.tiles.mma.layouts import TileLayout, make_word


@dataclass(frozen=True)
class MmaElement:
    """One element type on one generation of tensor cores.

    Attributes:
        storage: the scalar type in global memory: f32, or u16 for the bits of a 16-bit float.
        per_chunk: elements in 16 bytes.
        k_step: elements of A's rows that one step consumes.
        tiles_per_step: 16 x 8 products side by side that 32 bytes of a row of B^T are good for.
        mma: (acc, a, b): acc += a b, 16 x k_step times k_step x 8.
        load_frag: (frag, smem, word): four registers of an operand whose rows lie in smem; `word`
            is the lane's address for ldmatrix.
        pack: (frag, acc, first): an operand A from the accumulators acc[first:] of a row of
            products; products 2 s and 2 s + 1 (one for tf32) make step s.
        pack_two: (low, high): a register of two 16-bit elements; None for tf32.
    """

    storage: type
    per_chunk: int
    k_step: int
    tiles_per_step: int
    mma: Callable
    load_frag: Callable
    pack: Callable
    pack_two: Callable | None


@device_function
def _mma_f16_turing(acc, a, b):
    mma_m16n8k8_f16(acc, a[0:2], b[0])
    mma_m16n8k8_f16(acc, a[2:4], b[1])


@device_function
def _pack_f16_turing(low, high):
    return u32(cvt_rn_f16_f32(low)) | u32(cvt_rn_f16_f32(high)) << 16


@device_function
def _pack_f16(low, high):
    return cvt_rn_f16x2_f32(high, low)


@device_function
def _pack_bf16(low, high):
    return cvt_rn_bf16x2_f32(high, low)


def _sixteen_bit(mma: Callable, pack_two: Callable) -> MmaElement:
    @device_function
    def pack(frag, acc, first):
        for i in range(4):
            frag[i] = pack_two(acc[first + 2 * i], acc[first + 2 * i + 1])

    return MmaElement(u16, 8, 16, 2, mma, ldmatrix_x4, pack, pack_two)


@device_function
def _load_frag_tf32(frag, smem, word):
    ldmatrix_x4(frag, smem, word)
    for i in range(4):
        frag[i] = cvt_rna_tf32_f32(bits_as_float(frag[i]))


@device_function
def _pack_tf32(frag, acc, first):
    # Column 2 t of the accumulator becomes k = t, column 2 t + 1 becomes k = t + 4: the loads of
    # the transposed operand take its rows in the same order.
    frag[0] = cvt_rna_tf32_f32(acc[first])
    frag[1] = cvt_rna_tf32_f32(acc[first + 2])
    frag[2] = cvt_rna_tf32_f32(acc[first + 1])
    frag[3] = cvt_rna_tf32_f32(acc[first + 3])


MMA_ELEMENTS: dict[tuple[str, str], MmaElement] = {
    ("sm75", "float16"): _sixteen_bit(_mma_f16_turing, _pack_f16_turing),
    ("sm80", "float16"): _sixteen_bit(mma_m16n8k16_f16, _pack_f16),
    ("sm80", "bfloat16"): _sixteen_bit(mma_m16n8k16_bf16, _pack_bf16),
    ("sm80", "float32"): MmaElement(
        f32, 4, 8, 1, mma_m16n8k8_tf32, _load_frag_tf32, _pack_tf32, None
    ),
}
"""(generation, dtype) -> element; float32 is multiplied as tf32."""


@cache
def make_transposed_operand(element: MmaElement, layout: TileLayout):
    """(first, load) for an operand B whose rows of k lie in shared memory as rows of the tile.

    first(lane): the lane's position in the tile, for steps 0. load(frag, smem, word): four (tf32:
    two) registers, for the k_step rows and 32 bytes of columns at the tile's position `word`.
    """
    word = make_word(layout)

    if element.tiles_per_step == 2:

        @device_function
        def first(lane):
            return word(row_operand_row(lane), row_operand_chunk(lane))

        return first, ldmatrix_x4_trans

    odd_row, pitch = 4 if layout.swizzled else 0, layout.pitch

    @device_function
    def first(lane):
        # Row 2 t, column g.
        return word(lane % 4 * 2, lane // 16) + lane // 4 % 4

    @device_function
    def load(frag, smem, position):
        even = ld_shared_u32(smem, position)
        odd = ld_shared_u32(smem, (position ^ odd_row) + pitch)
        frag[0] = cvt_rna_tf32_f32(bits_as_float(even))
        frag[1] = cvt_rna_tf32_f32(bits_as_float(odd))

    return first, load
