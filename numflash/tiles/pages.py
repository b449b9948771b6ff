"""Where the keys of a sequence lie: in an array, one after another, or in the pages of a cache."""

from typing import NamedTuple

from numflash.ptx import device_function, i32, i64, u32, u64
from numflash.tiles.addresses import first_of_rows


@device_function
def _origin_of_rows(tensor, place, sequence, shape):
    return first_of_rows(tensor, place.batch, place.head_kv, sequence.first_k)


class InPages(NamedTuple):
    """The keys of one head of a sequence, in pages.

    Attributes:
        head: the offset of the head within a page.
        pages: a record `kernels.arguments.Pages`.
        row: the offset of the sequence's row in the table.
        first: the number of its first key among the keys of that row.
        last: the number of its last key, counted from the first.
    """

    head: i64
    pages: object
    row: i64
    first: i32
    last: i32


@device_function
def _origin_in_pages(tensor, place, sequence, shape):
    pages, last = shape.pages, i32(sequence.seqlen_k - 1)
    head = i64(place.head_kv) * tensor.head
    return InPages(head, pages, place.batch * pages.pitch, sequence.first_k, last)


def make_origin_of_keys(traits):
    """origin_of_keys(tensor, place, sequence, shape): the origin of the keys of a place.

    For `blocks.row_of_head` the offset of the first key; for `row_in_pages` an `InPages`.
    """
    return _origin_in_pages if traits.paged else _origin_of_rows


@device_function
def column_of_key(key, pages):
    """key // pages.size, without a division: the column of the table that names the key's page."""
    return i32(u32(u64(2 * key) * u64(u32(pages.factor)) >> u64(32)) >> u32(pages.shift))


@device_function
def row_in_pages(source, origin, row):
    """The offset of key `row`; -1 where the table names a page that does not exist.

    `origin` is an `InPages`. Keys behind the last one have its offset, so that the table is read
    within its bounds; nobody loads them.
    """
    pages, key = origin.pages, i32(origin.first + min(row, origin.last))
    column = column_of_key(key, pages)
    page = pages.table[origin.row + column]
    offset = origin.head + i64(page) * source.batch + (key - column * pages.size) * source.row
    return offset if page >= 0 and page < pages.count else i64(-1)
