"""The choice of kernels, their configs and their geometry, with reasons."""
