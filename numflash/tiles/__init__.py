"""Layer 1: operations of a thread, warp or block on a tile.

Every function here comes from a factory that fixes the tile's sizes, so that loops over registers
have constant bounds and unroll. A shared tile is a constant offset into the block's one array of
shared floats; `configs.SmemLayout` says where each begins.
"""
