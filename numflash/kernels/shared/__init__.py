"""Kernels that every implementation uses: the combination of split keys, and delta."""
