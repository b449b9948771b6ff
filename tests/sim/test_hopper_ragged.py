"""The Hopper forward on sequences with lengths of their own, each against float64 by itself.

What is not a sequence's own is NaN, in arrays with gaps between sequences, and results where no
sequence has rows must stay as they are.
"""

from typing import NamedTuple

import numpy as np
import pytest

import numflash
from numflash import UnsupportedError, reference
from numflash.configs import Traits
from numflash.runtime import driver
from numflash.selection import choice as selection
from tests.support.covering import some
from tests.support.gapped_arrays import gapped_arrays

TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-3}
# One of NaN, one without keys, one without queries; at first one without either.
LENGTHS = ((0, 0), (70, 70), (33, 50), (1, 200), (130, 129), (5, 0), (0, 7), (64, 64))
BAD = 2
DECODING = ((1, 200), (1, 130), (3, 64), (9, 300), (0, 5), (7, 0))
CAUSAL = {"causal": True}
TOP_LEFT = {"causal_align": "top_left"}


class Case(NamedTuple):
    """A config, and what it computes: options are those of a mask and of features."""

    config: str
    options: dict = {}
    lengths: tuple = LENGTHS
    heads: tuple[int, int] = (1, 1)
    head_dims: tuple[int, int] = (32, 32)
    dtype: str = "float16"


CASES = {
    "all keys": Case("m64n64w4s2-overlap-persistent", heads=(2, 1)),
    "turns": Case("m128n64w8s2-overlap-pingpong-persistent", CAUSAL),
    "one stage": Case("m64n32w4s1", CAUSAL | TOP_LEFT),
    "window": Case("m64n48w4s1-overlap-persistent", {"window_size": (40, 10)}),
    "window, top left": Case(
        "m64n16w4s3-overlap", {"window_size": (20, 0)} | TOP_LEFT, dtype="bfloat16"
    ),
    "clusters": Case("m64n64w4s2-c2-overlap-persistent", CAUSAL, heads=(2, 1)),
    "clusters, packed": Case(
        "m64n32w4s2-packed-c2-overlap", {"window_size": (30, 5)}, heads=(4, 1), head_dims=(64, 64)
    ),
    "two packed": Case("m64n64w4s2-packed-persistent", CAUSAL, heads=(2, 1)),
    "four packed": Case("m64n64w4s2-packed-overlap-persistent", CAUSAL, heads=(4, 1)),
    "four packed, two warpgroups": Case(
        "m128n32w8s2-packed-overlap-pingpong", {"window_size": (30, 5)}, heads=(4, 1)
    ),
    "decoding": Case("m64n64w4s2-packed-persistent", CAUSAL, DECODING, (8, 2), (64, 64)),
    "slabs": Case("m64n32w4s2-overlap", CAUSAL, DECODING, head_dims=(128, 72), dtype="bfloat16"),
    "O in place of Q": Case("m64n96w4s2-persistent", {}, DECODING, head_dims=(256, 256)),
    "results of float32": Case("m64n64w4s2-persistent", CAUSAL | {"out_dtype": "float32"}),
    "features": Case(
        "m64n64w4s2-overlap-persistent",
        CAUSAL
        | {
            "softcap": 2.0,
            "alibi_slopes": np.array([0.5, 0.125], np.float32),
            "sinks": np.array([0.5, -1.0], np.float32),
        },
        heads=(2, 1),
    ),
}


@pytest.fixture(autouse=True)
def hopper(on, monkeypatch):
    """A simulated Hopper of three SMs, each with a block."""
    on("sm_90a")
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (3, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)


def arrays_of(case, seed=0):
    """q, k and v: numbers in sequences that are not BAD, NaN elsewhere; and where these begin."""
    sizes = case.heads, case.head_dims, case.dtype
    (*arrays, _), first_q, first_k = gapped_arrays(case.lengths, BAD, *sizes, seed)
    return arrays, first_q, first_k


def expected_of(q, k, v, options):
    """Out and lse of one sequence, in float64."""
    known = {name: x for name, x in options.items() if name != "out_dtype"}
    return reference.attention(q, k, v, **known)


def compare(got, expected, tolerance):
    """Out and lse of a sequence, with those in float64."""
    np.testing.assert_allclose(got[0].astype(float), expected[0], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(expected[1]))
    seen = ~np.isneginf(expected[1])
    np.testing.assert_allclose(got[1][seen], expected[1][seen], rtol=0, atol=tolerance)


