"""The library of masks and scores, on NumPy's indices and as programs."""

import math

import numpy as np
import pytest

from numflash import masks
from numflash.functions.trace import trace
from tests.support.program_values import metadata, value

N = 24
PLACES = dict(zip("bhij", np.ogrid[:2, :3, :N, :N], strict=True))
B, H, Q, K = PLACES.values()
DOCUMENTS = np.repeat([0, 1, 2], [9, 1, 14]).astype(np.int32)
OF_BATCH = np.stack([DOCUMENTS, np.roll(DOCUMENTS, 5)])
LENGTHS = np.array([3, 7], np.int32)


def ALL(b, h, q, k):
    return True


def NONE(b, h, q, k):
    return False


MASKS = {
    "causal": (masks.causal, (), K <= Q),
    "sliding window": (masks.sliding_window(4), (), (K <= Q) & (Q - K <= 4)),
    "window of two sides": (masks.sliding_window(4, 2), (), (K - Q <= 2) & (Q - K <= 4)),
    "prefix": (masks.prefix(5), (), K < 5),
    "prefix of each batch entry": (masks.prefix(), (LENGTHS,), LENGTHS[B] > K),
    "documents": (masks.document, (DOCUMENTS,), DOCUMENTS[Q] == DOCUMENTS[K]),
    "documents of each batch entry": (
        masks.document,
        (OF_BATCH,),
        OF_BATCH[B, Q] == OF_BATCH[B, K],
    ),
    "chunked": (masks.chunked(7), (), Q // 7 == K // 7),
    "and": (
        masks.and_masks(masks.causal, masks.document, masks.prefix()),
        (DOCUMENTS, LENGTHS),
        (K <= Q) & (DOCUMENTS[Q] == DOCUMENTS[K]) & (LENGTHS[B] > K),
    ),
    "or": (masks.or_masks(masks.causal, masks.prefix(5)), (), (K <= Q) | (K < 5)),
    "not": (masks.not_mask(masks.document), (DOCUMENTS,), DOCUMENTS[Q] != DOCUMENTS[K]),
    "of constants": (
        masks.or_masks(
            lambda b, h, q, k: False, masks.not_mask(lambda b, h, q, k: True), masks.causal
        ),
        (),
        K <= Q,
    ),
    "of one that takes any": (
        masks.and_masks(masks.causal, lambda b, h, q, k, *aux: aux[0][k] > 0),
        (DOCUMENTS,),
        (K <= Q) & (DOCUMENTS[K] > 0),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask(name):
    function, aux, expected = MASKS[name]
    shape = (2, 3, N, N)
    np.testing.assert_array_equal(
        np.broadcast_to(function(B, H, Q, K, *aux), shape), np.broadcast_to(expected, shape)
    )
    program = trace(None, function, tuple(map(metadata, aux))).program
    got = value(program.keep, PLACES, aux)
    np.testing.assert_array_equal(np.broadcast_to(got, shape), np.broadcast_to(expected, shape))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 20), (8, 1000), (64, 65)])
def test_the_buckets_of_t5(bidirectional, buckets, distance):
    """As transformers' T5Attention._relative_position_bucket, in float64."""
    q, k = np.ogrid[:300, :300]
    relative, one_side = k - q, buckets
    expected = np.zeros_like(relative)
    if bidirectional:
        one_side //= 2
        expected = (relative > 0) * one_side
        relative = np.abs(relative)
    else:
        relative = -np.minimum(relative, 0)
    exact = one_side // 2
    with np.errstate(divide="ignore"):
        # Where the logarithms' quotient is whole, float64 may be just below.
        large = np.log(relative / exact) / math.log(distance / exact) * (one_side - exact) + 1e-9
    large = np.minimum(exact + np.maximum(large, 0).astype(int), one_side - 1)
    expected = expected + np.where(relative < exact, relative, large)
    table = np.arange(float(buckets))[:, None]
    score_mod = masks.relative_position(buckets, distance, bidirectional)
    np.testing.assert_array_equal(score_mod(0.0, 0, 0, q, k, table), expected)


def test_scores():
    slopes, s = np.array([0.5, 0.25, 1.0]), np.linspace(-9, 9, N)
    np.testing.assert_allclose(masks.alibi(s, B, H, Q, K, slopes), s - slopes[H] * np.abs(Q - K))
    of_batch = np.stack([slopes, 2 * slopes])
    np.testing.assert_allclose(
        masks.alibi(s, B, H, Q, K, of_batch), s - of_batch[B, H] * np.abs(Q - K)
    )
    np.testing.assert_allclose(masks.soft_cap(3)(s, 0, 0, 0, 0), 3 * np.tanh(s / 3))


@pytest.mark.parametrize(
    "make, error, rule",
    [
        (lambda: masks.sliding_window(-1), ValueError, "left must be at least 0, got -1"),
        (lambda: masks.sliding_window(2.5), TypeError, "left must be a whole number, got 2.5"),
        (lambda: masks.sliding_window(1, True), TypeError, "right must be a whole number"),
        (lambda: masks.prefix(-1), ValueError, "length must be at least 0"),
        (lambda: masks.chunked(0), ValueError, "size must be at least 1, got 0"),
        (lambda: masks.soft_cap(0), ValueError, "cap must be above 0, got 0.0"),
        (lambda: masks.soft_cap(math.nan), ValueError, "cap must be above 0, got nan"),
        (lambda: masks.relative_position(33), ValueError, "num_buckets must be even"),
        (lambda: masks.relative_position(32, 8), ValueError, "max_distance must be above 8"),
        (lambda: masks.relative_position(2, 8), ValueError, "at least one"),
        (masks.and_masks, TypeError, "at least one mask"),
        (lambda: masks.or_masks(masks.causal, 3), TypeError, "must be a function, got int"),
        (lambda: masks.and_masks(lambda q, k: q > k), TypeError, "a mask takes .*got .q, k."),
        (lambda: masks.not_mask("causal"), TypeError, "must be a function, got str"),
    ],
)
def test_numbers_that_make_no_mask(make, error, rule):
    with pytest.raises(error, match=rule):
        make()


def test_masks_put_together_take_exactly_their_arrays():
    both = masks.and_masks(masks.causal, masks.document)
    with pytest.raises(TypeError, match=r"takes \(batch, head, q_idx, kv_idx, aux0, /\)"):
        trace(None, both, ())
    with pytest.raises(TypeError, match="is called with"):
        trace(None, both, (metadata(DOCUMENTS),) * 2)
