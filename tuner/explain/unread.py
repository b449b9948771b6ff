"""Arrays whose elements nobody reads or writes: any size, and no memory."""

import numpy as np

from numflash.runtime.views import contiguous_strides, numpy_dtype

_MOST_ELEMENTS = 2**40


def unread(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array that is only an address, a shape and strides.

    Raises:
        ValueError: it has more elements than an address can reach.
    """
    if np.prod(shape, dtype=object) > _MOST_ELEMENTS:
        raise ValueError(f"an array of {shape} has more than 2**40 elements")
    found = numpy_dtype(dtype)
    one = np.zeros(16, found)
    strides = tuple(found.itemsize * step for step in contiguous_strides(shape))
    return np.lib.stride_tricks.as_strided(one, shape, strides, writeable=False)
