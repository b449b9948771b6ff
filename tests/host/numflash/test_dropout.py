"""Which weights dropout drops: Philox, its bits over scores, and what the reference makes of them.

Statistics are of one seed each, so that they pass always or never: 5 standard deviations.
"""

import math

import numpy as np
import pytest

from numflash import reference
from numflash.configs.features import BY_NAME
from numflash.problem.options import AttentionOptions
from numflash.runtime.philox import key_of, philox, random_bits

# Random123's kat_vectors, of Philox4x32-10: counter, key, result.
KNOWN = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_is_random123_s(counter, key, words):
    assert tuple(int(word) for word in philox(*counter, key=key)) == words


def halfword_of(batch, head, i, j, seed):
    """The 16 bits of a score, one at a time, as the module's docstring of `philox` says."""
    counter = i // 16 * 8 + i % 8, j // 16 * 4 + j % 8 // 2, head, batch
    words = [int(word) for word in philox(*counter, key=key_of(seed))]
    halfword = i // 8 % 2 + 2 * (j % 2) + 4 * (j // 8 % 2)
    return words[halfword // 2] >> 16 * (halfword % 2) & 0xFFFF


def test_the_bits_of_a_score_depend_on_its_place_and_the_seed_alone():
    bits = random_bits((2, 3, 37, 50), 12345)
    rng = np.random.default_rng(0)
    for _ in range(50):
        place = tuple(int(rng.integers(n)) for n in bits.shape)
        assert bits[place] == halfword_of(*place, 12345)
    np.testing.assert_array_equal(bits[:1, :2, :20, :16], random_bits((1, 2, 20, 16), 12345))
    part = random_bits((2, 2, 11, 30), 12345, (19, 3, 1))
    np.testing.assert_array_equal(bits[:, 1:, 19:30, 3:33], part)


def test_no_two_scores_share_bits():
    """Of 64 bits a score, from four neighbouring seeds, no two are equal."""
    bits = np.stack([random_bits((2, 3, 48, 80), seed) for seed in range(4)], -1)
    rows = np.ascontiguousarray(bits).view(np.uint64).ravel()
    assert len(np.unique(rows)) == rows.size


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 2.0**-16, 0.3])
def test_as_many_are_kept_as_was_asked_for(dropout_p):
    kept = reference.dropout_mask(2, 4, 256, 512, dropout_p=dropout_p, seed=3)
    share = 1 - round(65536 * dropout_p) / 65536
    spread = 5 * math.sqrt(kept.size * share * (1 - share))
    assert abs(kept.sum() - kept.size * share) <= spread
    # Each row, column and place within a group of eight by itself.
    for axis in ((0, 1, 2), (0, 1, 3)):
        n = np.prod([kept.shape[i] for i in axis])
        spread = 5.5 * math.sqrt(n * share * (1 - share)) + 1
        assert np.abs(kept.sum(axis) - n * share).max() <= spread
    for i in range(16):
        for j in range(16):
            part = kept[:, :, i::16, j::16]
            spread = 5.5 * math.sqrt(part.size * share * (1 - share)) + 1
            assert abs(part.sum() - part.size * share) <= spread


def test_all_values_of_16_bits_are_as_likely():
    bits = random_bits((1, 8, 512, 1024), 9)
    counts = np.bincount(bits.ravel() >> 6, minlength=1024)
    expected = bits.size / 1024
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 1023) <= 5 * math.sqrt(2 * 1023)


def test_neighbours_heads_entries_and_seeds_are_independent():
    bits = random_bits((2, 2, 256, 512), 17)
    x = bits.astype(np.float64) - bits.mean()
    others = {
        "seed": random_bits(bits.shape, 18),
        "high half of the seed": random_bits(bits.shape, 17 + (1 << 32)),
        "head": bits[:, ::-1],
        "batch entry": bits[::-1],
        **{f"{n} rows on": np.roll(bits, n, 2) for n in (1, 2, 8, 16)},
        **{f"{n} columns on": np.roll(bits, n, 3) for n in (1, 2, 8, 16)},
        "transposed": np.swapaxes(bits[..., :256], 2, 3),
    }
    for name, other in others.items():
        y, z = other.astype(np.float64) - bits.mean(), x[..., : other.shape[3]]
        correlation = (y * z).mean() / (y.std() * z.std())
        assert abs(correlation) <= 5 / math.sqrt(y.size), name


