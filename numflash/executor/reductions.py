"""The result of an atomic operation, or of a bulk copy that reduces, on two elements."""

from collections.abc import Callable

import numpy as np

from numflash.executor import arithmetic as a
from numflash.executor.text import UnknownError
from numflash.executor.types import DTYPES, HALVES, PAIRS

_OF_TYPE = {
    "u32": "add inc dec min max",
    **dict.fromkeys(("s32", "u64", "s64"), "add min max"),
    **dict.fromkeys(("b32", "b64"), "and or xor exch cas"),
    "b16": "cas",
    **dict.fromkeys(("f32", "f64"), "add"),
    **dict.fromkeys((*HALVES, *PAIRS), "add min max"),
}
_FUNCTIONS = {
    "add": lambda held, x: held + x,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda held, x: held & x,
    "or": lambda held, x: held | x,
    "xor": lambda held, x: held ^ x,
    "exch": lambda held, x: x,
    "cas": lambda held, x, y: np.where(held == x, y, held),
    # Around the circle from 0 to x.
    "inc": lambda held, x: np.where(held >= x, 0, held + 1).astype(held.dtype),
    "dec": lambda held, x: np.where((held == 0) | (held > x), x, held - 1).astype(held.dtype),
}
NAMES = frozenset(_FUNCTIONS)
"""Operations that the executor knows."""


def reduction(name: str, type_: str, noftz: bool = False) -> tuple[np.dtype, Callable]:
    """(type of an element, function of arrays of what is held and what is given).

    `noftz` stands where 16-bit floats are added, and only there (PTX ISA 9.7.13.7).

    Raises:
        UnknownError: there is no such operation on this type.
    """
    of_halves = type_ in (*HALVES, *PAIRS)
    if name not in _OF_TYPE.get(type_, "").split():
        raise UnknownError(f"there is no .{name} of .{type_}")
    if noftz != of_halves:
        raise UnknownError(f".{name}.{type_} {'has no' if noftz else 'needs'} .noftz")
    if not of_halves:
        function = _FUNCTIONS[name]
        if type_ == "f32":
            return DTYPES[type_], lambda held, x: a.number(function(held, x))
        return DTYPES[type_], function
    dtype = PAIRS.get(type_, DTYPES[type_])
    function = {"min": a.minimum, "max": a.maximum}.get(name, _FUNCTIONS[name])
    return dtype, lambda held, x: a.half(function(held.astype(a.f4), x.astype(a.f4)), dtype)
