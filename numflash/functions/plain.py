"""Functions of users as NumPy computes them, on arrays of scores and places: the reference's way.

A traced function does the same, so this is what kernels are compared with.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def takes(function: Callable, count: int) -> bool:
    """Whether a function takes so many arguments; a function of C says so when it is called."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def aux_taken(function: Callable, places: int, count: int, is_one_of_two: bool) -> int:
    """How many of `count` arrays and numbers a function gets behind its `places` arguments.

    All of them; where there are both a score_mod and a mask_mod, one that takes none gets none.
    """
    if is_one_of_two and not takes(function, places + count) and takes(function, places):
        return 0
    return count


def on_arrays(
    function: Callable, places: Sequence[Any], aux: Sequence[Any], is_one_of_two: bool = False
) -> Any:
    """The function of arrays that broadcast, `places`, and of `aux`, as kernels compute it.

    Computed indices are brought inside arrays. A function with a Python `if` is called for each
    element.
    """
    count = aux_taken(function, len(places), len(aux), is_one_of_two)
    given = [_Inside(x) if isinstance(x, np.ndarray) and x.ndim else x for x in aux[:count]]
    try:
        return np.asarray(function(*places, *given))
    except ValueError as error:
        if "truth value" not in str(error):
            raise
    flat = np.broadcast(*places)
    values = [function(*each, *given) for each in flat]
    return np.array(values).reshape(flat.shape)


class _Inside:
    """An array whose indices are brought inside it."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __getattr__(self, name: str):
        return getattr(self._array, name)

    def __len__(self):
        return len(self._array)

    def __getitem__(self, indices):
        indices = indices if isinstance(indices, tuple) else (indices,)
        if len(indices) > self._array.ndim:
            return self._array[indices]  # NumPy's error
        sizes = zip(indices, self._array.shape, strict=False)
        found = self._array[tuple(np.clip(index, 0, n - 1) for index, n in sizes)]
        rest = self._array.ndim - len(indices)
        return found if not rest else _Inside(found) if found.ndim == rest else found
