"""Hopper's compiled forward on sequences with lengths of their own: the bits of the source."""

import numpy as np

import numflash
from numflash.runtime import driver
from numflash.selection import choice as selection
from tests.executed.conftest import normal

CONFIG = {"forward": "sm90-m64n32w4s2-overlap-persistent"}


def test_compiled_sequences_have_the_bits_of_the_source(executed, monkeypatch):
    """Rows between sequences are NaN, one sequence has no keys, and one no queries."""
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (2, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)
    of_q, of_k = (np.array(n, np.int32) for n in ((70, 5, 0, 20), (40, 0, 7, 66)))
    first_q, first_k = (np.cumsum(n, dtype=np.int32) - n + 1 for n in (of_q, of_k))
    q, k, v = (normal((120, heads, 32), np.float16, heads) for heads in (2, 1, 1))
    for x, first, lengths in ((q, first_q, of_q), (k, first_k, of_k), (v, first_k, of_k)):
        x[0], x[first[-1] + lengths[-1] :] = np.nan, np.nan
    given = {"starts_q": first_q, "seqlens_q": of_q, "starts_k": first_k, "seqlens_k": of_k}
    results = []
    for code in ("python", "ptx"):
        executed("sm_90a", code=code)
        results.append(
            numflash.attention_varlen(
                *(q, k, v), **given, causal=True, return_lse=True, config=CONFIG
            )
        )
    (source, source_lse), (compiled, lse) = results
    assert np.isfinite(source).all()
    np.testing.assert_array_equal(source.view(np.uint16), compiled.view(np.uint16))
    # The compiler fuses the last product and sum.
    np.testing.assert_allclose(source_lse, lse, rtol=1e-6)
