"""Appending to caches by compiled code: the bits of the simulator, in the cache and of q."""

import numpy as np
import pytest

import numflash
from tests.support.cache_cases import CacheCase, errors_of
from tests.support.coded_cache_cases import coded_arguments
from tests.support.covering import some, thorough

CASES = [
    CacheCase("sm80", 3, "several", "pairs", "causal", True),
    CacheCase("portable", "batch_idx", "fewer new", "part, narrow", "full", False),
    CacheCase("sm80", 16, "one", "none", "window", False, (4, 2, 20, 12)),
]

CODED = CacheCase("sm80", 3, "several", "pairs", "causal", True, (4, 2, 32, 32))


@thorough
@pytest.mark.parametrize("case", some(CASES, CASES[0]), ids=str)
def test_compiled_code_has_the_bits_of_the_simulator(executed, case):
    """In the cache; results are within their budgets."""
    results = []
    for code in ("ptx", "python"):
        executed(case.arch, code=code)
        (q, *caches, k, v), options = case.arguments(np.random.default_rng(0))
        numflash.attention_with_kvcache(q, *caches, k, v, **options)
        results.append([x.tobytes() for x in caches])
        if code == "ptx":
            for error in errors_of(case, np.random.default_rng(0)):
                assert error.passed, error
    assert results[0] == results[1]


@thorough
def test_codes_have_the_bits_of_the_simulator(executed):
    results, lses = [], []
    for code in ("ptx", "python"):
        executed("sm_80", code=code)
        arrays, options = coded_arguments(CODED, np.random.default_rng(0))
        out, lse = numflash.attention_with_kvcache(*arrays, return_lse=True, **options)
        results.append([x.tobytes() for x in (out, *arrays[1:3])])
        lses.append(lse)
    assert results[0] == results[1]
    # The logarithm is that of the compiler's library, whose last bit may be another.
    np.testing.assert_array_max_ulp(*lses, maxulp=1)


@thorough
def test_a_key_that_is_rotated_the_wrong_way_is_seen(executed):
    case = CASES[0]
    executed(case.arch, lambda ptx: ptx.replace("neg.f32", "mov.f32"))
    with pytest.raises(AssertionError):
        errors_of(case, np.random.default_rng(0))
