"""`cuda` and `device_function` for kernels: Numba's, or the simulator's.

`function_of_numbers` is a `device_function` that knows its arguments and nothing else, and gives
numbers: the simulator remembers what it gave.
"""

from functools import lru_cache

from numflash.runtime.mode import SIMULATED

CODE_OPTIONS = {"debug": False, "opt": True, "lineinfo": False, "fastmath": False}
"""Options given to Numba with each function, so that none of its settings decides machine code."""

if SIMULATED:
    from numflash.simulator import cuda, install

    install()

    def device_function(function):
        """A function that kernels call; inlined into them on the GPU."""
        return function

    # A block's threads ask the same: to look it up takes a tenth of what NumPy's scalars take.
    function_of_numbers = lru_cache(maxsize=2**14, typed=True)
else:
    from numba import cuda

    device_function = cuda.jit(device=True, forceinline=True, **CODE_OPTIONS)
    function_of_numbers = device_function

__all__ = ["CODE_OPTIONS", "SIMULATED", "cuda", "device_function", "function_of_numbers"]
