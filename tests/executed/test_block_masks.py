"""Block masks, made and walked over by compiled kernels: against float64 and the simulator."""

import numpy as np
import pytest

import numflash
from tests.executed.conftest import normal
from tests.support.covering import thorough

KERNELS = {
    "sm80": (
        "sm_80",
        32,
        {
            "forward": "sm80-m32n16w2s2",
            "backward-dq": "sm80-m16n16w1s1",
            "backward-dkdv": "sm80-m16n32w2s2",
        },
    ),
    "sm90": ("sm_90a", 64, {"forward": "sm90-m64n32w4s2-overlap"}),
}


def window(batch, head, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 40 + 25 * head)


@thorough
@pytest.mark.parametrize("name", KERNELS)
def test_a_function_with_its_blocks_is_within_its_error_budget(executed, name):
    arch, size, configs = KERNELS[name]
    executed(arch)
    q, k, v, dout = (normal((1, 3 * size - 7, 2, 32), np.float16, seed) for seed in range(4))
    mask = numflash.create_block_mask(window, 1, 2, q.shape[1], q.shape[1], size)
    executed(arch, code="python")
    same = numflash.create_block_mask(window, 1, 2, q.shape[1], q.shape[1], size)
    assert {0, 1, 2} <= set(mask.tiles().ravel()) or size == 64
    np.testing.assert_array_equal(mask.tiles(), same.tiles())
    np.testing.assert_array_equal(mask.counts_of_keys, same.counts_of_keys)
    executed(arch)
    dout = dout if len(configs) > 1 else None
    report = numflash.check(q, k, v, dout=dout, block_mask=mask, config=configs)
    assert report.passed, report
