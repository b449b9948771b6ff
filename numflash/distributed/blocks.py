"""Block masks of a whole sequence, cut to the queries, keys and heads of a call."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np

from numflash.api.block_masks import BlockMask
from numflash.distributed.arrays import Arrays
from numflash.problem.block_masks import ListedBlocks

Range = tuple[int, int]
"""(begin, end)."""

_made: WeakKeyDictionary[ListedBlocks, dict[tuple, ListedBlocks]] = WeakKeyDictionary()


def part_of(mask: ListedBlocks, rows: Range, keys: Range, heads: Range) -> ListedBlocks:
    """The block mask of some queries, keys and query heads.

    Lists are made on the device, once for each part of a mask: nothing is read back.

    Args:
        mask: of a whole sequence, and of all of its heads or of one that stands for all.
        rows: of the queries; it begins where a block does.
        keys: likewise.
        heads: of the query heads.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash.distributed.blocks import part_of
        >>> tiles = np.array([[True, False], [True, True]])
        >>> mask = numflash.BlockMask.from_tiles(tiles, block_size=16)
        >>> part_of(mask, (16, 32), (0, 32), (0, 2)).tiles()[0, 0].tolist()
        [[2, 2]]
        >>> part_of(mask, (0, 32), (16, 32), (0, 2)).tiles()[0, 0].tolist()
        [[0], [2]]
    """
    parts, name = _made.setdefault(mask, {}), (rows, keys, heads)
    if name not in parts:
        parts[name] = _part(mask, rows, keys, heads)
    return parts[name]


def _part(mask: ListedBlocks, rows: Range, keys: Range, heads: Range) -> ListedBlocks:
    of_rows, of_keys = map(_blocks, (rows, keys), mask.block_size)
    of_heads = slice(*heads) if mask.blocks.heads > 1 else slice(None)
    at = slice(None), of_heads, slice(*of_rows)
    entries, counts = _of_columns(mask.entries[at], mask.counts[at], of_keys)
    # Of an entry, 2 * column + is_full; of one that is not full the index is no block.
    columns, is_full = entries >> 1, entries & 1
    seqlens = None if mask.seqlens is None else (rows[1] - rows[0], keys[1] - keys[0])
    mask_mod, aux = mask.mask_mod, mask.aux
    if mask_mod is not None:
        mask_mod, aux = _moved(mask_mod), (*aux, heads[0], rows[0], keys[0])
    lists = SimpleNamespace(
        kv_num_blocks=counts,
        kv_indices=columns,
        full_kv_num_blocks=counts,
        full_kv_indices=columns * is_full - (1 - is_full),
        BLOCK_SIZE=mask.block_size,
        seq_lengths=seqlens,
        mask_mod=mask_mod,
    )
    made = BlockMask.from_flex_attention(lists, aux=aux)
    return replace(made, is_of_function=mask.is_of_function)


def _blocks(extent: Range, size: int) -> Range:
    """The blocks of some queries or keys; the last may be cut."""
    begin, end = extent
    return begin // size, -(-end // size)


def _of_columns(entries, counts, of_keys: Range) -> tuple:
    """Lists of these columns alone, which count from the first of them."""
    arrays, (first, past) = Arrays.of(entries, "entries"), of_keys
    batch, heads, rows, width = map(int, entries.shape)

    def numbers(axis: int, size: int):
        found = np.arange(size).reshape([size if n == axis else 1 for n in range(4)])
        return arrays.from_host(found)

    columns, is_listed = entries >> 1, numbers(3, width) < counts[..., None]
    before = (is_listed & (columns < first)).sum(-1)
    kept = (is_listed & (columns >= first) & (columns < past)).sum(-1)
    # Lists are in order: what is kept of one lies together. Behind it anything may stand.
    at = (before[..., None] + numbers(3, past - first)) % width
    of_lists = entries[numbers(0, batch), numbers(1, heads), numbers(2, rows), at]
    return of_lists - 2 * first, arrays.astype(kept, "int32")


def _moved(mask_mod: Callable) -> Callable:
    """The function of a part, whose last three numbers say where it begins in the whole."""

    def of_part(b, h, i, j, *aux):
        *own, head, row, key = aux
        return mask_mod(b, h + head, i + row, j + key, *own)

    return of_part
