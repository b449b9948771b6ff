"""The steps of a walk over keys, or over queries, and the tile that each step is of.

A kernel that walks counts steps from `begin` up to `end`:

    row = row_of(mask, batch, head, start)             where its rows are found in a block mask
    begin, end = steps_of(mask, row, tiles)            of the tiles that the band leaves
    tile, is_full = tile_at(mask, row, step)

Without a block mask a step is a tile, and nothing of this is in the machine code. With one the
tiles that its row of blocks lists come one after the other: those of empty blocks are no steps,
which costs neither copies nor products. `is_full` says that the function of the mask keeps every
key of the tile for every query, so that it need not be asked.

A row lists its blocks from the first to the last, each as 2 * block + is_full
(`kernels.arguments.BlockLists`). Tiles divide blocks (`Traits.torn`).
"""

from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, function_of_numbers, i32
from numflash.tiles.blocks import Keys, divide, quotient, tiles_seen, tokens_of


class BlockRow(NamedTuple):
    """The list of a row of blocks: the place of its first entry, and their number."""

    first: i32
    count: i32


@cache
def make_row_of(traits, by_keys=False):
    """row_of(mask, batch, head, start): the `BlockRow` of a tile of queries from `start` on.

    With `by_keys` of a tile of keys, whose list is one of blocks of queries.
    """
    if not traits.blocks:
        return _no_row
    block = traits.blocks[int(by_keys)]

    @device_function
    def row_of(mask, batch, head, start):
        lists = mask.lists
        row = i32(batch * lists.batch + head * lists.head + quotient(start, block))
        return BlockRow(i32(row * lists.pitch), i32(lists.counts[row]))

    return row_of


@cache
def make_steps_of(traits, tile, by_keys=False):
    """steps_of(mask, row, tiles): the steps that are of `tiles`, which are from one to another.

    Both are `Keys`, in tiles of `tile` keys, or with `by_keys` of queries.
    """
    if not traits.blocks:
        return _tiles_themselves
    per_block = traits.blocks[int(not by_keys)] // tile

    @device_function
    def first_step(mask, row, tile):
        """The first step that is of this tile or of one behind it."""
        entries, block = mask.lists.entries, quotient(tile, per_block)
        # The last entry is tried first: mostly the band leaves all of a list.
        low, high, middle = i32(0), row.count, i32(row.count - 1)
        while low < high:
            if entries[i32(row.first + middle)] >> 1 < block:
                low = i32(middle + 1)
            else:
                high = middle
            middle = i32((low + high) >> 1)
        step = i32(low * per_block)
        if low < row.count and entries[i32(row.first + low)] >> 1 == block:
            step = i32(step + tile - block * per_block)
        return step

    @device_function
    def steps_of(mask, row, tiles):
        begin = i32(0)
        if tiles.begin > 0:
            begin = first_step(mask, row, tiles.begin)
        return Keys(begin, i32(max(begin, first_step(mask, row, tiles.end))))

    return steps_of


@cache
def make_tile_at(traits, tile, by_keys=False):
    """tile_at(mask, row, step): (tile, is_full) of a step; see `make_steps_of`."""
    if not traits.blocks:
        return _step_itself
    per_block = traits.blocks[int(not by_keys)] // tile

    @device_function
    def tile_at(mask, row, step):
        place, part = divide(step, per_block)
        entry = i32(mask.lists.entries[i32(row.first + place)])
        return i32((entry >> 1) * per_block + part), entry & 1 != 0

    return tile_at


@device_function
def _no_row(mask, batch, head, start):
    return BlockRow(i32(0), i32(0))


@device_function
def _tiles_themselves(mask, row, tiles):
    return tiles


@device_function
def _step_itself(mask, row, step):
    return step, False


# The keys that a forward's tile of rows sees


@cache
def make_keys_of(config, traits):
    """keys_of(start, split, grid, sequence, mask, row)

    The steps of the keys that some of tile_m rows from `start` on see, as `Keys`: this split's
    share of them. `row` is the `BlockRow` of the tile.
    """
    tile_m, stage_n, is_split = config.tile_m, config.stage_n, config.num_splits > 1
    steps_of = make_steps_of(traits, stage_n)
    # With a block mask it reads lists, too.
    of_what = device_function if traits.blocks else function_of_numbers

    @of_what
    def keys_of(start, split, grid, sequence, mask, row):
        first, last = tokens_of(start, tile_m, grid.pack, sequence)
        begin, end = steps_of(mask, row, tiles_seen(first, last, stage_n, sequence))
        if is_split:
            share = quotient(max(0, end - begin) + grid.num_splits - 1, grid.num_splits)
            begin = i32(begin + split * share)
            end = i32(min(end, begin + share))
        return Keys(begin, end)

    return keys_of


@cache
def make_keys_of_part(config, traits, rows):
    """keys_of_part(row, begin, end, grid, sequence)

    The steps from `begin` to `end` of keys that some of `rows` rows from `row` on see; both ends
    lie between these, and are equal where there are no such rows. With a block mask they are all
    of them: all rows of a tile share a list.
    """
    if traits.blocks:
        return _all_of_them
    stage_n = config.stage_n

    @function_of_numbers
    def keys_of_part(row, begin, end, grid, sequence):
        first, last = tokens_of(row, rows, grid.pack, sequence)
        seen_begin, seen_end = tiles_seen(first, last, stage_n, sequence)
        seen_begin = min(max(seen_begin, begin), max(begin, end))
        seen_end = max(seen_begin, min(seen_end, end))
        seen_end = seen_end if row < grid.num_rows else seen_begin
        return Keys(i32(seen_begin), i32(seen_end))

    return keys_of_part


@function_of_numbers
def _all_of_them(row, begin, end, grid, sequence):
    return Keys(begin, i32(max(begin, end) if row < grid.num_rows else begin))
