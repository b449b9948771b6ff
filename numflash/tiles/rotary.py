"""Rows rotated by the angles of their positions: what a thread does with its part of a row.

    (a, b) -> (a cos - b sin, b cos + a sin)     for each pair (a, b) of columns

    halves         column c and column c + rotary_dim / 2 (GPT-NeoX)
    interleaved    column 2 c and column 2 c + 1 (GPT-J)

A row is cut into chunks of `pairs` pairs: as many as 16 bytes hold elements, or one where rows or
tables are not aligned. A thread has whole chunks, so that it may write where it read. Each sum is
one rounded product and one fused multiply-add, in one order: a row has the same bits in every
kernel that rotates it.

Source: RoFormer, arXiv 2104.09864, section 3.4.2; the tables are those of flash-attn.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numflash.ptx import (
    bits_as_float,
    cuda,
    device_function,
    f32,
    float_as_bits,
    fma_rn_f32,
    i32,
    i64,
    ld_global_v4_u32,
    mul_rn_f32,
    st_global_v4_u32,
    u16,
    u32,
)
from numflash.tiles.division import quotient
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.unrolled import make_unrolled


class Rotary(NamedTuple):
    """The functions for a chunk. `half` is rotary_dim / 2, `base` the offset of the row.

    Attributes:
        pairs: of a chunk, which has twice as many values.
        bits: (type, number) of what holds `pairs` neighbouring columns as they lie in memory.
        load_bits, store_bits: (bits, array, offset): such columns.
        load_chunk, store_chunk: (bits, array, base, chunk, half): twice as many bits.
        load_angles: (cosines, sines, cos, sin, position, chunk, sign): `pairs` of each, of the row
            `position` of the records `AngleTable`; the sines times `sign`, -1 to rotate back.
        unpack: (values, bits): a chunk in float32.
        rotate: (values, cosines, sines): in place.
        pack: (bits, values): rounded.
    """

    pairs: int
    bits: tuple[type, int]
    load_bits: Callable
    store_bits: Callable
    load_chunk: Callable
    store_chunk: Callable
    load_angles: Callable
    unpack: Callable
    rotate: Callable
    pack: Callable


@cache
def make_rotary(dtype: str, table_dtype: str, interleaved: bool, vectorized: bool) -> Rotary:
    """The functions for rows and tables of these dtypes; see the module's docstring."""
    element, table = ELEMENTS[dtype], ELEMENTS[table_dtype]
    pairs = element.vector if vectorized else 1
    bits = _, n_bits = (u32, 4) if vectorized else (element.storage, 1)
    n_values, step = 2 * pairs, min(pairs, table.vector)
    load_table, table_to_f32 = table.load_vector, table.to_f32
    # Of a pair: its first value, and how far its second is from there.
    between, apart = (2, 1) if interleaved else (1, pairs)

    @device_function
    def load_bits(bits, source, offset):
        if vectorized:
            ld_global_v4_u32(bits, source, offset)
        else:
            bits[0] = source[offset]

    @device_function
    def store_bits(bits, target, offset):
        if vectorized:
            st_global_v4_u32(target, offset, bits)
        else:
            target[offset] = bits[0]

    @device_function
    def columns_of_chunk(chunk, half):
        if interleaved:
            return chunk * n_values, chunk * n_values + pairs
        return chunk * pairs, chunk * pairs + half

    @device_function
    def load_chunk(bits, source, base, chunk, half):
        first, second = columns_of_chunk(chunk, half)
        load_bits(bits[:n_bits], source, base + first)
        load_bits(bits[n_bits:], source, base + second)

    @device_function
    def store_chunk(bits, target, base, chunk, half):
        first, second = columns_of_chunk(chunk, half)
        store_bits(bits[:n_bits], target, base + first)
        store_bits(bits[n_bits:], target, base + second)

    @device_function
    def load_angles(cosines, sines, cos, sin, position, chunk, sign):
        of_cos = i64(position) * cos.row + chunk * pairs
        of_sin = i64(position) * sin.row + chunk * pairs
        if vectorized:
            for i in range(0, pairs, step):
                load_table(cosines[i : i + step], cos.data, of_cos + i)
                load_table(sines[i : i + step], sin.data, of_sin + i)
        else:
            cosines[0] = table_to_f32(cos.data[of_cos])
            sines[0] = table_to_f32(sin.data[of_sin])
        for i in range(pairs):
            sines[i] *= sign

    @device_function
    def rotate(values, cosines, sines):
        for i in range(pairs):
            a, b = values[between * i], values[between * i + apart]
            values[between * i] = fma_rn_f32(a, cosines[i], -mul_rn_f32(b, sines[i]))
            values[between * i + apart] = fma_rn_f32(b, cosines[i], mul_rn_f32(a, sines[i]))

    unpack, pack = _make_unpack(dtype, vectorized), _make_pack(dtype, vectorized)
    in_memory = load_bits, store_bits, load_chunk, store_chunk
    return Rotary(pairs, bits, *in_memory, load_angles, unpack, rotate, pack)


