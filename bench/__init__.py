"""Measurements, most of them on a real GPU: `python -m bench` lists what there is."""
