"""Attention over caches of e4m3 codes: results against float64 of what the codes stand for."""

from functools import partial

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.configs import Traits
from numflash.runtime.devices import architecture
from numflash.selection.rules import choose
from tests.support.cache_cases import CacheCase
from tests.support.coded_cache_cases import CASES, E4M3, errors_of
from tests.support.covering import some, thorough


@pytest.mark.parametrize("case", some(CASES, every=12), ids=str)
def test_results_are_within_their_budgets_and_new_rows_have_their_codes(case: CacheCase, on):
    on(case.arch)
    for error in errors_of(case, np.random.default_rng(len(str(case)))):
        assert error.passed, error


def call(entries=2, dtype="float16", heads=1, d=32, rows=24, **options):
    """(q, k_cache, v_cache, options) of a small call, whose factors are given or 1."""
    rng = np.random.default_rng(entries)
    q = rng.standard_normal((entries, 1, 2 * heads, d)).astype(dtype)
    caches = E4M3.encode(rng.standard_normal((2, entries, rows, heads, d)))
    return q, *caches, {"cache_seqlens": np.full(entries, rows - 4, np.int32)} | options


def test_codes_of_any_dtype_and_factors_of_one_by_default(on):
    on("sm_80")
    q, k, v, options = call()
    ones = np.ones((2, 1), np.float32)
    out = numflash.attention_with_kvcache(q, k, v, **options)
    typed = (x.view(E4M3.dtype) for x in (k, v))
    same = numflash.attention_with_kvcache(q, *typed, k_descale=ones, v_descale=ones, **options)
    np.testing.assert_array_equal(out, same)
    # Factors of any strides; a power of two changes no bit but the exponent.
    wide = np.broadcast_to(np.float32(4), (2, 1))
    larger = numflash.attention_with_kvcache(q, k, v, v_descale=wide, **options)
    np.testing.assert_array_equal(larger, 4 * out)


def test_new_numbers_saturate_and_a_nan_has_its_code(on):
    on("sm_80")
    q, k, v, options = call()
    new = np.zeros((2, 1, 1, 32), np.float16)
    new[..., :6] = 30000, -30000, np.nan, np.inf, -0.0, 3.0
    factors = np.array([[0.5], [2.0]], np.float32)
    numflash.attention_with_kvcache(
        q, k, v, new, new, k_descale=factors, v_descale=1 / factors, **options
    )
    six, three_halves = E4M3.encode([6.0, 1.5])
    for cache, last in ((k, (six, three_halves)), (v, (three_halves, six))):
        for entry in range(2):
            codes = cache[entry, 20, 0]
            assert codes[:6].tolist() == [0x7E, 0xFE, 0x7F, 0x7E, 0x80, last[entry]]
            assert not codes[6:].any()


def test_a_nan_in_a_sequence_reaches_its_result_alone(on):
    on("sm_80")
    q, k, v, options = call()
    v[1, 3, 0, 5] = 0xFF
    out = numflash.attention_with_kvcache(q, k, v, **options)
    assert np.isnan(out[1, ..., 5]).all() and np.isnan(out).sum() == 2


@thorough
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(on):
    on("sm_80")
    q, k, v, _ = call(3, rows=2112)
    lengths = np.array([2100, 5, 300], np.int32)
    factors = np.array([[0.5], [0.3], [0.7]], np.float32)
    run = partial(numflash.attention_with_kvcache, batch_invariant=True)
    together = run(q, k, v, cache_seqlens=lengths, k_descale=factors, v_descale=factors)
    for i in range(3):
        own = slice(i, i + 1)
        given = {f"{name}_descale": factors[own] for name in "kv"}
        alone = run(q[own], k[own], v[own], cache_seqlens=lengths[own], **given)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("num_splits", some([1, 3], 3))
