"""Divisions of numbers that are not negative and below 2 ** 31.

They are of unsigned 32-bit numbers, which take a quarter of the code of Python's.
"""

from numflash.ptx import function_of_numbers, i32, u32


@function_of_numbers
def quotient(x, by):
    """x // by of numbers that are not negative."""
    return i32(u32(x) // u32(by))


@function_of_numbers
def divide(x, by):
    """(x // by, x % by) of numbers that are not negative."""
    whole = quotient(x, by)
    return whole, i32(x - whole * by)


@function_of_numbers
def tiles_of(length, tile):
    """The number of tiles that cover so many rows."""
    return quotient(length + tile - 1, tile)
