"""Requirements of the examples: the simulator, or CuPy and a GPU."""

import numflash


def why_not() -> str | None:
    """Why numflash cannot run host arrays here, and what to do; None if it can."""
    if numflash.simulating():
        return None
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            return None
        error = "there is no GPU"
    except Exception as problem:  # not installed, or without a driver
        error = " ".join(str(problem).split())
    return (
        f"CuPy cannot use a GPU: {error}. Set NUMBA_ENABLE_CUDASIM=1 to run in the simulator, or, "
        'on a machine with an NVIDIA GPU: pip install "numflash[cu13]" (or [cu12])'
    )
