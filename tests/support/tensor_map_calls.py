"""Calls on a fake H200 whose kernels take tensor maps."""

import pytest

from numflash.runtime.mode import SIMULATED

on_the_gpu = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")
B, S, H, D = 2, 100, 8, 64
