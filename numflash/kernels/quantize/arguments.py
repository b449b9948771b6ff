"""The records that the kernels of this folder take, made as those of `kernels.arguments`."""

from typing import NamedTuple

from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint8 as u8

from numflash.runtime.views import Pointer


class Sizes(NamedTuple):
    """The sizes of an array that is quantised, or of the result of the way back."""

    seqlen: i32
    num_heads: i32
    head_dim: i32


class Grouped(NamedTuple):
    """A maximum or a scale for each group of `tokens` tokens, (batch, head, group)."""

    data: Pointer(f32)
    batch: i64
    head: i64
    tokens: i32


class Codes(NamedTuple):
    """A (batch, row, head, column) array of codes with any strides, in elements."""

    data: Pointer(u8)
    batch: i64
    row: i64
    head: i64
    column: i64


class Signs(NamedTuple):
    """256 signs for the columns of a row, a bit each: `numflash.reference.hadamard_signs`."""

    w0: i32
    w1: i32
    w2: i32
    w3: i32
    w4: i32
    w5: i32
    w6: i32
    w7: i32


class Squares(NamedTuple):
    """For each block of `tokens` tokens the sum of squares, and of squared errors of its codes."""

    data: Pointer(f32)
    tokens: i32
