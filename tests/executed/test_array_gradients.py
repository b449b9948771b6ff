"""Gradients of arrays that scores read, compiled and executed: all ways, and sums by atomics."""

import numpy as np
import pytest

import numflash
from tests.executed.conftest import normal
from tests.support.covering import thorough

OF_SCORES = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
CASES = {
    "portable": ("sm_80", np.float32, "m8n8w2", (11, 10)),
    "sm80": ("sm_80", np.float16, "sm80-m16n16w1s1", (21, 19)),
}


def function(score, batch, head, q_idx, kv_idx, rows, keys, table):
    near = np.minimum(np.maximum(kv_idx - q_idx, -3), 3) + 3
    return score * rows[head, q_idx] + keys[kv_idx] + table[head, near]


@thorough
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_the_simulator_and_within_budget(executed, name):
    arch, dtype, config, (queries, keys) = CASES[name]
    q, dout = (normal((1, queries, 2, 16), dtype, seed) for seed in (0, 1))
    k, v = (normal((1, keys, 1, 16), dtype, seed) for seed in (2, 3))
    bias = normal((1, 1, queries, keys), dtype, 4)
    shapes = (2, queries), (keys,), (2, 7)
    aux = tuple(normal(shape, np.float32, 5 + n) for n, shape in enumerate(shapes))
    wrt = "bias", "aux0", "aux1", "aux2"
    options = {"bias": bias, "score_mod": function, "aux": aux, "causal": True}
    configs = dict.fromkeys(OF_SCORES, config)
    executed(arch)
    report = numflash.check(
        q, k, v, dout=dout, wrt=wrt, config=configs | {"forward": config}, **options
    )
    assert report.passed, f"\n{report}"
    out, lse = numflash.attention(q, k, v, return_lse=True, config=config, **options)
    call = dout, q, k, v, out, lse
    found = numflash.attention_backward(*call, wrt=wrt, config=configs, **options)
    executed(arch, code="python")
    same = numflash.attention_backward(*call, wrt=wrt, config=configs, **options)
    for one, other in zip(found, same, strict=True):
        np.testing.assert_array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))
