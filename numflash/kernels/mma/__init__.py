"""FlashAttention-2 on the tensor cores through `mma.sync`, for every GPU from Turing on.

    forward         O and lse; with splits over the keys, parts that `shared.combine` adds up
    fp8_forward     the same of e4m3 codes and their scales
    backward_dkdv   dK and dV, one block per row block of K and V
    backward_dq     dQ, one block per row block of Q
    backward        dK, dV and parts of dQ in one walk: five products a tile instead of seven
    reduce_dq       dQ from those parts

The generation in a config chooses the instructions: sm80 has products of 16 x 8 x 16 and copies
that run ahead; sm75 products of half that depth, float16 only, and copies through registers.
"""
