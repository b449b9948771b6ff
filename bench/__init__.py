"""Measurements on a real GPU: `python -m bench verify`, `forward`, `backward`, `report`."""
