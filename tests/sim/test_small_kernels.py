"""Which kernels run in tests that ask for none: small ones, or those that are shipped."""

import numpy as np
import pytest

import numflash
from numflash.configs import CombineConfig

# The GPU, dtype, precision, and the forward that runs.
SMALL = {
    "portable": ("sm_80", np.float32, None, "m8n8w2"),
    "sm75": ("sm_75", np.float16, None, "sm75-m16n16w1s1"),
    "sm80": ("sm_80", np.float16, None, "sm80-m16n16w1s2"),
    "sm90": ("sm_90a", np.float16, None, "sm90-m64n32w4s2-overlap"),
    "fp8": ("sm_89", np.float16, "fp8", "fp8-sm89-m16n64w1s1"),
    "fp8-sm90": ("sm_90a", np.float16, "fp8", "fp8-sm90-m64n64w4s2"),
}


def chosen(on, arch, dtype, precision) -> str:
    """The forward that would run on many rows."""
    on(arch)
    q = np.zeros((1, 600, 1, 64), dtype)
    options = {"precision": precision} if precision else {}
    return str(numflash.explain_dispatch(q, q, q, **options).forward.config)


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_run(on, name):
    *where, config = SMALL[name]
    assert chosen(on, *where).partition("x")[0] == config
    assert CombineConfig.num_chains == 4


@pytest.mark.parametrize("name", SMALL)
def test_a_test_can_ask_for_those_that_are_shipped(on, shipped_kernels, name):
    *where, config = SMALL[name]
    assert chosen(on, *where).partition("x")[0] != config
    assert CombineConfig.num_chains == 16