def _make_unpack(dtype: str, vectorized: bool) -> Callable:
    """unpack(values, bits): a chunk in float32."""
    to_f32 = ELEMENTS[dtype].to_f32
    if not vectorized:

        @device_function
        def unpack(values, bits):
            values[0], values[1] = to_f32(bits[0]), to_f32(bits[1])

    elif dtype == "float32":

        @device_function
        def unpack(values, bits):
            for i in range(8):
                values[i] = bits_as_float(bits[i])

    else:

        @device_function
        def unpack(values, bits):
            for i in range(8):
                values[2 * i] = to_f32(u16(bits[i] & u32(0xFFFF)))
                values[2 * i + 1] = to_f32(u16(bits[i] >> u32(16)))

    return unpack


def _make_pack(dtype: str, vectorized: bool) -> Callable:
    """pack(bits, values): a chunk, rounded."""
    from_f32 = ELEMENTS[dtype].from_f32
    if not vectorized:

        @device_function
        def pack(bits, values):
            bits[0], bits[1] = from_f32(values[0]), from_f32(values[1])

    elif dtype == "float32":

        @device_function
        def pack(bits, values):
            for i in range(8):
                bits[i] = float_as_bits(values[i])

    else:

        @device_function
        def pack(bits, values):
            for i in range(8):
                low, high = u32(from_f32(values[2 * i])), u32(from_f32(values[2 * i + 1]))
                bits[i] = low | (high << u32(16))

    return pack


class Stores(NamedTuple):
    """How a thread writes head h of a row. `to` is the `to_out` that `turn_heads` was given.

    Attributes:
        turned: (bits, values, out, to, h, chunk, half): a chunk of `values`; `bits` hold its bits
            as they were, and are free.
        columns_on: (to, columns): `to` so many columns on.
        copied: (bits, out, to, h): the columns that `bits` hold.
    """

    turned: Callable
    columns_on: Callable
    copied: Callable


def make_stores(dtype: str, parts: Rotary, interleaved: bool, vectorized: bool) -> Stores:
    """Of rows of x's dtype: `out` is a record `Tensor`, `to` the offset of the first head."""
    pack, store_bits, store_chunk = parts.pack, parts.store_bits, parts.store_chunk

    @device_function
    def store_turned(bits, values, out, to, h, chunk, half):
        pack(bits, values)
        store_chunk(bits, out.data, to + h * out.head, chunk, half)

    @device_function
    def columns_on(to, columns):
        return to + columns

    @device_function
    def store_copied(bits, out, to, h):
        store_bits(bits, out.data, to + h * out.head)

    return Stores(store_turned, columns_on, store_copied)


