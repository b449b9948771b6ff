"""The steps of a walk over keys, or over queries, and the tile that each step is of.

A kernel that walks counts steps from `begin` up to `end`:

    begin, end = steps_of(mask, batch, head, start, tiles)     of the tiles that the band leaves
    tile, is_full = tile_at(mask, step)

Without a block mask a step is a tile, and nothing of this is in the machine code. With one the
tiles of the blocks that are listed come one after the other: empty blocks have no steps, which
costs neither copies nor products. `is_full` says that the function of the mask keeps every key of
the tile for every query, so that it need not be asked.

A row of blocks lists its blocks in order, each as 2 * block + is_full, one row's entries behind
another's (`kernels.arguments.BlockLists`). Steps count through the entries of all rows, so that a
number is all that a kernel keeps of a place in a list. Tiles divide blocks (`Traits.torn`).
"""

from functools import cache

from numflash.ptx import device_function, function_of_numbers, i32
from numflash.tiles.division import divide, quotient
from numflash.tiles.sequences import Keys, tiles_seen, tokens_of


@cache
def make_steps_of(traits, tile, by_keys=False):
    """steps_of(mask, batch, head, start, tiles)

    The steps, as `Keys`, of a tile of queries from `start` on that are of `tiles`, the `Keys` from
    one tile of `tile` keys to another. With `by_keys` keys and queries change places.
    """
    if not traits.blocks:
        return _tiles_themselves
    own, other = traits.blocks[::-1] if by_keys else traits.blocks
    per_block = other // tile

    @device_function
    def first_step(entries, first, end, tile):
        """The first step of entries `first` to `end` that is of this tile or of one behind it."""
        block = quotient(tile, per_block)
        # The last entry is tried first: mostly the band leaves all of a list.
        low, high, middle = first, end, i32(end - 1)
        while low < high:
            if entries[middle] >> 1 < block:
                low = i32(middle + 1)
            else:
                high = middle
            middle = i32((low + high) >> 1)
        step = i32(low * per_block)
        if low < end and entries[low] >> 1 == block:
            step = i32(step + tile - block * per_block)
        return step

    @device_function
    def steps_of(mask, batch, head, start, tiles):
        lists = mask.lists
        row = i32(batch * lists.batch + head * lists.head + quotient(start, own))
        first = i32(row * lists.pitch)
        end, begin = i32(first + lists.counts[row]), i32(first * per_block)
        if tiles.begin > 0:
            begin = first_step(lists.entries, first, end, tiles.begin)
        return Keys(begin, i32(max(begin, first_step(lists.entries, first, end, tiles.end))))

    return steps_of


@cache
def make_tile_at(traits, tile, by_keys=False):
    """tile_at(mask, step): (tile, is_full) of a step; see `make_steps_of`."""
    if not traits.blocks:
        return _step_itself
    per_block = traits.blocks[int(not by_keys)] // tile

    @device_function
    def tile_at(mask, step):
        place, part = divide(step, per_block)
        entry = i32(mask.lists.entries[place])
        return i32((entry >> 1) * per_block + part), entry & 1 != 0

    return tile_at


@device_function
def _tiles_themselves(mask, batch, head, start, tiles):
    return tiles


@device_function
def _step_itself(mask, step):
    return step, False


# The keys that a forward's tile of rows sees


@cache
def make_keys_of(config, traits):
    """keys_of(place, grid, sequence, mask)

    The steps of the keys that some of the rows of a `Place` see, as `Keys`: the share of its
    split.
    """
    num_rows, stage_n, is_split = config.block_rows, config.stage_n, config.num_splits > 1
    ragged = traits.ragged
    steps_of = make_steps_of(traits, stage_n)
    # With a block mask it reads lists, too.
    of_what = device_function if traits.blocks else function_of_numbers

    @of_what
    def keys_of(place, grid, sequence, mask):
        first, last = tokens_of(place.start, num_rows, grid.pack, sequence)
        if ragged:
            tiles = place.tiles
        else:
            tiles = tiles_seen(first, last, stage_n, sequence)
        begin, end = steps_of(mask, place.batch, place.head, first, tiles)
        if is_split and not ragged:
            share = quotient(max(0, end - begin) + grid.num_splits - 1, grid.num_splits)
            begin = i32(begin + place.split * share)
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
        seen_end = seen_end if row < sequence.seqlen_q * grid.pack else seen_begin
        return Keys(i32(seen_begin), i32(seen_end))

    return keys_of_part


@function_of_numbers
def _all_of_them(row, begin, end, grid, sequence):
    return Keys(begin, i32(max(begin, end) if row < sequence.seqlen_q * grid.pack else begin))
