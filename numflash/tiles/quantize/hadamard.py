"""The Walsh-Hadamard transform of rows that lie in the registers of neighbouring lanes.

Of a row a thread has elements 8 lane + 8 lanes c + i: eight neighbours i in each chunk c. The
butterflies of strides 1, 2 and 4 are its own, the next go over the lanes by shuffles, and the last
over its chunks. Lanes of a warp call `rotate` together.

All is done in the order of `numflash.reference.rotate`, so that results have the same bits.

Source: QuIP, arXiv 2307.13304 (random orthogonal transforms of quantised operands).
"""

from collections.abc import Callable
from functools import cache

from numflash.ptx import (
    bits_as_float,
    cuda,
    device_function,
    f32,
    float_as_bits,
    fma_rn_f32,
    mul_rn_f32,
    u32,
)
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.unrolled import make_unrolled

COLUMNS = 8
_SIGN = u32(0x80000000)


@device_function
def _butterfly(v, low, high):
    a, b = v[low], v[high]
    v[low] = a + b
    v[high] = a - b


@device_function
def _own_butterflies(v):
    """Strides 1, 2, 4 of eight neighbours; a loop of four stays one for Blackwell."""
    _butterfly(v, 0, 1)
    _butterfly(v, 2, 3)
    _butterfly(v, 4, 5)
    _butterfly(v, 6, 7)
    _butterfly(v, 0, 2)
    _butterfly(v, 1, 3)
    _butterfly(v, 4, 6)
    _butterfly(v, 5, 7)
    _butterfly(v, 0, 4)
    _butterfly(v, 1, 5)
    _butterfly(v, 2, 6)
    _butterfly(v, 3, 7)


@cache
def _make_over_lanes(distance: int, lanes: int) -> Callable:
    """over_lanes(v, lane): the butterflies of lanes `distance`, 2 `distance`, ... apart."""
    if distance >= lanes:

        @device_function
        def nothing(v, lane):
            pass

        return nothing
    following = _make_over_lanes(2 * distance, lanes)

    @device_function
    def over_lanes(v, lane):
        # Low lanes have low + high, high lanes low - high; times +1 or -1 is exact.
        sign = f32(1) if lane & distance == 0 else f32(-1)
        for i in range(COLUMNS):
            v[i] = fma_rn_f32(sign, v[i], cuda.shfl_xor_sync(FULL_WARP, v[i], distance))
        following(v, lane)

    return over_lanes


@device_function
def _butterflies_of_chunks(v, w):
    for i in range(COLUMNS):
        a, b = v[i], w[i]
        v[i] = a + b
        w[i] = a - b


@cache
def _make_over_chunks(chunks: int, distance: int, end: int) -> Callable:
    """over_chunks(v): the butterflies of chunks `distance`, 2 `distance`, ... < end apart."""
    if distance >= end:

        @device_function
        def nothing(v):
            pass

        return nothing
    step, following = COLUMNS * distance, _make_over_chunks(chunks, 2 * distance, end)

    @device_function
    def pair(_, v, w):
        _butterflies_of_chunks(v, w)

    pairs = make_unrolled(pair, distance, COLUMNS, COLUMNS)

    @device_function
    def group(_, v):
        pairs(0, v[:step], v[step:])

    groups = make_unrolled(group, chunks // (2 * distance), 2 * step)

    @device_function
    def over_chunks(v):
        groups(0, v)
        following(v)

    return over_chunks


@cache
def make_rotate(lanes: int, chunks: int, size: int, rows: int) -> Callable:
    """rotate(v, lane): `rows` rows of 8 x chunks elements, without the signs.

    `lane` counts the lanes of a row; `size` elements are rotated among each other.
    """
    over_lanes = _make_over_lanes(1, min(size // COLUMNS, lanes))
    over_chunks = _make_over_chunks(chunks, 1, size // (COLUMNS * lanes))
    factor = f32(size**-0.5)

    @device_function
    def rotate_chunk(_, v, lane):
        _own_butterflies(v)
        over_lanes(v, lane)

    @device_function
    def multiply_chunk(_, v):
        for i in range(COLUMNS):
            v[i] = mul_rn_f32(v[i], factor)

    rotate_chunks = make_unrolled(rotate_chunk, chunks, COLUMNS)
    multiply_chunks = make_unrolled(multiply_chunk, chunks, COLUMNS)

    @device_function
    def rotate_row(_, v, lane):
        rotate_chunks(0, v, lane)
        over_chunks(v)
        multiply_chunks(0, v)

    rotate_rows = make_unrolled(rotate_row, rows, COLUMNS * chunks)

    @device_function
    def rotate(v, lane):
        rotate_rows(0, v, lane)

    return rotate


@cache
def make_apply_signs(lanes: int, chunks: int, rows: int) -> Callable:
    """apply_signs(v, signs, lane): change signs, in `rows` rows of 8 x chunks elements.

    Bit n of `signs`, 8 registers, is the sign of column n.
    """
    words, n_masks = -(-lanes // 4), COLUMNS * chunks

    @device_function
    def change_row(_, v, masks, c):
        for i in range(COLUMNS):
            v[COLUMNS * c + i] = bits_as_float(u32(float_as_bits(v[COLUMNS * c + i]) ^ masks[i]))

    change_rows = make_unrolled(change_row, rows, COLUMNS * chunks)

    @device_function
    def change_chunk(c, masks, v, signs, lane):
        word = signs[lanes * c // 4]
        for i in range(1, words):
            word = signs[lanes * c // 4 + i] if lane // 4 == i else word
        byte = word >> u32(lane % 4 * 8)
        for i in range(COLUMNS):
            masks[i] = (byte << u32(31 - i)) & _SIGN
        change_rows(0, v, masks, c)

    change_chunks = make_unrolled(change_chunk, chunks, COLUMNS)

    @device_function
    def apply_signs(v, signs, lane):
        masks = cuda.local.array(n_masks, u32)
        change_chunks(0, masks, v, signs, lane)

    return apply_signs
