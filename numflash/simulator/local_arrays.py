"""Local arrays: registers of a thread, some of which asynchronous products hold for a while.

Who holds an array changes its class, and with it what a kernel may do with it; nothing else is
paid for the check. A slice has the class that its array had when it was taken.
"""

import math
from functools import cache

import numpy as np

from numflash.simulator.errors import SimulationError
from numflash.simulator.memory import POISON, numpy_dtype

_POISON_BYTE = bytes([POISON])


class Local(np.ndarray):
    """Registers that belong to their thread."""

    __slots__ = ()


class InFlight(np.ndarray):
    """The accumulator of products that have not been waited for."""

    __slots__ = ()

    def __getitem__(self, index):
        raise SimulationError(
            "an accumulator is read while wgmma writes it: wgmma_wait_group is missing before"
        )

    def __setitem__(self, index, value):
        raise SimulationError(
            "an accumulator is written while wgmma writes it: wgmma_wait_group is missing before"
        )


class BeingRead(np.ndarray):
    """Holds operand a of products that have not been waited for."""

    __slots__ = ()

    def __setitem__(self, index, value):
        if type(whole(self)) is BeingRead:
            raise SimulationError(
                "registers are written while wgmma reads them as operand a: wgmma_wait_group is "
                "missing before"
            )
        super().__setitem__(index, value)


def local_array(shape, dtype, alignment=None) -> Local:
    """A new array of 0xFF bytes: `cuda.local.array`. Alignment does not matter here."""
    return _unwritten(shape, dtype).copy()


@cache
def _unwritten(shape, dtype) -> Local:
    dtype = numpy_dtype(dtype)
    count = shape if isinstance(shape, int) else math.prod(shape)
    return Local(shape, dtype, bytearray(_POISON_BYTE * (count * dtype.itemsize)))


def whole(array: np.ndarray) -> np.ndarray:
    """The local array of which `array` is a slice, or itself."""
    return array.base if isinstance(array.base, np.ndarray) else array