@cache
def make_turn_heads(
    dtype: str,
    table_dtype: str,
    interleaved: bool,
    vectorized: bool,
    heads: int,
    lanes: int,
    stores: Callable = make_stores,
) -> Callable:
    """A token's row in `heads` heads or fewer, read, rotated and written by `lanes` threads.

    turn_heads(x, out, from_x, to_out, left, lane, cos, sin, position, half, rotated, copied, sign)

        x, from_x       a record `Tensor`, and the offset of the first head
        out, to_out     where to, as what `stores` makes wants it: here another of both
        left            heads that there are from the first one on
        cos, sin        records `AngleTable`; `position` is the row
        half            rotary_dim / 2
        rotated         the same, or 0 for a row that is not rotated
        copied          columns behind 2 * rotated are copied up to here
        sign            -1 to rotate back

    A thread loads its angles once, then all of its heads before it stores one, so that many loads
    wait for memory together. No element is read by another thread than the one that writes it, so
    that `out` may be x itself.
    """
    parts = make_rotary(dtype, table_dtype, interleaved, vectorized)
    pairs, (bits_type, n_bits), load_angles = parts.pairs, parts.bits, parts.load_angles
    load_bits, load_chunk, unpack, rotate = (
        parts.load_bits,
        parts.load_chunk,
        parts.unpack,
        parts.rotate,
    )
    store_turned, columns_on, store_copied = stores(dtype, parts, interleaved, vectorized)
    n_values, n_rest, n_chunk = 2 * pairs, heads * n_bits, 2 * heads * n_bits

    @device_function
    def load_head(h, bits, x, base, chunk, half, left):
        if h < left:
            load_chunk(bits, x.data, base + h * x.head, chunk, half)

    @device_function
    def rotate_head(h, bits, out, to, chunk, half, left, cosines, sines):
        if h < left:
            values = cuda.local.array(n_values, f32)
            unpack(values, bits)
            rotate(values, cosines, sines)
            store_turned(bits, values, out, to, h, chunk, half)

    @device_function
    def load_rest(h, bits, x, offset, left):
        if h < left:
            load_bits(bits, x.data, offset + h * x.head)

    @device_function
    def store_rest(h, bits, out, to, left):
        if h < left:
            store_copied(bits, out, to, h)

    load_heads, rotate_heads = (
        make_unrolled(each, heads, 2 * n_bits) for each in (load_head, rotate_head)
    )
    load_rests, store_rests = (
        make_unrolled(each, heads, n_bits) for each in (load_rest, store_rest)
    )

    @device_function
    def turn_heads(
        x, out, from_x, to_out, left, lane, cos, sin, position, half, rotated, copied, sign
    ):
        cosines, sines = cuda.local.array(pairs, f32), cuda.local.array(pairs, f32)
        bits = cuda.local.array(n_chunk, bits_type)
        rest = cuda.local.array(n_rest, bits_type)
        for chunk in range(lane, quotient(rotated, pairs), lanes):
            load_angles(cosines, sines, cos, sin, position, chunk, sign)
            load_heads(0, bits, x, from_x, chunk, half, left)
            rotate_heads(0, bits, out, to_out, chunk, half, left, cosines, sines)
        for column in range(2 * rotated + lane * pairs, copied, lanes * pairs):
            load_rests(0, rest, x, from_x + column, left)
            store_rests(0, rest, out, columns_on(to_out, column), left)

    return turn_heads


@device_function
def position_of(positions, batch, token):
    """The position of a token of a batch entry, by the record `Positions`.

    Below 0 for a token of a packed array that is in no sequence.
    """
    entry, first = i32(batch), i32(0)
    if positions.is_packed != 0:
        entry = _sequence_of_token(positions, token)
        if entry == positions.entries:
            return i64(-1)
        first = positions.cu_seqlens[entry]
        if first > token:
            return i64(-1)
    position = i64(token) - i64(first) + i64(positions.offset)
    if positions.has_offsets != 0:
        position += i64(positions.offsets[entry])
    return position


@device_function
def _sequence_of_token(positions, token):
    """The first sequence that ends behind a token of a packed array; `entries` if none does.

    Whatever cu_seqlens holds, it is read in its bounds.
    """
    low, high = i32(0), i32(positions.entries)
    while low < high:
        middle = quotient(low + high, i32(2))
        if positions.cu_seqlens[middle + 1] > token:
            high = middle
        else:
            low = i32(middle + 1)
    return low
