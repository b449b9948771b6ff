"""Attention over several GPUs."""