KEPT = ("turns",)


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_each_sequence_is_right_and_alone(name):
    case = CASES[name]
    (q, k, v), first_q, first_k = arrays_of(case)
    of_q, of_k = (np.array(n, np.int32) for n in zip(*case.lengths, strict=True))
    out = np.full((*q.shape[:2], v.shape[2]), np.nan, case.options.get("out_dtype", q.dtype))
    result, lse = numflash.attention_varlen(
        *(q, k, v),
        **{"starts_q": first_q, "seqlens_q": of_q, "starts_k": first_k, "seqlens_k": of_k},
        out=out,
        return_lse=True,
        config={"forward": f"sm90-{case.config}"},
        **case.options,
    )
    assert result is out
    is_free = np.ones(len(q), bool)
    for number, (at_q, n_q, at_k, n_k) in enumerate(
        zip(first_q, of_q, first_k, of_k, strict=True)
    ):
        rows, keys = slice(at_q, at_q + n_q), slice(at_k, at_k + n_k)
        is_free[rows] = False
        if number != BAD and n_q:
            expected = expected_of(q[rows], k[keys], v[keys], case.options)
            compare((out[rows], lse[:, rows]), expected, TOLERANCES[case.dtype])
    assert is_free.sum() == len(case.lengths) + 1
    assert np.isnan(out[is_free]).all() and np.isneginf(lse[:, is_free]).all()


PADDED = "m64n64w4s2-overlap-persistent", "m64n32w4s2-packed"


@pytest.mark.parametrize("layout", some(["bshd", "bhsd"], "bhsd"))
@pytest.mark.parametrize("config", some(PADDED, PADDED[1]))
def test_a_padded_batch_is_rows_of_one_array(layout, config):
    """Every array has gaps of its own between entries; what is behind a sequence is NaN."""
    rng, options = np.random.default_rng(1), {"causal": True, "layout": layout}
    lengths_q, lengths_k = np.array([70, 0, 33], np.int32), np.array([50, 9, 100], np.int32)
    first_k = np.array([3, 0, 20], np.int32)
    by_heads = layout == "bhsd"

    def made(rows, heads, first, lengths, gap):
        shape = (3 * gap, heads, rows, 32) if by_heads else (3 * gap, rows, heads, 32)
        x = np.full(shape, np.nan, np.float16)[::gap]
        seen = x.swapaxes(1, 2) if by_heads else x
        for entry, (start, n) in enumerate(zip(first, lengths, strict=True)):
            seen[entry, start : start + n] = rng.standard_normal((n, heads, 32))
        return x

    q = made(80, 2, [0, 0, 0], lengths_q, 2)
    k, v = (made(120, 1, first_k, lengths_k, gap) for gap in (1, 3))
    out = np.full((3 * 4, *q.shape[1:]), np.nan, np.float16)[::4]
    _, lse = numflash.attention(
        *(q, k, v),
        **{"seqlens_q": lengths_q, "seqlens_k": lengths_k, "starts_k": first_k},
        out=out,
        return_lse=True,
        config={"forward": f"sm90-{config}"},
        **options,
    )
    q, k, v, out = (x.swapaxes(1, 2) if by_heads else x for x in (q, k, v, out))
    for entry, (n_q, at_k, n_k) in enumerate(zip(lengths_q, first_k, lengths_k, strict=True)):
        keys = slice(at_k, at_k + n_k)
        if n_q:
            expected = expected_of(q[entry, :n_q], k[entry, keys], v[entry, keys], CAUSAL)
            compare((out[entry, :n_q], lse[entry, :, :n_q]), expected, 2e-3)
        assert np.isnan(out[entry, n_q:]).all() and np.isneginf(lse[entry, :, n_q:]).all()


def test_entries_that_are_no_rows_of_one_array_are_for_other_kernels():
    """(seqlen, batch, heads, head_dim) in memory."""
    x = np.zeros((40, 2, 1, 32), np.float16).swapaxes(0, 1)
    lengths = np.array([3, 40], np.int32)
    with pytest.raises(UnsupportedError, match="batch stride of 64 bytes is not a multiple of it"):
        numflash.attention(x, x, x, seqlens_k=lengths, config={"forward": "sm90-m64n64w4s2"})
    told = str(numflash.explain_dispatch(x, x, x, seqlens_k=lengths))
    assert "sm80-" in told and "q cannot be described to bulk copies: its batch stride" in told


def test_eight_bits_know_no_sequences():
    x, lengths = np.zeros((2, 40, 1, 32), np.float16), np.array([3, 40], np.int32)
    starts = np.array([0, 3, 40], np.int32)
    codes = numflash.quantize_fp8(x)
    with pytest.raises(UnsupportedError, match="8-bit floats do not go with seqlens_k"):
        numflash.attention(codes, codes, codes, seqlens_k=lengths)
    for precision in ("fp8", "auto"):
        with pytest.raises(UnsupportedError, match="8-bit floats do not go with cu_seqlens_q"):
            numflash.attention_varlen(x[0], x[0], x[0], starts, starts, precision=precision)
    with pytest.raises(ValueError, match="kernels for fp8 know one length"):
        Traits("float16", 64, 64, vectorized=True, fp8=True, ragged=True)
