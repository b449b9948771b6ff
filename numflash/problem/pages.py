"""The pages of a cache of keys and values, and the table that says whose they are."""

from typing import NamedTuple

from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView

_MAX_KEYS = 2**28


class PageTable(NamedTuple):
    """A table (entries, pages of an entry) of numbers of pages, on the device.

    Attributes:
        entries: sequences.
        width: pages that a sequence may have.
        pitch: elements from an entry's row to the next.
        count: pages that there are.
        size: keys of a page.
    """

    entries: int
    width: int
    pitch: int
    count: int
    size: int

    @property
    def factor(self) -> int:
        """With `shift`: j // size is the upper half of 2 j * factor, of 32 bits each, shifted.

        Exact for j below 2 ** 31: the factor is 2 ** (31 + shift) / size, rounded up, so that the
        product is too large by less than 2 ** (31 + shift) / size.
        """
        return -(-(2 ** (31 + self.shift)) // self.size)

    @property
    def shift(self) -> int:
        """See `factor`."""
        return (self.size - 1).bit_length()


def page_table_of(view: ArrayView, of_keys: tuple[int, ...], device: int) -> PageTable:
    """Check a table of pages.

    Args:
        view: of the table.
        of_keys: the shape of the cache of keys, (pages, page_size, heads, head_dim).
        device: of q.

    Raises:
        TypeError: it is not int32.
        ValueError: a wrong shape, strides or device, or a page without keys.
        UnsupportedError: more keys than kernels can count.
    """
    if view.dtype != "int32":
        raise TypeError(f"page_table must be int32, got {view.dtype}")
    if len(view.shape) != 2:
        raise ValueError(
            f"page_table must have two dimensions (sequences, pages), got shape {view.shape}"
        )
    if not view.has_contiguous_rows:
        raise ValueError(
            f"page_table must have a contiguous last axis, stride 1, got stride {view.strides[1]}"
        )
    if view.device != device:
        raise ValueError(
            f"page_table must lie on the device of q, {device}, got device {view.device}"
        )
    (entries, width), (count, size) = view.shape, of_keys[:2]
    if size < 1:
        raise ValueError(f"a page of k must have at least one key, got shape {tuple(of_keys)}")
    if width * size >= _MAX_KEYS:
        raise UnsupportedError(
            f"page_table has {width} pages of {size} keys for a sequence; {_MAX_KEYS} keys are "
            "too many"
        )
    return PageTable(entries, width, view.strides[0], count, size)
