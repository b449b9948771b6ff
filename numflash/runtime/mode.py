"""GPU or simulator: decided once per process, as Numba decides it.

Numba reads NUMBA_ENABLE_CUDASIM, an integer, which is on unless it is 0; whatever is no integer
counts as 0, with a warning. Its configuration file and `numba.config.ENABLE_CUDASIM` say the same.
"""

import os
import sys

_VARIABLE = "NUMBA_ENABLE_CUDASIM"
_NUMBAS_FILE = ".numba_config.yaml"


def _as_numba_decides() -> bool:
    """Whether Numba's `cuda` is, or will be, the simulator."""
    if "numba.cuda" in sys.modules:
        # It has decided, when it was imported.
        return "numba.cuda.simulator_init" in sys.modules
    if "numba" not in sys.modules and not os.path.exists(_NUMBAS_FILE):
        # The same answer without Numba, whose import takes half a second.
        try:
            return bool(int(os.environ.get(_VARIABLE, "0")))
        except ValueError:
            pass  # Numba warns, naming the variable
    try:
        from numba.core import config
    except ImportError:
        # Without Numba nothing is simulated; what needs it says so.
        return False
    return bool(config.ENABLE_CUDASIM)


SIMULATED = _as_numba_decides()
"""Whether kernels of this process run in the simulator, on NumPy arrays."""


def simulating() -> bool:
    """Whether kernels of this process run in the simulator, on NumPy arrays.

    Example:
        >>> import numflash
        >>> numflash.simulating()  # with NUMBA_ENABLE_CUDASIM=1
        True
    """
    return SIMULATED
