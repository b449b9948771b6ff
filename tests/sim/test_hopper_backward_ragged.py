"""Hopper's backward on sequences with lengths of their own, each against float64 by itself.

What is not a sequence's own is NaN, in arrays with gaps between sequences, and so are all numbers
of one sequence. Rows of results that no sequence has must stay as they were.
"""

from typing import NamedTuple

import numpy as np
import pytest

import numflash
from numflash import UnsupportedError, reference
from numflash.calls import backward
from numflash.calls.launch import Fill
from numflash.simulator import SEED
from tests.support.covering import ALL, some, thorough
from tests.support.gapped_arrays import gapped_arrays

TOLERANCES = {"float16": 6e-3, "bfloat16": 5e-2}
# One of NaN, one without keys, one without queries; at first one without either.
LENGTHS = ((0, 0), (40, 66), (33, 50), (1, 20), (70, 33), (5, 0), (0, 7))
BAD = 2
CAUSAL = {"causal": True}
TOP_LEFT = {"causal_align": "top_left"}
UNTOUCHED = 7.0


class Case(NamedTuple):
    """Configs of dQ, of dK and dV, and of all three; options of a mask and of features."""

    dq: str
    dkdv: str
    one: str
    options: dict = {}
    heads: tuple[int, int] = (1, 1)
    head_dims: tuple[int, int] = (32, 32)
    dtype: str = "float16"

    @property
    def configs(self) -> dict[str, str]:
        return {"backward-dq": f"sm90-{self.dq}", "backward-dkdv": f"sm90-{self.dkdv}"}

    @property
    def fused(self) -> dict[str, str]:
        return {"backward": f"sm90-{self.one}"}


CASES = {
    "all keys": Case("m64n32w4s2", "m32n64w4s2", "m64n64w4s2", {}, (2, 1)),
    "causal": Case("m128n16w8s2", "m32n128w8s2", "m64n64w4s2", CAUSAL),
    "top left": Case(
        "m64n64w4s1", "m64n64w4s1", "m64n128w8s2", CAUSAL | TOP_LEFT, dtype="bfloat16"
    ),
    "window": Case("m64n32w4s3", "m32n64w4s3", "m64n64w4s1", {"window_size": (20, 10)}),
    "window, top left": Case(
        "m64n16w4s2", "m96n64w4s1", "m64n64w4s2", {"window_size": (12, 0)} | TOP_LEFT
    ),
    "groups": Case("m64n32w4s1", "m32n64w4s2", "m64n64w4s1", CAUSAL, (4, 2), dtype="bfloat16"),
    "slabs": Case("m64n32w4s1", "m32n64w4s1", "m64n128w8s1", CAUSAL, head_dims=(96, 72)),
    "dropout": Case(
        "m64n32w4s2", "m64n64w4s1", "m64n64w4s2", CAUSAL | {"dropout_p": 0.3, "seed": 5}, (2, 1)
    ),
    "features": Case(
        "m64n48w4s1",
        "m32n64w4s2",
        "m64n128w8s1",
        CAUSAL
        | {
            "softcap": 2.0,
            "alibi_slopes": np.array([0.5, 0.125], np.float32),
            "sinks": np.array([0.5, -1.0], np.float32),
        },
        (2, 1),
    ),
}


@pytest.fixture(autouse=True)
def hopper(on, monkeypatch):
    """A simulated Hopper. Results are not filled with 0, so that zeros that are written show."""
    on("sm_90a")

    def fill(operand, value, device):
        is_result = operand.array.itemsize == 2
        return Fill(operand, UNTOUCHED if is_result else value, device)

    monkeypatch.setattr(backward, "Fill", fill)


def arrays_of(case, seed=0):
    """q, k, v and dout: numbers in sequences that are not BAD, NaN elsewhere; and starts."""
    return gapped_arrays(LENGTHS, BAD, case.heads, case.head_dims, case.dtype, seed)


def called(case, arrays, first_q, first_k, configs=None):
    """dQ, dK and dV; the forward is that of mma."""
    q, k, v, dout = arrays
    of_q, of_k = (np.array(n, np.int32) for n in zip(*LENGTHS, strict=True))
    given = {"starts_q": first_q, "seqlens_q": of_q, "starts_k": first_k, "seqlens_k": of_k}
    given |= case.options
    forward = {"forward": "sm80-m32n16w2s1"}
    out, lse = numflash.attention_varlen(q, k, v, return_lse=True, config=forward, **given)
    return numflash.attention_varlen_backward(
        dout, q, k, v, out, lse, config=configs or case.configs, **given
    )[:3]


KEPT = ("top left",)


@pytest.mark.parametrize("name", some(CASES, *KEPT))
def test_each_sequence_is_right_and_alone(name):
    expect_right(CASES[name], CASES[name].configs)


@pytest.mark.parametrize("blocks", some(["1", "5"], "5"))
@pytest.mark.parametrize("name", some(CASES, "top left"))
def test_one_kernel_adds_dq_of_each_sequence_by_itself(name, blocks, monkeypatch):
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", blocks)
    expect_right(CASES[name], CASES[name].fused)


