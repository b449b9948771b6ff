"""Tiles of 8-bit floats: conversions, rotations, copies, products and softmax."""
