"""Kernels that every implementation uses: combine, delta, and the sums that end gradients."""
