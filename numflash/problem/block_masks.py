"""Block masks: which blocks of queries and keys attention computes, as lists on the device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, NamedTuple

import numpy as np

from numflash.functions.identity import key_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView

NUMBER = Number | np.generic
"""What functions get that is no array."""
BLOCK_STEP = 16
"""Blocks are multiples of this many queries and keys: the smallest tiles of kernels are."""
# Steps are 32-bit in kernels, and so are places of queries and keys.
_MAX_STEPS = 2**31 - 1
_MAX_BLOCK = 2**16
_MAX_SEQLEN = 2**30
_NAMES = ("block_entries", "block_counts", "block_entries_of_keys", "block_counts_of_keys")


class Blocks(NamedTuple):
    """A block mask in numbers.

    Attributes:
        size: queries and keys of a block.
        rows, columns: blocks of queries and of keys.
        batch, heads: lists for each batch entry and head; 1 where all share them.
    """

    size: tuple[int, int]
    rows: int
    columns: int
    batch: int
    heads: int

    @property
    def count(self) -> int:
        """All blocks of all heads."""
        return self.batch * self.heads * self.rows * self.columns


@dataclass(frozen=True, eq=False)
class ListedBlocks:
    """The blocks of queries and keys that are not empty, in lists.

    Attributes:
        blocks: their numbers.
        seqlens: (seqlen_q, seqlen_k) that it was made for; None where only blocks are known.
        entries: (batch, heads, rows, columns) int32: of each row of blocks those that are not
            empty, in order, as 2 * column + is_full.
        counts: (batch, heads, rows) int32: how many.
        entries_of_keys, counts_of_keys: the same by columns.
        mask_mod: what says which keys of a block that is not full a query sees; None: all.
        aux: the arrays and numbers that it gets.
        is_of_function: whether its lists were made of mask_mod, for the batch entries and heads
            that they have.
    """

    blocks: Blocks
    seqlens: tuple[int, int] | None
    entries: Any
    counts: Any
    entries_of_keys: Any
    counts_of_keys: Any
    mask_mod: Callable | None = None
    aux: tuple = ()
    is_of_function: bool = False

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.blocks.size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, seqlen_q, seqlen_k); whole blocks where only these are known."""
        (block_m, block_n), rows, columns, batch, heads = self.blocks
        return batch, heads, *(self.seqlens or (rows * block_m, columns * block_n))

    def arrays(self) -> dict[str, Any]:
        """The arrays of lists and of aux, by the names of operands."""
        lists = self.entries, self.counts, self.entries_of_keys, self.counts_of_keys
        return dict(zip(_NAMES, lists, strict=True)) | arrays_of_aux(self.aux)

    def with_arrays(self, given: Mapping[str, Any]) -> "ListedBlocks":
        """The same blocks with these in the places of all arrays, by the names of `arrays`."""
        named = zip(names_of_aux(self.aux), self.aux, strict=True)
        aux = tuple([x if isinstance(x, NUMBER) else given[name] for name, x in named])
        lists = (given[name] for name in _NAMES)
        of_function = self.mask_mod, aux, self.is_of_function
        return ListedBlocks(self.blocks, self.seqlens, *lists, *of_function)

    def key(self) -> tuple:
        """A key of a ready call. Arrays are left out: they have keys of their own.

        Raises TypeError where nobody can tell what its function means.
        """
        if (meaning := key_of(self.mask_mod)) is None:
            raise TypeError("nobody can tell whether this function means what it meant before")
        # By their text, which tells -0.0 from 0.0.
        numbers = [(type(x), repr(x)) if isinstance(x, NUMBER) else None for x in self.aux]
        return self.blocks, self.seqlens, meaning, *numbers

    def __repr__(self) -> str:
        (block_m, block_n), rows, columns, batch, heads = self.blocks
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        return (
            f"BlockMask(shape={self.shape}, block_size=({block_m}, {block_n}), mask_mod={name}, "
            f"{rows} x {columns} blocks of {batch} x {heads} heads)"
        )


def names_of_aux(aux: tuple) -> list[str]:
    """The names of operands of a block mask's aux."""
    return [f"block_aux{n}" for n in range(len(aux))]


def arrays_of_aux(aux: tuple) -> dict[str, Any]:
    """The arrays of a block mask's aux, by the names of operands."""
    named = zip(names_of_aux(aux), aux, strict=True)
    return {name: each for name, each in named if not isinstance(each, NUMBER)}


