"""`numflash.reference.fp8` and `numflash.configs.formats` against definitions and loops.

Formats are spelled out in fractions, transforms as matrices, attention in loops over numbers.
"""

import itertools
import math
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest

from numflash import reference
from numflash.configs.formats import FORMATS
from numflash.reference import fp8
from tests.support.fp8_cases import to_encode

GRANULARITIES = ("tensor", "head", "block", "token")
# bits of the exponent, bits after the point, bias
BITS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}


def number_of(code: int, name: str):
    """The number that a code stands for: a Fraction, or a float that is not finite."""
    exponent_bits, digits, bias = BITS[name]
    sign = -1 if code & 0x80 else 1
    exponent, fraction = (code & 0x7F) >> digits, code & (1 << digits) - 1
    if name == "e4m3" and code & 0x7F == 0x7F:
        return math.nan
    if name == "e5m2" and exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * Fraction(fraction, 1 << digits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(fraction, 1 << digits)) * Fraction(2) ** (exponent - bias)


def finite_numbers(name: str) -> list[Fraction]:
    """Those of the codes from 0 on, ascending."""
    numbers = (number_of(code, name) for code in range(128))
    return [x for x in numbers if isinstance(x, Fraction)]


def encoded(x: float, name: str, numbers: list[Fraction]) -> int:
    """The code of the nearest number; of two the one whose last bit is 0."""
    if math.isnan(x):
        return 0x7F
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    magnitude = numbers[-1] if math.isinf(x) else min(Fraction(abs(x)), numbers[-1])
    low = bisect_right(numbers, magnitude) - 1
    if low == len(numbers) - 1:
        return sign | low
    below, above = magnitude - numbers[low], numbers[low + 1] - magnitude
    return sign | (low if below < above or (below == above and low % 2 == 0) else low + 1)


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_codes_stand_for_what_the_format_says(name):
    kind = FORMATS[name]
    for code in range(256):
        value, expected = float(kind.values[code]), number_of(code, name)
        assert (math.isnan(value) and math.isnan(expected)) or value == expected
        if expected == 0:
            assert math.copysign(1, value) == (-1 if code & 0x80 else 1)
    assert kind.largest == finite_numbers(name)[-1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_comes_back(name):
    kind, codes = FORMATS[name], np.arange(256, dtype=np.uint8)
    back = kind.encode(kind.decode(codes))
    values = kind.values
    finite = np.isfinite(values)
    assert (back[finite] == codes[finite]).all()
    assert (back[np.isnan(values)] == 0x7F).all()
    infinite = np.isinf(values)
    assert (values[back[infinite]] == np.copysign(kind.largest, values[infinite])).all()
    assert finite.sum() == {"e4m3": 254, "e5m2": 248}[name]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_become_the_nearest_code(name):
    x, numbers = to_encode(FORMATS[name]), finite_numbers(name)
    expected = [encoded(v, name, numbers) for v in x.tolist()]
    assert FORMATS[name].encode(x).tolist() == expected


@pytest.mark.parametrize(
    ("x", "e4m3", "e5m2"),
    [
        (0.0, 0x00, 0x00),
        (-0.0, 0x80, 0x80),
        (1.0, 0x38, 0x3C),
        (-1.5, 0xBC, 0xBE),
        (448.0, 0x7E, 0x5F),
        (1e6, 0x7E, 0x7B),
        (-math.inf, 0xFE, 0xFB),
        (math.inf, 0x7E, 0x7B),
        (math.nan, 0x7F, 0x7F),
        (2.0**-9, 0x01, 0x18),
        (2.0**-10, 0x00, 0x14),
        (2.0**-16, 0x00, 0x01),
        (2.0**-17, 0x00, 0x00),
    ],
)
def test_some_codes(x, e4m3, e5m2):
    for name, code in (("e4m3", e4m3), ("e5m2", e5m2)):
        assert FORMATS[name].encode([x])[0] == code
        assert encoded(x, name, finite_numbers(name)) == code


# Rotation


def hadamard_matrix(size: int) -> np.ndarray:
    """(-1) ** (bits that i and j share)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs, np.float64)


@pytest.mark.parametrize(("padded", "size"), [(64, 64), (128, 128), (192, 64), (256, 256)])
def test_a_rotation_is_signs_times_a_hadamard_matrix(padded, size):
    assert fp8.rotation_size(padded) == size
    x = np.random.default_rng(padded).standard_normal((3, padded)).astype(np.float32)
    matrix = np.kron(np.eye(padded // size), hadamard_matrix(size)) / math.sqrt(size)
    expected = x * fp8.hadamard_signs(padded, 4) @ matrix
    np.testing.assert_allclose(fp8.rotate(x, 4), expected, atol=1e-5)
    turned = fp8.rotate(np.eye(padded), 4).astype(np.float64)
    np.testing.assert_allclose(turned @ turned.T, np.eye(padded), atol=1e-6)
    np.testing.assert_allclose(fp8.rotate_back(fp8.rotate(x, 4), 4), x, atol=1e-5)


def test_a_rotation_leaves_scores_as_they_are():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((5, 192)).astype(np.float32) for _ in "qk")
    scores = q.astype(np.float64) @ k.T
    turned = fp8.rotate(q, 9).astype(np.float64) @ fp8.rotate(k, 9).T
    np.testing.assert_allclose(turned, scores, atol=1e-4)
    assert np.abs(fp8.rotate(q, 8).astype(np.float64) @ fp8.rotate(k, 9).T - scores).max() > 1


def test_a_rotation_spreads_an_outlier_out():
    x = np.zeros((1, 128), np.float32)
    x[0, 5] = 128
    np.testing.assert_allclose(np.abs(fp8.rotate(x, 0)), math.sqrt(128), rtol=1e-6)


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, (0xA30FEBCFD9C2825F, 0x4510BDF882D9D721, 0x0A7D3DA94ECDE8B8, 0x043B27B61342F01D)),
        (1, (0x8306BDF37922E4FF, 0xF35196BBC152A866, 0x24E7A4F608EC18CD, 0xF2DAB0AED2AC6FD2)),
        (12345, (0x3A32B18DB2FFC19D, 0x51171315C9E4C4DE, 0xCC2024823444EFD9, 0xAD1F06AEA486E910)),
    ],
)
def test_signs_of_a_seed_are_fixed(seed, words):
    signs = fp8.hadamard_signs(256, seed)
    bits = [words[i // 64] >> i % 64 & 1 for i in range(256)]
    assert signs.tolist() == [-1.0 if bit else 1.0 for bit in bits]
    assert signs.dtype == np.float32
    assert (fp8.hadamard_signs(64, seed) == signs[:64]).all()


# Scales


def scale_groups(shape, granularity: str, block: int):
    """(place in descale, the tokens that share it) of each scale of a bshd array."""
    batch, seqlen, heads, _ = shape
    if granularity == "tensor":
        yield (0, 0, 0), np.s_[:]
        return
    size = {"head": seqlen, "block": block, "token": 1}[granularity]
    for b, h, i in itertools.product(range(batch), range(heads), range(-(-seqlen // size))):
        yield (b, h, i), np.s_[b, i * size : (i + 1) * size, h]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_are_of_the_largest_number_that_shares_them(granularity, format):
    x = np.random.default_rng(0).standard_normal((2, 35, 3, 40)).astype(np.float32)
    x[0, 3, 1, 5], x[1, 20, 2, 7], x[0, 34, 0, 0] = np.inf, np.nan, -9
    x[1, 16:32, 0] = 0
    codes, descale = fp8.quantize_fp8(x, granularity, 16, format=format)
    kind, largest = FORMATS[format], np.float32(FORMATS[format].peak)
    groups = list(scale_groups(x.shape, granularity, 16))
    assert len(groups) == descale.size and codes.shape == (2, 35, 3, 64)
    assert (codes[..., 40:] == 0).all()
    for place, tokens in groups:
        part = x[tokens]
        finite = np.abs(part[np.isfinite(part)])
        amax = max(np.float32(2.0**-100), finite.max())
        assert descale[place] == amax / largest
        assert (codes[tokens][..., :40] == kind.encode(part * (largest / amax))).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("hadamard", [False, True])
def test_numbers_come_back_to_half_a_step(granularity, hadamard):
    x = np.random.default_rng(1).standard_normal((2, 35, 2, 64)).astype(np.float32)
    x *= np.exp(np.linspace(-9, 3, 35)).astype(np.float32)[:, None, None]
    codes, descale = fp8.quantize_fp8(x, granularity, 16, hadamard, seed=3)
    block = 16 if granularity == "block" else 1
    turned = fp8.rotate(x, 3) if hadamard else x
    scale = fp8.per_token(descale, 2, 2, 35, block).swapaxes(1, 2)[..., None]
    ratio = np.abs(turned.astype(np.float64) / scale)
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(ratio, 1e-30))), -6) - 3)
    numbers = FORMATS["e4m3"].decode(codes) * scale
    assert (np.abs(numbers - turned) <= 0.5001 * step * scale).all()
    back = fp8.dequantize_fp8(codes, descale, 64, block, hadamard, seed=3)
    wanted = fp8.rotate_back(numbers, 3) if hadamard else numbers
    np.testing.assert_allclose(back, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("ndim", [4, 3, 2])
def test_codes_have_the_axes_of_the_array(layout, ndim):
    x = np.random.default_rng(2).standard_normal((2, 19, 3, 40)).astype(np.float16)
    codes, descale = fp8.quantize_fp8(x, block=16)
    part = {4: np.s_[:], 3: np.s_[1], 2: np.s_[1, :, 2]}[ndim]
    few = x[part].swapaxes(-3, -2) if layout == "bhsd" and ndim > 2 else x[part]
    got, scales = fp8.quantize_fp8(few, block=16, layout=layout)
    wanted = codes[part].swapaxes(-3, -2) if layout == "bhsd" and ndim > 2 else codes[part]
    assert (got == wanted).all()
    assert (scales == descale[{4: np.s_[:], 3: np.s_[1:], 2: np.s_[1:, 2:]}[ndim]]).all()
    back = fp8.dequantize_fp8(got, scales, 40, 16, layout=layout)
    assert back.shape == few.shape
    np.testing.assert_allclose(back, few, atol=0.15)


def test_zeros_are_zeros():
    codes, descale = fp8.quantize_fp8(np.zeros((1, 3, 1, 64), np.float16), "token")
    assert (codes == 0).all() and (descale > 0).all()


# The order of V's tokens


@pytest.mark.parametrize("seqlen", [1, 16, 63, 64, 130])
def test_tokens_go_innermost_and_back(seqlen):
    codes = np.random.default_rng(0).integers(1, 256, (2, seqlen, 3, 64), dtype=np.uint8)
    stored = fp8.tokens_innermost(codes)
    padded = -(-seqlen // 64) * 64
    assert stored.shape == (2, 3, 64, padded)
    seen = set()
    for position in range(padded):
        p = position % 16
        token = position - p + 2 * (p // 4) + p % 2 + 8 * (p // 2 % 2)
        seen.add(token)
        wanted = codes[:, token].reshape(2, 3, 64) if token < seqlen else np.zeros((2, 3, 64))
        assert (stored[..., position] == wanted).all()
    assert seen == set(range(padded))
    assert (fp8.tokens_outermost(stored, seqlen) == codes).all()


def test_the_order_is_that_in_which_a_thread_has_p():
    # Lane t of four has columns 2 t, 2 t + 1 of two neighbouring products of eight.
    codes = np.arange(16, dtype=np.uint8)[None, :, None, None]
    stored = fp8.tokens_innermost(np.broadcast_to(codes, (1, 16, 1, 64)))[0, 0, 0, :16]
    for t in range(4):
        assert stored[4 * t : 4 * t + 4].tolist() == [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]


# Attention


def arrays(seqlen_q=21, seqlen_k=70, heads=4, heads_kv=2, head_dim=64, head_dim_v=64):
    """q, k, v in float16."""
    rng = np.random.default_rng(0)
    shapes = ((seqlen_q, heads, head_dim), (seqlen_k, heads_kv, head_dim))
    shapes += ((seqlen_k, heads_kv, head_dim_v),)
    return [rng.standard_normal((2, *shape)).astype(np.float16) for shape in shapes]


def rms(x) -> float:
    """The root of the mean square."""
    return math.sqrt(np.mean(np.square(x)))


OPTIONS = (
    {},
    {"causal": True},
    {"window_size": (20, 3)},
    {"softcap": 2.0},
    {"softmax_scale": 0.3, "causal": True, "causal_align": "top_left"},
    {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.01], np.float32)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_attention_on_8_bits_is_close_to_that_on_16(granularity, options):
    q, k, v = arrays(head_dim=80, head_dim_v=48)
    exact, exact_lse = reference.attention(q, k, v, **options)
    for hadamard in (False, True):
        out, lse = fp8.attention_fp8(
            q, k, v, granularity=granularity, block=16, hadamard=hadamard, **options
        )
        assert out.shape == exact.shape
        assert 1e-3 * rms(exact) < rms(out - exact) < 0.08 * rms(exact)
        seen = np.isfinite(exact_lse)
        assert (lse[~seen] == -np.inf).all() and np.abs((lse - exact_lse)[seen]).max() < 0.5


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_with_p_as_it_is_it_is_attention_of_what_codes_stand_for(granularity):
    q, k, v = arrays()
    block = 16 if granularity == "block" else 1
    codes, descales, numbers = [], [], []
    for x in (q, k, v):
        x_codes, descale = fp8.quantize_fp8(x, granularity, 16)
        scale = fp8.per_token(descale, 2, x.shape[2], x.shape[1], block).swapaxes(1, 2)
        numbers.append(FORMATS["e4m3"].decode(x_codes).astype(np.float64) * scale[..., None])
        codes.append(x_codes)
        descales.append(descale)
    options = {"causal": True, "softmax_scale": 0.2}
    shared = {"blocks": (block,) * 3, **options}
    got = fp8.attention_of_codes(*codes, *descales, tile_n=None, **shared)
    for a, b in zip(got, reference.attention(*numbers, **options), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    rounded, _ = fp8.attention_of_codes(*codes, *descales, **shared)
    assert rms(rounded - got[0]) > 1e-4


def attention_in_loops(q, k, v, v_scale, tile_n: int, scale: float, causal: bool):
    """(out, lse) of one head; q, k and v are lists of rows, v without its scales."""
    numbers = finite_numbers("e4m3")
    out, lses = [], []
    for i, row in enumerate(q):
        last = i + len(k) - len(q) if causal else len(k) - 1
        scores = [
            scale * math.fsum(a * b for a, b in zip(row, k[j], strict=True))
            for j in range(last + 1)
        ]
        if not scores:
            out.append([0.0] * len(v[0]))
            lses.append(-math.inf)
            continue
        total = math.fsum(math.exp(s) for s in scores)
        sums = [0.0] * len(v[0])
        for first in range(0, len(scores), tile_n):
            keys = range(first, min(first + tile_n, len(scores)))
            largest = max(scores[j] + math.log(v_scale[j]) for j in keys)
            for j in keys:
                p = 256 * math.exp(scores[j] + math.log(v_scale[j]) - largest)
                code = encoded(float(np.float32(p)), "e4m3", numbers)
                weight = float(number_of(code, "e4m3")) / 256 * math.exp(largest)
                for column, value in enumerate(v[j]):
                    sums[column] += weight * value / total
        out.append(sums)
        lses.append(math.log(total))
    return out, lses


@pytest.mark.parametrize("granularity", ["token", "block", "head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile_n", [16, 32])
def test_the_specification_is_these_loops(granularity, causal, tile_n):
    rng = np.random.default_rng(tile_n)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (9, 37, 37))
    if causal:
        k, v = k[:, :7], v[:, :7]  # the first two queries see no key
    v *= np.linspace(4, 0.1, v.shape[1], dtype=np.float16)[:, None, None]
    block = 1 if granularity == "token" else 16
    codes, scales, rows = [], [], []
    for x in (q, k, v):
        x_codes, descale = fp8.quantize_fp8(x, granularity, 16)
        codes.append(x_codes)
        scales.append(descale)
        per_token = fp8.per_token(descale, 1, 1, x.shape[1], block)[0, 0].tolist()
        decoded = FORMATS["e4m3"].decode(x_codes[0, :, 0]).tolist()
        rows.append((decoded, per_token))
    turned = [[[c * s for c in row] for row, s in zip(*each, strict=True)] for each in rows[:2]]
    out, lse = attention_in_loops(*turned, *rows[2], tile_n, 0.5, causal)
    got, got_lse = fp8.attention_of_codes(
        *codes, *scales, blocks=(block,) * 3, tile_n=tile_n, causal=causal, softmax_scale=0.5
    )
    np.testing.assert_allclose(got[0, :, 0], out, atol=1e-12)
    np.testing.assert_allclose(got_lse[0, 0], lse, atol=1e-12)


def test_a_group_of_heads_may_share_scales_of_q():
    q, k, v = arrays()
    (q_codes, _), (k_codes, k_scale), (v_codes, v_scale) = (
        fp8.quantize_fp8(x, "head") for x in (q, k, v)
    )
    shared = np.array([[0.01, 0.02], [0.03, 0.005]], np.float32)[:, :, None]
    few = fp8.attention_of_codes(q_codes, k_codes, v_codes, shared, k_scale, v_scale)
    each = np.repeat(shared, 2, axis=1)
    many = fp8.attention_of_codes(q_codes, k_codes, v_codes, each, k_scale, v_scale)
    assert (few[0] == many[0]).all() and (few[1] == many[1]).all()


def test_the_unit_of_p_is_that_of_its_tile():
    # Next to a score that dwarfs all others, those of other tiles are as exact as without it.
    rng = np.random.default_rng(0)
    q = np.ones((1, 1, 1, 64), np.float32)
    k = np.zeros((1, 128, 1, 64), np.float32)
    k[0, 0] = 1.75  # a score of 14: P of all others is 8e-7 of its own
    v = rng.standard_normal((1, 128, 1, 64)).astype(np.float32)
    v[0, 0] = 0
    made = [fp8.quantize_fp8(x, "head") for x in (q, k, v)]
    codes, scales = zip(*made, strict=True)
    exact, _ = fp8.attention_of_codes(*codes, *scales, tile_n=None)
    out, _ = fp8.attention_of_codes(*codes, *scales, tile_n=64)
    whole, _ = fp8.attention_of_codes(*codes, *scales, tile_n=128)
    assert rms(whole - exact) > 0.5 * rms(exact), "all of one tile: the others are lost"
    # Keys 64 to 127 stay; the sink's own tile loses its 63 others.
    assert rms(out - exact) < 0.9 * rms(whole - exact)
