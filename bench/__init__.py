"""Measurements on a real GPU: `python -m bench verify`."""
