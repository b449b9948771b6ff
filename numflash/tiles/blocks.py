"""Which rows, heads and keys a block computes: all of its threads together, or one for them.

Sizes come as two tuples:

    grid    num_rows (of a head, packed heads together), num_heads (of all batch entries), pack,
            num_splits, heads_in_flight
    band    seqlen_k, band_lo, band_hi
"""

from functools import cache

from numflash.ptx import device_function, i32, mov_ctaid_x, mov_nctaid_x, u32


@device_function
def first_of_head(tensor, batch, head):
    """The offset of the first row of a head; `tensor` has the strides `batch` and `head`."""
    return batch * tensor.batch + head * tensor.head


@device_function
def grid_of(shape, layout):
    """The `grid` of a forward, from the records `kernels.arguments.Shape` and `Layout`."""
    num_rows, num_heads = shape.seqlen_q * layout.pack, shape.batch_size * shape.num_heads_q
    return i32(num_rows), i32(num_heads), layout.pack, layout.num_splits, layout.heads_in_flight


@device_function
def token_of_row(row, pack):
    """The token of a row where `pack` query heads of a token are neighbouring rows."""
    # Unsigned 32-bit division is a quarter of the code of Python's.
    return i32(u32(row) // u32(pack))


@cache
def make_block_place(tile_m):
    """block_place(place, grid)

    (first row, first head of all batch entries, split of the keys) of a tile of rows. Heads go in
    bundles of heads_in_flight, whose K and V are read at about the same time. In the last bundle
    the last rows, which in a causal problem see the most keys, come first, in the one before it
    they come last, and so on: from one place to the next the work changes little.
    """

    @device_function
    def block_place(place, grid):
        num_rows, num_heads, pack, num_splits, heads_in_flight = grid
        # Unsigned 32-bit divisions are a quarter of the code of Python's.
        in_order = u32(place // u32(num_splits))
        split = u32(place - in_order * u32(num_splits))
        num_m_blocks = u32(u32(num_rows + tile_m - 1) // u32(tile_m))
        per_bundle = u32(u32(heads_in_flight) * num_m_blocks)
        packed_heads = u32(u32(num_heads) // u32(pack))
        number = u32(in_order // per_bundle)
        later_bundles = u32((packed_heads - u32(1)) // u32(heads_in_flight) - number)
        first_head = u32(number * u32(heads_in_flight))
        bundle = u32(min(u32(heads_in_flight), packed_heads - first_head))
        in_bundle = u32(in_order - first_head * num_m_blocks)
        m_block = u32(in_bundle // bundle)
        head = first_head + in_bundle - m_block * bundle
        if later_bundles % u32(2) == u32(0):
            m_block = u32(num_m_blocks - u32(1) - m_block)
        return i32(m_block * u32(tile_m)), i32(head * u32(pack)), i32(split)

    return block_place


@cache
def make_walk(tile_m):
    """walk(grid): (first place, step, number of places); `next_place` leads on."""

    @device_function
    def walk(grid):
        num_rows, num_heads, pack, num_splits, _ = grid
        num_m_blocks = u32(num_rows + tile_m - 1) // u32(tile_m)
        num_places = u32(num_m_blocks * (u32(num_heads) // u32(pack)) * u32(num_splits))
        place = mov_ctaid_x()
        return place, u32(u32(2) * (mov_nctaid_x() - place) - u32(1)), num_places

    return walk


@device_function
def next_place(place, step):
    """The place that a block takes after this one, and the next step.

    It is as far from the end of its round as this from the beginning, and so on to and fro: where
    places become cheaper one after the other each block has as much to do.
    """
    return u32(place + step), u32(u32(2) * mov_nctaid_x() - step)


@cache
def make_keys_of(config):
    """keys_of(m_start, split, grid, band)

    (first, end) of the stages of keys that some of tile_m rows see, of this split's share.
    """
    tile_m, is_split = config.tile_m, config.num_splits > 1
    seen = _make_seen(config.stage_n)

    @device_function
    def keys_of(m_start, split, grid, band):
        n_begin, n_end = seen(m_start, tile_m, grid, band)
        if is_split:
            num_splits = grid[3]
            share = i32(u32(max(0, n_end - n_begin) + num_splits - 1) // u32(num_splits))
            n_begin = i32(n_begin + split * share)
            n_end = i32(min(n_end, n_begin + share))
        return n_begin, n_end

    return keys_of


@cache
def make_keys_of_part(config, rows):
    """keys_of_part(row, n_begin, n_end, grid, band)

    (first, end) of those of the stages of keys n_begin to n_end that some of `rows` rows from
    `row` on see; both lie between these, and are equal where there are no such rows.
    """
    seen = _make_seen(config.stage_n)

    @device_function
    def keys_of_part(row, n_begin, n_end, grid, band):
        begin, end = seen(row, rows, grid, band)
        begin = min(max(begin, n_begin), max(n_begin, n_end))
        end = max(begin, min(end, n_end)) if row < grid[0] else begin
        return i32(begin), i32(end)

    return keys_of_part


@cache
def _make_seen(stage_n):
    """seen(row, rows, grid, band): (first, end) of the stages of keys that rows see."""

    @device_function
    def seen(row, rows, grid, band):
        num_rows, _, pack, _, _ = grid
        seqlen_k, band_lo, band_hi = band
        first_token = token_of_row(row, pack)
        last_token = token_of_row(min(row + rows, num_rows) - 1, pack)
        end = max(0, min(seqlen_k, last_token + band_hi + 1))
        n_begin = i32(u32(max(0, first_token + band_lo)) // u32(stage_n))
        return n_begin, i32(u32(end + stage_n - 1) // u32(stage_n))

    return seen


@cache
def make_whole_keys(tile_n, rows):
    """whole_keys(row, grid, band)

    (first, last): tiles of keys that begin between these are seen whole by `rows` rows.
    """

    @device_function
    def whole_keys(row, grid, band):
        num_rows, _, pack, _, _ = grid
        seqlen_k, band_lo, band_hi = band
        last_token = token_of_row(min(row + rows, num_rows) - 1, pack)
        end = min(seqlen_k, token_of_row(row, pack) + band_hi + 1)
        return i32(last_token + band_lo), i32(end - tile_n)

    return whole_keys
