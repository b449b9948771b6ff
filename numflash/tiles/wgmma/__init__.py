"""Tiles for Hopper: operands that bulk copies bring, products of whole warpgroups.

The accumulators of a warpgroup are, warp by warp, those of `tiles.mma` with one row of products:
what works on scores and rows there works here.
"""