def test_a_negative_seed_is_its_two_s_complement_and_arrays_of_one_are_seeds():
    sizes, p = (1, 2, 20, 30), 0.5
    expected = reference.dropout_mask(*sizes, dropout_p=p, seed=-2)
    for seed in (2**64 - 2, np.array([-2]), np.array(-2, np.int32), np.array([2**64 - 2], "u8")):
        got = reference.dropout_mask(*sizes, dropout_p=p, seed=seed)
        np.testing.assert_array_equal(got, expected)


def test_numbers_of_a_launch_say_the_same():
    numbers = BY_NAME["dropout"].numbers(0.3, -2)
    assert {name: type(x) for name, x in numbers.items()} == {
        "dropout_low": int,
        "dropout_high": int,
        "dropout_limit": int,
        "dropout_scale": float,
        "dropout_log2_scale": float,
    }
    assert (numbers["dropout_low"], numbers["dropout_high"]) == (-2, -1)
    assert numbers["dropout_limit"] == 19661 << 16
    assert numbers["dropout_scale"] == 65536 / (65536 - 19661)
    # As a signed number of 32 bits.
    assert BY_NAME["dropout"].numbers(0.75, 1)["dropout_limit"] == (49152 << 16) - 2**32
    assert AttentionOptions(dropout_p=0.75, seed=1).numbers()["dropout_low"] == 1


def arrays(rng, batch=2, seqlen_q=7, seqlen_k=9, heads=4, heads_kv=2, head_dim=5):
    """q, k, v and dout."""
    sizes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads)
    return [rng.standard_normal((batch, *size, head_dim)) for size in sizes]


def test_the_reference_multiplies_the_weights():
    q, k, v, _ = arrays(np.random.default_rng(0))
    options = {"causal": True, "softcap": 3.0}
    out, lse = reference.attention(q, k, v, dropout_p=0.4, seed=5, **options)
    _, same_lse = reference.attention(q, k, v, **options)
    np.testing.assert_array_equal(lse, same_lse)
    # Of an identity for V, out is P.
    eye = np.broadcast_to(np.eye(9)[None, :, None], (2, 9, 2, 9))
    p = reference.attention(q, k, eye, **options)[0].swapaxes(1, 2)
    kept = reference.dropout_mask(2, 4, 7, 9, dropout_p=0.4, seed=5)
    weights = kept / (1 - round(0.4 * 65536) / 65536)
    expected = np.einsum("bhij,bjhd->bihd", p * weights, np.repeat(v, 2, 2))
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_the_gradients_are_finite_differences():
    rng = np.random.default_rng(1)
    q, k, v, dout = arrays(rng)
    sinks = np.array([0.5, -1, 2, 0])
    given = {"q": q, "k": k, "v": v, "sinks": sinks}
    options = {"dropout_p": 0.4, "seed": 5, "causal": True, "softcap": 3.0}

    def loss(q, k, v, sinks):
        return (reference.attention(q, k, v, sinks=sinks, **options)[0] * dout).sum()

    gradients = reference.attention_backward(dout, q, k, v, sinks=sinks, **options)
    step = 1e-5
    for (name, array), gradient in zip(given.items(), gradients, strict=True):
        for _ in range(3):
            way = rng.standard_normal(array.shape)
            up, down = (loss(**{**given, name: array + h * way}) for h in (step, -step))
            assert np.isclose((up - down) / (2 * step), (gradient * way).sum(), rtol=1e-5), name
