"""Which factory builds the kernel of a config."""

from importlib import import_module

from numflash.configs import Config, Traits, implementation_of
from numflash.kernels.kernel import Kernel

FACTORIES = {
    ("wgmma", "forward"): "wgmma.forward.make_forward_kernel",
    ("wgmma-fp8", "forward"): "wgmma.fp8_forward.make_fp8_forward_kernel",
    ("mma", "forward"): "mma.forward.make_forward_kernel",
    ("mma", "backward-dkdv"): "mma.backward_dkdv.make_backward_dkdv_kernel",
    ("mma", "backward-dq"): "mma.backward_dq.make_backward_dq_kernel",
    ("mma", "backward"): "mma.backward.make_backward_kernel",
    ("mma", "reduce-dq"): "mma.reduce_dq.make_reduce_dq_kernel",
    ("mma-fp8", "forward"): "mma.fp8_forward.make_forward_kernel",
    ("portable", "forward"): "portable.forward.make_forward_kernel",
    ("portable", "backward-dkdv"): "portable.backward_dkdv.make_backward_dkdv_kernel",
    ("portable", "backward-dq"): "portable.backward_dq.make_backward_dq_kernel",
    ("portable", "delta"): "shared.delta.make_delta_kernel",
    ("portable", "combine"): "shared.combine.make_combine_kernel",
    ("quantize", "quantize"): "quantize.quantize.make_quantize_kernel",
    ("quantize", "amax"): "quantize.amax.make_amax_kernel",
    ("quantize", "dequantize"): "quantize.dequantize.make_dequantize_kernel",
    ("quantize", "estimate"): "quantize.estimate.make_estimate_kernel",
}
"""(row of `configs.implementations`, kernel family) -> factory(config, traits) -> Kernel, by name
below `numflash.kernels`: only what is asked for is imported."""


def make_kernel(config: Config, traits: Traits) -> Kernel:
    """The kernel of a config. Imports its module, and no others."""
    module, _, factory = FACTORIES[implementation_of(config).name, config.family].rpartition(".")
    return getattr(import_module(f"numflash.kernels.{module}"), factory)(config, traits)
