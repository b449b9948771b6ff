"""The kernels of 8-bit floats, for every GPU from Turing on: what makes them, and the forward.

    forward     O and lse from e4m3 codes and their scales: mma/fp8_forward.py
    quantize    codes and scales from numbers; or the maximum of each block of tokens
    amax        maxima of these maxima, for scales that many tokens share
    dequantize  numbers from codes and scales
    estimate    which heads keep within an error in 8 bits

Each result is written by one block: no atomics, and the same bits in every run.
"""

from numflash.kernels.mma.fp8_forward import make_forward_kernel
from numflash.kernels.quantize.amax import make_amax_kernel
from numflash.kernels.quantize.dequantize import make_dequantize_kernel
from numflash.kernels.quantize.estimate import make_estimate_kernel
from numflash.kernels.quantize.quantize import make_quantize_kernel

FACTORIES = {
    "forward": make_forward_kernel,
    "quantize": make_quantize_kernel,
    "amax": make_amax_kernel,
    "dequantize": make_dequantize_kernel,
    "estimate": make_estimate_kernel,
}
"""Kernel family -> factory(config, traits) -> Kernel."""
