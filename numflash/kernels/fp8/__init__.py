"""Attention on 8-bit floats, for every GPU from Turing on.

    forward     O and lse from e4m3 codes and their scales
"""

from numflash.kernels.fp8.forward import make_forward_kernel

FACTORIES = {
    "forward": make_forward_kernel,
}
"""Kernel family -> factory(config, traits) -> Kernel."""
