"""FlashAttention-3 on Hopper: specialised warps, bulk copies, and products of warpgroups.

skeleton        the common part of both forwards: the warps of a block, its walk over tiles of rows
forward         `attend` of 16-bit elements: O and lse; with splits over the keys, parts that
                `shared.combine` adds up
fp8_forward     `attend` of e4m3 codes and their scales
producer        the thread that fetches Q, K and V
finish          the end of a tile of rows
channels        buffers between producer and consumers, with the verbs to wait and to release
ring            the places of buffers and channels in shared memory

And its backward, in two kernels or in one:

backward_dkdv   dK and dV, by warpgroups that own keys
roles           the same of head dims above 128: of two warpgroups one owns dV, the other dK
backward_dq     dQ, by warpgroups that own queries
backward        dK and dV, and dQ in sums to which blocks of keys add in turn
reduce_dq       dQ of those sums
queries         the walk of a block that owns keys, and what fetches its queries
gradient_ring   their buffers, channels and copies, and the warps of their blocks
"""
