"""Which factory builds the kernel of a config."""

from importlib import import_module

from numflash.configs import Config, Traits
from numflash.kernels.kernel import Kernel


def make_kernel(config: Config, traits: Traits) -> Kernel:
    """The kernel of a config. Imports the kernels of its implementation, and no others."""
    implementation = import_module(f"numflash.kernels.{config.implementation}")
    return implementation.FACTORIES[config.family](config, traits)
