"""Whether kernels mean GPU code or run in the simulator: decided once, by NUMBA_ENABLE_CUDASIM."""

from numba.core import config

SIMULATED: bool = bool(config.ENABLE_CUDASIM)