def test_parts_have_their_factors(on, num_splits):
    on("sm_80")
    q, k, v, options = call(rows=404)
    options["cache_seqlens"] = np.array([400, 130], np.int32)
    factors = np.array([[0.25], [2.5]], np.float32)
    numbers = (E4M3.decode(x) * factors[:, None, :, None].astype(float) for x in (k, v))
    wanted, lse, *_ = reference.attention_with_kvcache(q, *numbers, **options)
    given = {f"{name}_descale": factors for name in "kv"}
    got = numflash.attention_with_kvcache(
        q, k, v, num_splits=num_splits, return_lse=True, **given, **options
    )
    np.testing.assert_allclose(got[0], wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(got[1], lse, atol=1e-5)


def test_keys_of_pages_that_are_none_count_as_zeros(on):
    on("sm_80")
    q, k, v, options = call()
    table = np.array([[0, 7, 5], [1, -1, 4]], np.int32)
    pages = [np.concatenate(x.reshape(2, 3, 8, 1, 32)) for x in (k, v)]
    numbers = [E4M3.decode(x).astype(float) for x in pages]
    options["cache_seqlens"] = np.full(2, 20, np.int32)
    wanted, *_ = reference.attention_with_kvcache(q, *numbers, page_table=table, **options)
    out = numflash.attention_with_kvcache(q, *pages, page_table=table, **options)
    np.testing.assert_allclose(out, wanted, atol=2e-3)


FACTORS = np.ones((2, 1), np.float32)
BAD = {
    "a factor too many": (
        {"k_descale": np.ones((2, 2), "f4")},
        ValueError,
        "k_descale must have shape",
    ),
    "of one axis": ({"v_descale": np.ones(2, "f4")}, ValueError, "v_descale must have shape"),
    "float64": (
        {"v_descale": np.ones((2, 1))},
        TypeError,
        "v_descale must be float32, got float64",
    ),
    "a number": ({"k_descale": 0.5}, TypeError, "k_descale"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_factors_are_refused(on, name):
    on("sm_80")
    given, error, message = BAD[name]
    q, k, v, options = call(**given)
    with pytest.raises(error, match=message):
        numflash.attention_with_kvcache(q, k, v, **options)


def test_wrong_dtypes_are_refused(on):
    on("sm_80")
    attend = numflash.attention_with_kvcache
    q, k, v, options = call()
    half = np.zeros(k.shape, np.float16)
    with pytest.raises(ValueError, match=r"v_descale goes with caches of e4m3 codes.*float16"):
        attend(q, half, half, v_descale=FACTORS, **options)
    with pytest.raises(TypeError, match="must both be e4m3 codes, or none, got uint8 and float16"):
        attend(q, k, half, **options)
    with pytest.raises(TypeError, match=r"q must be float16 or bfloat16 where.*got float32"):
        attend(q.astype(np.float32), k, v, **options)
    e5m2 = k.view("float8_e5m2")
    with pytest.raises(TypeError, match="k_cache must have the dtype of q, float16, or e4m3"):
        attend(q, e5m2, e5m2, **options)
    with pytest.raises(TypeError, match="k must have the dtype of q, float16, got uint8"):
        attend(q, k, v, k[:, :1], v[:, :1], **options)
    with pytest.raises(TypeError, match="k must have the dtype of q, float16, got uint8"):
        numflash.attention(q, k, v)


def test_kernels_without_codes_say_so(on):
    on("sm_75")
    q, k, v, options = call(dtype="bfloat16")
    with pytest.raises(numflash.UnsupportedError, match="portable: it does not decode K and V"):
        numflash.attention_with_kvcache(q, k, v, **options)
    on("sm_90a")
    with pytest.raises(numflash.UnsupportedError, match="bulk copies do not decode K and V"):
        config = "sm90-m64n64w4s2"
        numflash.attention_with_kvcache(q, k, v, config=config, **options)
    traits = Traits("float16", 128, 128, ragged=True, codes=True)
    choice = choose("forward", traits, architecture("sm_90a"))
    assert choice.config.implementation == "sm80"
    assert any("bulk copies do not decode" in why for _, why in choice.passed_over)
