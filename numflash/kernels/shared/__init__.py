"""Kernels that every implementation uses: combine, delta and head_sums."""
