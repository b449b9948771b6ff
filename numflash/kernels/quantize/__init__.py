"""The kernels around 8-bit floats, for every GPU from Turing on: what makes them, and goes back.

    quantize    codes and scales from numbers; or the maximum of each block of tokens
    amax        maxima of these maxima, for scales that many tokens share
    dequantize  numbers from codes and scales
    estimate    which heads keep within an error in 8 bits

Each result is written by one block: no atomics, and the same bits in every run.
"""
