"""Tile operations of the portable kernels, which use no tensor cores."""
