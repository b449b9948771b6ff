"""Which factory builds the kernel of a config."""

from numflash.configs import Config, Traits
from numflash.kernels import fp8, portable, sm80
from numflash.kernels.kernel import Kernel

_FACTORIES = {"portable": portable.FACTORIES, "sm80": sm80.FACTORIES, "fp8": fp8.FACTORIES}


def make_kernel(config: Config, traits: Traits) -> Kernel:
    """The kernel of a config."""
    return _FACTORIES[config.implementation][config.family](config, traits)
