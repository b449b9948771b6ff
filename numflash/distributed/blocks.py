"""Block masks of a whole sequence, cut to the queries and heads of a call."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakKeyDictionary

from numflash.api.block_masks import BlockMask
from numflash.problem.block_masks import ListedBlocks

_made: WeakKeyDictionary[ListedBlocks, dict[tuple, ListedBlocks]] = WeakKeyDictionary()


def part_of(mask: ListedBlocks, rows: tuple[int, int], heads: tuple[int, int]) -> ListedBlocks:
    """The block mask of some queries and query heads, and of all keys.

    Lists are made on the device, once for each part of a mask: nothing is read back.

    Args:
        mask: of a whole sequence, and of all of its heads or of one that stands for all.
        rows: (begin, end) of the queries, each a multiple of a block's queries or the last.
        heads: (begin, end) of the query heads.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash.distributed.blocks import part_of
        >>> tiles = np.array([[True, False], [True, True]])
        >>> mask = numflash.BlockMask.from_tiles(tiles, block_size=16)
        >>> part_of(mask, (16, 32), (0, 2)).tiles()[0, 0].tolist()
        [[2, 2]]
    """
    parts = _made.setdefault(mask, {})
    if (rows, heads) not in parts:
        parts[rows, heads] = _part(mask, rows, heads)
    return parts[rows, heads]


def _part(mask: ListedBlocks, rows: tuple[int, int], heads: tuple[int, int]) -> ListedBlocks:
    block_m, _ = mask.block_size
    of_heads = slice(*heads) if mask.blocks.heads > 1 else slice(None)
    at = slice(None), of_heads, slice(rows[0] // block_m, -(-rows[1] // block_m))
    entries, counts = mask.entries[at], mask.counts[at]
    # Of an entry, 2 * column + is_full; of one that is not full the index is no block.
    columns, is_full = entries >> 1, entries & 1
    seqlens = None if mask.seqlens is None else (rows[1] - rows[0], mask.seqlens[1])
    mask_mod, aux = mask.mask_mod, mask.aux
    if mask_mod is not None:
        mask_mod, aux = _moved(mask_mod), (*aux, rows[0], heads[0])
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


def _moved(mask_mod: Callable) -> Callable:
    """The function of a part, whose last two numbers say where it begins in the whole."""

    def of_part(b, h, i, j, *aux):
        *own, row, head = aux
        return mask_mod(b, h + head, i + row, j, *own)

    return of_part
