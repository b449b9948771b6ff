"""Entries of a config cache, and the command line that tests give to the tuner."""

from numflash.selection.entries import DeviceKey

OFFLINE = ("--device", "sm_80", "--offline")
SMALL = ("--pass", "forward", "--dtype", "float32", "--head-dim", "64", "--mask", "full")
CLASS = "forward float32-d64-dv64-vec full q4096 k4096 bh64 g1"
A100 = DeviceKey("NVIDIA A100-SXM4-80GB", "sm_80", 108)
T4 = DeviceKey("Tesla T4", "sm_75", 40)
