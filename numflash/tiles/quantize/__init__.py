"""Tile operations of the kernels that quantise."""
