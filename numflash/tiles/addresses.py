"""Where rows and heads of an array lie: offsets by the strides of its record, in elements."""

from numflash.ptx import device_function, function_of_numbers, i32, i64
from numflash.tiles.division import quotient


@device_function
def token_of_row(row, pack):
    """The token of a row where `pack` query heads of a token are neighbouring rows."""
    return quotient(row, pack)


@device_function
def first_of_head(tensor, batch, head):
    """The offset of the first row of a head; `tensor` has the strides `batch` and `head`."""
    return batch * tensor.batch + head * tensor.head


@device_function
def first_of_rows(tensor, batch, head, row):
    """The offset of a row of a head; `tensor` has the strides `batch`, `head` and `row`."""
    return first_of_head(tensor, batch, head) + row * tensor.row


@device_function
def row_of_head(source, origin, row):
    """The offset of a row of one head; `origin` is that of its row 0."""
    return origin + row * source.row


@function_of_numbers
def first_of_statistics(batch, head, shape):
    """The offset of a head in an array (batch, num_heads_q, seqlen_q), as lse and delta are."""
    return i64(i32(batch * shape.num_heads_q + head)) * shape.seqlen_q


@function_of_numbers
def _first_of_ragged_statistics(batch, head, shape):
    return batch * shape.statistics_batch + head * shape.statistics_head


def make_first_of_statistics(traits):
    """first_of_statistics(batch, head, shape): the offset of a head in lse and in delta.

    They are (batch, num_heads_q, seqlen_q), or where sequences are packed (num_heads_q, tokens).
    """
    return _first_of_ragged_statistics if traits.ragged else first_of_statistics


@function_of_numbers
def _first_of_lse(place, packed, sequence, grid, shape):
    head_of_batch = place.batch * shape.num_heads_q + place.head
    part = i64(place.split) * grid.num_heads + head_of_batch + packed
    return part * shape.seqlen_q


@device_function
def _first_of_ragged_lse(place, packed, sequence, grid, shape):
    head = i32(place.head + packed)
    return _first_of_ragged_statistics(place.batch, head, shape) + sequence.first_q


def make_first_of_lse(traits):
    """first_of_lse(place, packed, sequence, grid, shape): where lse of a sequence's head begins.

    The head is the one `packed` after that of the place; the part is that of its split.
    """
    return _first_of_ragged_lse if traits.ragged else _first_of_lse
