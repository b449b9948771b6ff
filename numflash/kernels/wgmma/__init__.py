"""FlashAttention-3 on Hopper: specialised warps, bulk copies, and products of warpgroups.

forward         O and lse; with splits over the keys, parts that `shared.combine` adds up
fp8_forward     the same of e4m3 codes and their scales
producer        the warp that fetches Q, K and V for both
finish          how both end a tile of rows
ring            the buffers between producer and consumers
"""
