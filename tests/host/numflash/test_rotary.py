"""Tables of angles against higher precision and against published numbers; the reference."""

import math

import numpy as np
import pytest

from numflash import LinearScaling, Llama3Scaling, YarnScaling, reference
from numflash.configs import HEAD_DIM_STEP, MAX_HEAD_DIM, RotaryConfig, Traits, parse_config
from numflash.problem import rotary
from numflash.problem.rotary import angles_of, make_tables

LONG = np.longdouble
needs_long = pytest.mark.skipif(
    np.finfo(LONG).nmant < 63, reason="long double has no more bits than float64 here"
)


def frequencies(rotary_dim, base=10000.0, scaling=None):
    return angles_of(np.ones(1), rotary_dim, base, scaling)[0]


@needs_long
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("first", [0, 2**17, 2**20 - 64])
def test_tables_are_rounded_once_also_far_from_the_beginning(base, first, monkeypatch):
    """Against 64 bits of precision: wrong by half a unit in the last place, and 1 % more."""
    monkeypatch.setattr(rotary, "_ROWS_AT_ONCE", 1000)
    cos, sin = make_tables(first + 64, 16, base, None, "float32")
    steps = LONG(base) ** (-np.arange(0, 16, 2).astype(LONG) / 16)
    exact = (first + np.arange(64)).astype(LONG)[:, None] * steps
    for table, values in ((cos[first:], np.cos(exact)), (sin[first:], np.sin(exact))):
        unit = np.spacing(np.abs(table)).astype(LONG)
        assert (np.abs(table - values) <= 0.505 * unit + LONG(2) ** -33).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_tables_are_those_of_float64_rounded(dtype):
    cos, sin = make_tables(300, 32, 10000.0, None, dtype)
    angles = angles_of(np.arange(300), 32, 10000.0, None)
    assert cos.dtype.name == sin.dtype.name == dtype
    np.testing.assert_array_equal(cos, np.cos(angles).astype(cos.dtype))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(cos.dtype))


def test_tables_are_the_same_however_many_rows_are_computed_at_once(monkeypatch):
    whole = make_tables(70, 8, 10000.0, None, "float32")
    monkeypatch.setattr(rotary, "_ROWS_AT_ONCE", 32)
    for some, all_rows in zip(make_tables(70, 8, 10000.0, None, "float32"), whole, strict=True):
        np.testing.assert_array_equal(some, all_rows)
    assert make_tables(0, 8, 10000.0, None, "float32")[0].shape == (0, 4)


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(frequencies(64, scaling=LinearScaling(8)), frequencies(64) / 8)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """Llama 2's: 128 columns, 4096 positions; the ramp goes from pair 20 to pair 46."""
    plain, scaled = frequencies(128), frequencies(128, scaling=YarnScaling(16.0, 4096))
    np.testing.assert_array_equal(scaled[:21], plain[:21])
    np.testing.assert_allclose(scaled[46:], plain[46:] / 16, rtol=1e-15)
    between = scaled[21:46] / plain[21:46]
    np.testing.assert_allclose(between, 1 - (15 / 16) * np.arange(1, 26) / 26, rtol=1e-14)


def test_yarn_as_transformers_write_it():
    """`_compute_yarn_parameters`, with a ramp that is cut at both ends and one of no length."""
    for dim, base, length, fast, slow in (
        (64, 10000.0, 2048, 32.0, 1.0),
        (32, 1e6, 64, 4.0, 0.01),
        (16, 1e9, 3, 1.0, 0.999),
    ):

        def correction(rotations, dim=dim, base=base, length=length):
            return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(correction(fast)), 0)
        high = min(math.ceil(correction(slow)), dim - 1)
        high += 0.001 if low == high else 0
        extrapolated = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        positions = base ** (np.arange(0, dim, 2) / dim)
        wanted = (1 - extrapolated) / (4 * positions) + extrapolated / positions
        scaling = YarnScaling(4.0, length, fast, slow)
        np.testing.assert_allclose(frequencies(dim, base, scaling), wanted, rtol=1e-13)


