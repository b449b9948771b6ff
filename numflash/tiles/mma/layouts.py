"""The places of a tile's 16-byte chunks in shared memory.

`ldmatrix` reads the same chunk of eight neighbouring rows at once. So that the eight lie in
different banks, chunk c of row r is stored where chunk c ^ s(r) would be, with s running through
as many values as the row has room for; rows of half a 128-byte line supply the missing factor of
two themselves. tests/host/numflash/test_mma_layouts.py proves that this is a bijection and free of
conflicts.

Positions are in words of four bytes. Tiles begin at multiples of `ALIGNMENT_WORDS`.
"""

from dataclasses import dataclass
from functools import cache

from numflash.ptx import device_function

CHUNK_WORDS = 4
ALIGNMENT_WORDS = 32


@dataclass(frozen=True)
class TileLayout:
    """A tile of rows of `chunks` chunks, a multiple of 4. Not swizzled is for comparison only."""

    chunks: int
    swizzled: bool = True

    @property
    def pitch(self) -> int:
        """Words from one row to the next."""
        return CHUNK_WORDS * self.chunks

    @property
    def period(self) -> int:
        """Chunks that change places among each other."""
        return 8 if self.chunks % 8 == 0 else 4


@cache
def make_word(layout: TileLayout):
    """word(row, chunk): the first word of a chunk."""
    pitch, mask, swizzled = layout.pitch, layout.period - 1, layout.swizzled
    rows_per_line = 8 // layout.period

    @device_function
    def word(row, chunk):
        if swizzled:
            chunk = chunk ^ (row // rows_per_line & mask)
        return row * pitch + CHUNK_WORDS * chunk

    return word


@cache
def make_advance(layout: TileLayout):
    """advance(word, step): from chunk 0 or 1 of a row to the chunk 2 * step further right.

    One exclusive or with a constant, and an addition that the load's immediate absorbs.
    """
    within_period, swizzled = CHUNK_WORDS * layout.period - 1, layout.swizzled

    @device_function
    def advance(word, step):
        words = 2 * CHUNK_WORDS * step
        if swizzled:
            return (word ^ (words & within_period)) + (words & ~within_period)
        return word + words

    return advance
