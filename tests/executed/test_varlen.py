"""Compiled kernels on sequences with lengths of their own: within budget, the source's bits."""

import numpy as np
import pytest

import numflash
from tests.support.covering import thorough
from tests.support.varlen_cases import VarlenCase

CASES = (
    VarlenCase("portable", "uneven", "padded, starts", "dropout"),
    VarlenCase("sm80", "uneven", "packed, parts", "causal", (4, 2, 16, 24)),
    VarlenCase("sm75", "more queries than keys", "packed", "gradient of alibi"),
    VarlenCase("sm90", "uneven", "packed, parts", "dropout"),
    VarlenCase("sm80-stages", "uneven", "packed", "gradients of what scores read"),
)


@thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_sequences_are_those_of_the_source(executed, case):
    (q, k, v, dout), options = case.arguments(np.random.default_rng(1))
    executed(case.arch)
    report = numflash.check(q, k, v, dout=dout, **options)
    assert report.passed, f"\n{report}"
    configs, packed = options.pop("config"), case.form.startswith("packed")
    forward = numflash.attention_varlen if packed else numflash.attention
    backward = numflash.attention_varlen_backward if packed else numflash.attention_backward
    wrt = options.pop("wrt", None)
    config = {name: each for name, each in configs.items() if name.startswith("backward")}
    of_forward = {name: each for name, each in configs.items() if name not in config}
    results = []
    for code in ("python", "ptx"):
        executed(case.arch, code=code)
        out, lse = forward(q, k, v, return_lse=True, config=of_forward, **options)
        if results:
            lse = results[0][1]  # both backwards begin from it: logarithms differ
        given = dout, q, k, v, out, lse
        results.append((out, lse, *backward(*given, config=config, wrt=wrt, **options)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))