def block_size_of(value) -> tuple[int, int]:
    """(queries, keys) of a block, from one number or two.

    Raises:
        TypeError: neither.
        ValueError: one that is no multiple of 16 in range.
    """
    sizes = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, Integral) for n in sizes):
        raise TypeError(f"block_size must be an integer, or a pair (queries, keys), got {value!r}")
    for n in sizes:
        if n % BLOCK_STEP or not 0 < n <= _MAX_BLOCK:
            raise ValueError(
                f"block_size must be a multiple of {BLOCK_STEP} from {BLOCK_STEP} to "
                f"{_MAX_BLOCK}, so that tiles divide it, got {value}"
            )
    return int(sizes[0]), int(sizes[1])


def blocks_of(size: tuple[int, int], rows: int, columns: int, batch: int, heads: int) -> Blocks:
    """Blocks in numbers. Raises UnsupportedError where there are too many for lists."""
    blocks = Blocks(size, rows, columns, batch, heads)
    # Kernels number the steps of all lists, as many to an entry as small tiles are in a block.
    most = _MAX_STEPS // (max(size) // BLOCK_STEP)
    if blocks.count > most:
        raise UnsupportedError(
            f"a block mask of {batch} x {heads} heads and {rows} x {columns} blocks has "
            f"{blocks.count} entries; lists of blocks of {max(size)} have at most {most}"
        )
    return blocks


def blocks_of_sequences(
    size: tuple[int, int], seqlen_q: int, seqlen_k: int, batch: int, heads: int
) -> Blocks:
    """The blocks that cover sequences. Raises TypeError, ValueError, UnsupportedError."""
    names = "batch", "heads", "seqlen_q", "seqlen_k"
    for name, value in zip(names, (batch, heads, seqlen_q, seqlen_k), strict=True):
        if isinstance(value, bool) or not isinstance(value, Integral):
            kind = type(value).__name__
            raise TypeError(f"{name} must be an integer, got {value!r} ({kind})")
        fewest = 0 if name.startswith("seqlen") else 1
        if value < fewest:
            raise ValueError(f"{name} must be at least {fewest}, got {value}")
        if value >= _MAX_SEQLEN:
            raise UnsupportedError(f"{name} must be below {_MAX_SEQLEN}, got {value}")
    return blocks_of(size, -(-seqlen_q // size[0]), -(-seqlen_k // size[1]), batch, heads)


def expect_blocks(
    mask: ListedBlocks, views: dict[str, ArrayView], sizes: tuple[int, int, int, int], device
) -> Blocks:
    """Check that a block mask is for a problem of (batch, num_heads_q, seqlen_q, seqlen_k).

    Raises:
        ValueError: it is for another one, or on another device.
    """
    batch, heads, seqlen_q, seqlen_k = sizes
    found = mask.blocks
    for name, value, wanted in (("batch", found.batch, batch), ("heads", found.heads, heads)):
        if value not in (1, wanted):
            raise ValueError(f"block_mask must have {name} 1 or {wanted}, as q has, got {value}")
    if mask.seqlens is not None and mask.seqlens != (seqlen_q, seqlen_k):
        raise ValueError(
            f"block_mask must be made for seqlen_q and seqlen_k of q and k, {seqlen_q} and "
            f"{seqlen_k}, got {mask.seqlens[0]} and {mask.seqlens[1]}"
        )
    rows, columns = -(-seqlen_q // found.size[0]), -(-seqlen_k // found.size[1])
    if (found.rows, found.columns) != (rows, columns):
        raise ValueError(
            f"block_mask must have {rows} x {columns} blocks of {found.size[0]} x "
            f"{found.size[1]} for seqlens {seqlen_q} and {seqlen_k}, got {found.rows} x "
            f"{found.columns}"
        )
    for name in _NAMES:
        if views[name].device != device:
            raise ValueError(
                f"block_mask must lie on the device of q, {device}, got device "
                f"{views[name].device}"
            )
    return found


def expect_block_mask(name: str, value) -> None:
    """Check the type of an option. Raises TypeError."""
    if value is not None and not isinstance(value, ListedBlocks):
        raise TypeError(
            f"{name} must be a BlockMask, as create_block_mask makes it, or FlexAttention's, got "
            f"{value!r} ({type(value).__name__})"
        )
