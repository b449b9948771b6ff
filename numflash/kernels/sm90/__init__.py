"""FlashAttention-3 on Hopper: specialised warps, bulk copies, and products of warpgroups.

forward         O and lse; with splits over the keys, parts that `portable.combine` adds up
"""

from numflash.kernels.sm90.forward import make_forward_kernel

FACTORIES = {"forward": make_forward_kernel}
"""Kernel family -> factory(config, traits) -> Kernel."""
