"""GPU or simulator: decided once per process by NUMBA_ENABLE_CUDASIM, as Numba decides it."""

import os


def simulating() -> bool:
    """Whether kernels of this process run in the simulator, on NumPy arrays."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0").strip() not in ("", "0")


SIMULATED = simulating()
