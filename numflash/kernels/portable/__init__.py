"""FlashAttention for every GPU, on the FMA units; also the kernels to learn from.

    forward         O = softmax(Q K^T) V and its log-sum-exp, one pass over K and V per row block
    backward_dkdv   dK and dV, one block per row block of K and V
    backward_dq     dQ, one block per row block of Q

The backward computes P again from Q, K and the log-sum-exp instead of storing it, so that memory
grows with seqlen, not with its square. Each output row belongs to one block, so no atomics are
needed and results are the same in every run.
"""
