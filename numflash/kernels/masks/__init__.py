"""The kernels that make block masks.

tiles       the blocks of which a function keeps anything, and those of which it keeps all
scatter     the same from FlexAttention's lists
lists       lists of these blocks, by rows or by columns, as attention walks over them
"""
