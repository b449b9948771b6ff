"""Which factory builds the kernel of a config."""

from importlib import import_module

from numflash.configs import Config, Traits
from numflash.kernels.kernel import Kernel

# Which room holds the kernels of an implementation, as config strings and reports name it.
ROOMS = {"portable": "portable", "sm80": "mma", "sm90": "wgmma", "fp8": "quantize"}


def make_kernel(config: Config, traits: Traits) -> Kernel:
    """The kernel of a config. Imports the kernels of its implementation, and no others."""
    room = import_module(f"numflash.kernels.{ROOMS[config.implementation]}")
    return room.FACTORIES[config.family](config, traits)
