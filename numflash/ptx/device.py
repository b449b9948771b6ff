"""`cuda` and `device_function` for kernels: Numba's, or the simulator's."""

from numflash.runtime.mode import SIMULATED

CODE_OPTIONS = {"debug": False, "opt": True, "lineinfo": False, "fastmath": False}
"""Options given to Numba with each function, so that none of its settings decides machine code."""

if SIMULATED:
    from numflash.simulator import cuda, install

    install()

    def device_function(function):
        """A function that kernels call; inlined into them on the GPU."""
        return function
else:
    from numba import cuda

    device_function = cuda.jit(device=True, forceinline=True, **CODE_OPTIONS)

__all__ = ["CODE_OPTIONS", "SIMULATED", "cuda", "device_function"]