def test_yarn_without_whole_numbers_begins_and_ends_between_pairs():
    plain = frequencies(128)
    scaled = frequencies(128, scaling=YarnScaling(16.0, 4096, truncate=False))
    # The ends of the ramp are at pairs 20.94 and 45.03.
    np.testing.assert_array_equal(scaled[:21], plain[:21])
    assert scaled[21] < plain[21] and scaled[45] > plain[45] / 16
    np.testing.assert_allclose(scaled[46:], plain[46:] / 16, rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "magnitude"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),  # DeepSeek-V3
        (
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
        ),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.25),
    ],
)
def test_the_temperature_of_yarn_is_in_both_tables(options, magnitude):
    scaling = YarnScaling(40.0, 4096, **options)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-14)
    cos, sin = make_tables(50, 64, 10000.0, scaling, "float32")
    squares = cos.astype(np.float64) ** 2 + sin.astype(np.float64) ** 2
    np.testing.assert_allclose(squares, magnitude**2, rtol=1e-6)
    assert YarnScaling(1.0, 4096).magnitude == 1


def test_llama_3_keeps_short_waves_and_stretches_long_ones():
    scaling = Llama3Scaling(8.0, 8192)
    plain, scaled = frequencies(128, 5e5), frequencies(128, 5e5, scaling)
    waves = 2 * math.pi / plain
    short, long = waves < 8192 / 4, waves > 8192
    assert short.sum() == 29 and long.sum() == 29
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-15)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-15)
    smooth = (8192 / waves - 1) / (4 - 1)
    between = ~short & ~long
    wanted = ((1 - smooth) / 8 + smooth) * plain
    np.testing.assert_allclose(scaled[between], wanted[between], rtol=1e-14)


def test_the_reference_is_a_product_of_complex_numbers():
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((2, 5, 3, 8)), rng.standard_normal((7, 4))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles[1:6])[:, None]
    got = reference.apply_rotary(x, np.cos(angles), np.sin(angles), interleaved=True, offsets=1)
    np.testing.assert_allclose(got[..., ::2], turned.real, rtol=1e-12)
    np.testing.assert_allclose(got[..., 1::2], turned.imag, rtol=1e-12)
    halves = x[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    got = reference.apply_rotary(halves, np.cos(angles), np.sin(angles), offsets=1)
    np.testing.assert_allclose(got[..., :4], turned.real, rtol=1e-12)
    np.testing.assert_allclose(got[..., 4:], turned.imag, rtol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_conjugate_of_the_reference_is_its_transpose(interleaved):
    rng = np.random.default_rng(1)
    cos, sin = rng.standard_normal((2, 5, 3))
    x, dout = rng.standard_normal((2, 1, 5, 2, 10))
    options = {"interleaved": interleaved}
    there = reference.apply_rotary(x, cos, sin, **options)
    back = reference.apply_rotary(dout, cos, sin, conjugate=True, **options)
    assert (there * dout).sum() == pytest.approx((x * back).sum(), rel=1e-12)


# The config


@pytest.mark.parametrize("text", ["w4h4", "w1h8-interleaved", "w32h1-interleaved-narrow"])
def test_a_config_is_its_string_form(text):
    assert str(parse_config("rotary", text)) == text
    assert str(RotaryConfig()) == "w4h4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_warps": 33}, "1 to 32, got 33"), ({"num_heads": 9}, "1 to 8, got 9")],
)
def test_a_config_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        RotaryConfig(**changes)
    with pytest.raises(ValueError, match="a rotary config must look like w4h4"):
        parse_config("rotary", "w4")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_row_has_its_threads(dtype):
    """A thread has 32 bytes of pairs, so that one turn of the loop covers the padded row."""
    for head_dim in range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP):
        traits = Traits(dtype, head_dim, head_dim)
        lanes = RotaryConfig().lanes(traits)
        assert lanes * 32 == head_dim * traits.dtype_bytes
        assert RotaryConfig(1).tokens(traits) >= 1 and RotaryConfig(1).misfit(traits) is None
    why = RotaryConfig(narrow=True).misfit(Traits("float32", 64, 64))
    assert "float32" in why
