"""FlashAttention-2 on the tensor cores through `mma.sync`, for every GPU from Turing on.

    forward         O and lse; with splits over the keys, parts that `shared.combine` adds up
    backward_dkdv   dK and dV, one block per row block of K and V
    backward_dq     dQ, one block per row block of Q
    backward        dK, dV and parts of dQ in one walk: five products a tile instead of seven
    reduce_dq       dQ from those parts

The generation in a config chooses the instructions: sm80 has products of 16 x 8 x 16 and copies
that run ahead; sm75 products of half that depth, float16 only, and copies through registers.
"""

from numflash.kernels.mma.backward import make_backward_kernel
from numflash.kernels.mma.backward_dkdv import make_backward_dkdv_kernel
from numflash.kernels.mma.backward_dq import make_backward_dq_kernel
from numflash.kernels.mma.forward import make_forward_kernel
from numflash.kernels.mma.reduce_dq import make_reduce_dq_kernel

FACTORIES = {
    "forward": make_forward_kernel,
    "backward-dkdv": make_backward_dkdv_kernel,
    "backward-dq": make_backward_dq_kernel,
    "backward": make_backward_kernel,
    "reduce-dq": make_reduce_dq_kernel,
}
"""Kernel family -> factory(config, traits) -> Kernel."""
