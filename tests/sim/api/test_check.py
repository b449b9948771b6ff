"""`check` finds what is wrong, and counts every error against its budget."""

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.api import attention as api
from tests.support.api_calls import (
    DV,
    FP8_CONFIG,
    NAN,
    SQ,
    B,
    H,
    arrays,
    codes_with_scales,
    fp8_arrays,
)
from tests.support.covering import some, thorough

# check


@pytest.mark.parametrize("granularity", some(["tensor", "head", "block", "token"], "block"))
def test_check_on_8_bit_floats(rng, granularity):
    q, k, v = arrays(rng, dtype=np.float16)
    recipe = numflash.Fp8Recipe(granularity, 16, granularity != "head", 3)
    report = numflash.check(q, k, v, precision="fp8", fp8=recipe, config=FP8_CONFIG)
    assert report.passed, f"\n{report}"
    exact = reference.attention(q, k, v)
    tile = {"tile_n": 32}
    options = {"granularity": granularity, "block": 16, "hadamard": recipe.hadamard, "seed": 3}
    specified = reference.attention_fp8(q, k, v, **options, **tile)
    for error, right, wanted in zip(report.errors, exact, specified, strict=True):
        assert error.naive_error == abs(wanted - right).max() > 1e-3


@thorough
def test_check_takes_8_bit_arrays_and_codes(rng):
    q, _, _ = arrays(rng, dtype=np.float16)
    quantized = fp8_arrays(rng)
    codes, scales = codes_with_scales(rng)
    for given, options in ((quantized, {}), ((q, *quantized[1:]), {}), (codes, scales)):
        report = numflash.check(*given, config=FP8_CONFIG, causal=True, softcap=5.0, **options)
        assert report.passed, f"\n{report}"
        # Of right codes: wrong ones would be far off, and allow as much.
        assert report.errors[0].naive_error < 0.15, f"\n{report}"
        # Against what the codes stand for: q's rounding counts where q comes with 16 bits.
        rounded = given[0] is q
        assert (report.errors[1].error > 1e-3) is rounded


@thorough
def test_check_on_8_bit_floats_takes_layouts_and_fewer_axes(rng):
    q, k, v = arrays(rng, layout="bhsd", dtype=np.float16)
    options = {"precision": "fp8", "config": FP8_CONFIG, "stream": 0}
    slopes = np.array([0.5, 0.25], np.float32)
    assert numflash.check(q, k, v, layout="bhsd", alibi_slopes=slopes, **options).passed
    assert numflash.check(q[0], k[0], v[0], layout="bhsd", **options).passed
    assert numflash.check(q[0, 0], k[0, 0], v[0, 0], **options).passed


@thorough
def test_check_takes_a_chosen_precision(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    for budget in (1e-3, 1.0):
        report = numflash.check(q, k, v, precision="auto", max_rel_error=budget)
        assert report.passed, f"\n{report}"
        assert (report.errors[0].error > 5e-3) is (budget == 1.0)


def test_check_finds_what_is_wrong_on_8_bit_floats(rng, monkeypatch):
    attention = api.attention

    def wrong(*args, **options):
        out, lse = attention(*args, **options)
        out[0, 2, 0, 3] += 1
        return out, lse

    monkeypatch.setattr(api, "attention", wrong)
    report = numflash.check(*arrays(rng, dtype=np.float16), precision="fp8", config=FP8_CONFIG)
    assert [error.passed for error in report.errors] == [False, True]


def test_check_refuses_gradients_on_8_bit_floats(rng):
    q, k, v = arrays(rng, dtype=np.float16)
    for options in ({"precision": "fp8"}, codes_with_scales(rng)[1]):
        with pytest.raises(numflash.UnsupportedError, match="no backward on 8-bit floats"):
            numflash.check(q, k, v, dout=q, **options)


def test_check_reports_every_error_and_its_budget(rng):
    q, k, v = arrays(rng)
    report = numflash.check(q, k, v, causal=True)
    assert isinstance(report, numflash.CheckReport) and report.passed
    assert [error.name for error in report.errors] == ["out", "lse"]
    for error in report.errors:
        assert 0 < error.error <= error.budget and error.naive_error > 0
    header, *lines = str(report).splitlines()
    assert header.split() == ["error", "naive", "budget"]
    assert [line.split()[0] for line in lines] == ["out", "lse"]
    assert all(line.endswith("  ok") for line in lines)


def test_check_takes_every_option_of_attention(rng):
    q, k, v = arrays(rng, layout="bhsd")
    out = np.full((B, H, SQ, DV), NAN)
    report = numflash.check(
        q,
        k,
        v,
        dout=rng.standard_normal(out.shape).astype(np.float32),
        softmax_scale=0.2,
        causal=True,
        causal_align="top_left",
        window_size=(30, -1),
        softcap=5.0,
        alibi_slopes=np.array([0.5, 0.25], np.float32),
        layout="bhsd",
        out=out,
        stream=0,
        return_lse=True,
    )
    assert report.passed, f"\n{report}"
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert not np.isnan(out).any()


@pytest.mark.parametrize(
    ("dtype", "precision", "config"),
    [
        (np.float16, None, None),
        (np.float16, None, "sm80-m16n16w1s1x2"),
        (np.float16, None, {"forward": "m16n16w2", "backward-dq": "sm75-m16n16w1s1"}),
        (np.float32, "tf32", {"backward-dkdv": "sm80-m16n16w1s1"}),
    ],
)
def test_check_takes_configs_and_precision(rng, dtype, precision, config):
    q, k, v = arrays(rng, dtype=dtype)
    before = dict(config) if isinstance(config, dict) else config
    report = numflash.check(q, k, v, dout=q, precision=precision, config=config)
    assert report.passed, f"\n{report}"
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert config == before


def test_check_of_tf32_allows_more_than_that_of_float32(rng):
    q, k, v = arrays(rng)
    exact, rounded = (
        numflash.check(q, k, v, precision=precision, config="m8n8w1")
        for precision in (None, "tf32")
    )
    for strict, lax in zip(exact.errors, rounded.errors, strict=True):
        assert strict.error == lax.error and strict.budget * 100 < lax.budget


def test_check_says_which_result_is_wrong(rng, monkeypatch):
    attention = api.attention

    def wrong(*args, **options):
        out, lse = attention(*args, **options)
        out[0, 2, 0, 3] += 0.01
        return out, lse

    monkeypatch.setattr(api, "attention", wrong)
    report = numflash.check(*arrays(rng))
    assert not report.passed
    assert [error.passed for error in report.errors] == [False, True]
    out_line, lse_line = str(report).splitlines()[1:]
    assert out_line.endswith("TOO LARGE") and lse_line.endswith("ok")


def test_check_counts_nan_as_an_infinite_error(rng):
    q, k, v = arrays(rng)
    v[0, 5, 0, 7] = np.nan
    exact = reference.attention(q, k, v)[0]
    assert np.isnan(exact).any()
    report = numflash.check(q, k, v)
    out = np.nan_to_num(numflash.attention(q, k, v))
    from numflash.api.comparison import measure

    assert not np.isnan(report.errors[0].error)
    assert measure("out", out, exact, exact, 2**-24).error == np.inf
