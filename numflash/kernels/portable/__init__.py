"""FlashAttention for every GPU, on the FMA units; also the kernels to learn from.

    forward         O = softmax(Q K^T) V and its log-sum-exp, one pass over K and V per row block
    delta           delta = rowsum(O * dO), which the gradients share: shared/delta.py
    backward_dkdv   dK and dV, one block per row block of K and V
    backward_dq     dQ, one block per row block of Q
    combine         O and lse from the parts of a forward that was split: shared/combine.py

The backward computes P again from Q, K and the log-sum-exp instead of storing it, so that memory
grows with seqlen, not with its square. Each output row belongs to one block, so no atomics are
needed and results are the same in every run.
"""

from numflash.kernels.portable.backward_dkdv import make_backward_dkdv_kernel
from numflash.kernels.portable.backward_dq import make_backward_dq_kernel
from numflash.kernels.portable.forward import make_forward_kernel
from numflash.kernels.shared.combine import make_combine_kernel
from numflash.kernels.shared.delta import make_delta_kernel

FACTORIES = {
    "forward": make_forward_kernel,
    "delta": make_delta_kernel,
    "backward-dkdv": make_backward_dkdv_kernel,
    "backward-dq": make_backward_dq_kernel,
    "combine": make_combine_kernel,
}
"""Kernel family -> factory(config, traits) -> Kernel."""
