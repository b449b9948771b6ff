"""Kernels that every implementation uses: combine, delta, and gradients of scores' arguments."""