def expect_right(case, configs):
    """Gradients of each sequence are those of float64, and no row beside them is written."""
    (q, k, v, dout), first_q, first_k = arrays_of(case)
    gradients = called(case, (q, k, v, dout), first_q, first_k, configs)
    free = [np.ones(len(x), bool) for x in (q, k)]
    for number, (at_q, at_k, (n_q, n_k)) in enumerate(zip(first_q, first_k, LENGTHS, strict=True)):
        rows, keys = slice(at_q, at_q + n_q), slice(at_k, at_k + n_k)
        free[0][rows], free[1][keys] = False, False
        if number == BAD:
            continue
        options = case.options
        if "dropout_p" in options:
            entry = number, len(LENGTHS)
            options = options | {"entry": entry}
        expected = expected_of(q[rows], k[keys], v[keys], dout[rows], options)
        for x, own, wanted in zip(gradients, (rows, keys, keys), expected, strict=True):
            got = x[own].astype(float)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCES[case.dtype])
    for x, is_free in zip(gradients, (free[0], free[1], free[1]), strict=True):
        assert is_free.any() and (x[is_free].astype(float) == UNTOUCHED).all()


def expected_of(q, k, v, dout, options):
    """dQ, dK and dV of one sequence, in float64."""
    options = dict(options)
    entry = options.pop("entry", None)
    if entry is None:
        return reference.attention_backward(dout, q, k, v, **options)[:3]
    # Random bits are those of its number among all sequences.
    number, count = entry
    q, k, v, dout = (np.repeat(x[None], count, 0) for x in (q, k, v, dout))
    found = reference.attention_backward(dout, q, k, v, **options)
    return [x[number] for x in found]


MMA = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}


@thorough
@pytest.mark.parametrize("name", some(("dropout", "window", "groups"), "dropout"))
def test_bits_are_those_of_mma_in_any_order_of_threads(name, monkeypatch):
    case = CASES[name]
    given = arrays_of(case)
    expected = [x.view(np.uint16) for x in called(case, *given, MMA)]
    for seed in range(4 if ALL else 1):
        monkeypatch.setattr(SEED, "value", seed + 1)
        for got, wanted in zip(called(case, *given), expected, strict=True):
            np.testing.assert_array_equal(got.view(np.uint16), wanted)


@thorough
@pytest.mark.parametrize("kind", some(["configs", "fused"], "fused"))
@pytest.mark.parametrize("layout", some(["bshd", "bhsd"], "bhsd"))
def test_a_padded_batch_is_rows_of_one_array(layout, kind):
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

    q, dout = (made(80, 2, [0, 0, 0], lengths_q, gap) for gap in (2, 4))
    k, v = (made(120, 1, first_k, lengths_k, gap) for gap in (1, 3))
    options |= {"seqlens_q": lengths_q, "seqlens_k": lengths_k, "starts_k": first_k}
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    configs = getattr(CASES["all keys"], kind)
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, config=configs, **options)
    views = (q, k, v, dout, *gradients)
    q, k, v, dout, *gradients = (x.swapaxes(1, 2) if by_heads else x for x in views)
    for entry, (n_q, at_k, n_k) in enumerate(zip(lengths_q, first_k, lengths_k, strict=True)):
        rows, keys = slice(0, n_q), slice(at_k, at_k + n_k)
        of_entry = q[entry, rows], k[entry, keys], v[entry, keys], dout[entry, rows]
        expected = expected_of(*of_entry, CAUSAL)
        for x, own, wanted in zip(gradients, (rows, keys, keys), expected, strict=True):
            np.testing.assert_allclose(x[entry, own].astype(float), wanted, rtol=0, atol=6e-3)
            rest = np.delete(x[entry].astype(float), np.r_[own], 0)
            assert (rest == UNTOUCHED).all()


@thorough
@pytest.mark.parametrize("blocks", some(["1", "5"], "5"))
def test_one_kernel_ends_where_sequences_have_the_same_queries(blocks, monkeypatch):
    """There is no room for the tiles of all: dQ would be wrong, but no block waits for ever."""
    monkeypatch.setenv("NUMFLASH_SIM_BLOCKS", blocks)
    rng, n_k = np.random.default_rng(2), 70
    q, dout = rng.standard_normal((2, 100, 1, 32)).astype(np.float16)
    k, v = rng.standard_normal((2, 3 * n_k, 1, 32)).astype(np.float16)
    ends = {"starts_q": np.zeros(3, np.int32), "seqlens_q": np.full(3, 100, np.int32)}
    ends["cu_seqlens_k"] = n_k * np.arange(4, dtype=np.int32)
    keys = slice(2 * n_k, 3 * n_k)
    out, lse = reference.attention(q, k[keys], v[keys])
    # Statistics are those of the last sequence, whose tiles have no place.
    dk, dv = numflash.attention_varlen_backward(
        dout,
        q,
        k,
        v,
        out.astype(np.float16),
        lse.astype(np.float32),
        config={"backward": "sm90-m64n64w4s1"},
        wrt=("k", "v"),
        **ends,
    )
    expected = expected_of(q, k[keys], v[keys], dout, {})
    for x, wanted in zip((dk, dv), expected[1:], strict=True):
        np.testing.assert_allclose(x[keys].astype(float), wanted, rtol=0, atol=6e-3)


def test_entries_that_are_no_rows_of_one_array_are_for_other_kernels():
    """(seqlen, batch, heads, head_dim) in memory."""
    x = np.zeros((40, 2, 1, 32), np.float16).swapaxes(0, 1)
    lengths = np.array([3, 40], np.int32)
    out, lse = numflash.attention(x, x, x, seqlens_k=lengths, return_lse=True)
    with pytest.raises(UnsupportedError, match="batch stride of 64 bytes is not a multiple of it"):
        numflash.attention_backward(
            x, x, x, x, out, lse, seqlens_k=lengths, config=CASES["causal"].configs
        )
