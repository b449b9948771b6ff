"""Which rows, heads and keys a block computes."""

from functools import cache

from numflash.ptx import device_function, i32, u32


@cache
def make_block_place(tile_m):
    """block_place(block, num_rows, num_heads, pack, num_splits, heads_in_flight)

    (first row, first head of all batch entries, split of the keys) of the block-th tile of rows.
    Heads go in bundles whose K and V fit the L2 cache; within a bundle the last rows, which in a
    causal problem see the most keys, start first.
    """

    @device_function
    def block_place(block, num_rows, num_heads, pack, num_splits, heads_in_flight):
        # Unsigned 32-bit divisions are a quarter of the code of Python's.
        in_order = u32(block // u32(num_splits))
        split = u32(block - in_order * u32(num_splits))
        num_m_blocks = u32(u32(num_rows + tile_m - 1) // u32(tile_m))
        per_bundle = u32(u32(heads_in_flight) * num_m_blocks)
        first_head = u32(in_order // per_bundle * u32(heads_in_flight))
        bundle = u32(min(u32(heads_in_flight), u32(num_heads) // u32(pack) - first_head))
        in_bundle = u32(in_order - first_head * num_m_blocks)
        from_last = u32(in_bundle // bundle)
        head = first_head + in_bundle - from_last * bundle
        m_start = (num_m_blocks - u32(1) - from_last) * u32(tile_m)
        return i32(m_start), i32(head * u32(pack)), i32(split)

    return block_place
