"""The kernels' half of the FP8 accuracy study: `numflash.attention` on a GPU, through CuPy."""

from dataclasses import dataclass

import numpy as np

import numflash
from bench.fp8_accuracy.inputs import Input
from bench.fp8_accuracy.methods import METHODS
from numflash.runtime.arrays import to_numpy
from numflash.runtime.errors import UnsupportedError, in_one_line


@dataclass(frozen=True)
class Engine:
    """The place where the kernels run.

    Attributes:
        device: the GPU's name; None if they do not run.
        reason: why they do not; None if they do.
    """

    device: str | None
    reason: str | None = None

    def run(self, case: Input, draw: int) -> dict[str, np.ndarray | str]:
        """The kernels' results for a draw of an input.

        Returns:
            By method: (batch, seqlen, heads, head_dim) float16, or why there is none.
        """
        import cupy

        arrays = [cupy.asarray(x.astype(np.float16)) for x in case.arrays(draw)]
        outs: dict[str, np.ndarray | str] = {}
        for name, options in kernel_options().items():
            try:
                outs[name] = to_numpy(numflash.attention(*arrays, **options))
            # One method that fails must not cost the others their figures.
            except Exception as error:
                outs[name] = in_one_line(error)
        return outs


def find() -> Engine:
    """The GPU that numflash runs on, or the reason why there is none."""
    if numflash.simulating():
        return Engine(None, "numflash runs in the simulator")
    from numflash.runtime.driver import device_name, limits_of_device

    try:
        limits_of_device(0)
        import cupy  # noqa: F401
    except (UnsupportedError, RuntimeError) as error:
        return Engine(None, f"no GPU: {str(error).splitlines()[0]}")
    except ImportError:
        return Engine(None, "CuPy is not importable")
    return Engine(device_name(0))


def kernel_options() -> dict[str, dict]:
    """The options of `numflash.attention` for each method that the kernels have."""
    options: dict[str, dict] = {"float16": {}}
    for method in METHODS:
        if method.recipe is not None and method.order is None:
            options[method.name] = {"precision": "fp8", "fp8": method.recipe}
    return options
