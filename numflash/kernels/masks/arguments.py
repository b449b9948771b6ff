"""The records that the kernels of this folder take, made as those of `kernels.arguments`."""

from typing import NamedTuple

from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint8 as u8

from numflash.runtime.views import Pointer


class BlockSizes(NamedTuple):
    """The blocks of a block mask, and the sequences that they lie in."""

    batch: i32
    heads: i32
    rows: i32
    columns: i32
    seqlen_q: i32
    seqlen_k: i32


class TileFlags(NamedTuple):
    """A flag for each block, (batch, head, row, column), with strides in elements."""

    data: Pointer(u8)
    batch: i64
    head: i64
    row: i64
    column: i64


class RowLists(NamedTuple):
    """FlexAttention's lists: (batch, head, row) counts, (batch, head, row, length) indices."""

    counts: Pointer(i32)
    indices: Pointer(i32)
    count_batch: i64
    count_head: i64
    count_row: i64
    batch: i64
    head: i64
    row: i64
    step: i64
    length: i32
