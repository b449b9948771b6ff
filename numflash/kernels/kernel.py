"""A factory's result: the kernel function and everything needed to compile and launch it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from numflash.kernels.arguments import leaves


@dataclass(frozen=True)
class Kernel:
    """A kernel, compiled by `compiler` or run by `simulator.launch`.

    Attributes:
        family: as in `configs.FAMILIES`.
        function: the kernel; every parameter is annotated as `kernels.arguments` says.
        num_threads: threads per block, one-dimensional.
        smem_bytes: dynamic shared memory per block.
        cluster: blocks of a cluster; the grid is a multiple of it.
    """

    family: str
    function: Callable
    num_threads: int
    smem_bytes: int
    cluster: int = 1

    @property
    def parameters(self) -> dict[str, object]:
        """Parameter name -> its annotation, in order."""
        return {
            name: parameter.annotation
            for name, parameter in inspect.signature(self.function).parameters.items()
        }

    @property
    def leaves(self) -> dict[str, object]:
        """The values passed: path, as in "q.row" -> scalar, `Pointer` or `TensorMap`."""
        return leaves(self.parameters)
