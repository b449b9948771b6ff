"""Tiles for the tensor cores: operands in swizzled shared memory, accumulators in registers.

Everything here is a collective of one warp, which owns whole rows of the result, except the
copies, which the block makes together.
"""
