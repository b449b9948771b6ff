"""Lengths of sequences on the device: where each begins in its array, and how long it is.

A start or a length that leads out of the array, or a length beyond what a bias or mask has, is
cut: then the result is wrong, but no address is.
"""

from typing import NamedTuple

from numflash.ptx import device_function, i32, i64


class Extent(NamedTuple):
    """The rows of a sequence.

    Attributes:
        first: its first row in the array.
        length: how many it has.
        is_cut: 1 where the caller's numbers leave the array, else 0.
    """

    first: i32
    length: i32
    is_cut: i32


@device_function
def extent_of(ends, entry):
    """The `Extent` of a sequence; `ends` is a record `kernels.sequences.arguments.Ends`."""
    first, length = i64(0), i64(ends.bound)
    if ends.has_cumulative != 0:
        first = i64(ends.cumulative[entry])
        length = i64(ends.cumulative[entry + 1]) - first
    if ends.has_starts != 0:
        first = i64(ends.starts[entry])
    kept = min(max(first, i64(0)), i64(ends.bound))
    room = min(i64(ends.bound) - kept, i64(ends.most))
    if ends.has_lengths != 0:
        length = i64(ends.lengths[entry]) + ends.added
        if ends.with_start != 0:
            length -= kept
    elif ends.has_cumulative == 0:
        length = room
    cut = min(max(length, i64(0)), room)
    return Extent(i32(kept), i32(cut), i32(1 if kept != first or cut != length else 0))
