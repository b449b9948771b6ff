"""Scores, what features and the caller's functions make of them, and the keys that queries see.

Arrays are (batch, heads, seqlen, head_dim), scores and weights (batch, head, query, key).
"""

from typing import Any

import numpy as np

from numflash.configs.features import FEATURES, Feature
from numflash.functions.plain import on_arrays
from numflash.reference.arrays import repeat

NEAR = 1e-6
"""Half the length of the line through a function that gives its slope."""


def scores(q, k, dtype, matmul, options):
    """S from (batch, heads, seqlen, head_dim), -inf where masked; its slopes; the scale.

    The slopes are by feature, in order: the derivative of its score by the one that it gets.
    """
    _, num_heads, seqlen_q, head_dim = q.shape
    seqlen_k, group = k.shape[2], num_heads // k.shape[1]
    align = options.get("causal_align", "bottom_right"), options.get("shift", 0)
    scale = options.get("softmax_scale")
    scale = dtype.type(head_dim**-0.5 if scale is None else scale)

    s = matmul(q.astype(dtype), repeat(k.astype(dtype), group).swapaxes(-1, -2), dtype) * scale
    slopes, places = {}, places_of(seqlen_q, seqlen_k, options)
    for row, value in asked(options, num_heads):
        if row.hook == "score":
            s, slopes[row.name] = row.reference(s, value, *places)
    seen = visible(
        seqlen_q,
        seqlen_k,
        options.get("causal", False),
        align[0],
        options.get("window_size", (-1, -1)),
        shift=align[1],
    )
    s, more, kept = _given_scores(s, options)
    return np.where(seen & kept, s, dtype.type(-np.inf)), slopes | {"given": more}, scale


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    causal_align: str = "bottom_right",
    window_size=(-1, -1),
    shift: int = 0,
) -> np.ndarray:
    """A boolean (seqlen_q, seqlen_k) array of the keys (columns) that each query (row) sees.

    Example:
        >>> from numflash import reference
        >>> reference.visible(2, 3, causal=True).astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    i = np.arange(seqlen_q)[:, None] + _alignment(seqlen_q, seqlen_k, causal_align, shift)
    j = np.arange(seqlen_k)[None, :]
    left, right = window_size
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if causal:
        seen &= j <= i
    if left is not None and left >= 0:
        seen &= j >= i - left
    if right is not None and right >= 0:
        seen &= j <= i + right
    return seen


def _given_scores(s, options):
    """Scores with the caller's bias, masks and functions: (scores, their slope, which are kept).

    The slope of a function is that of a short line through it, in float64.
    """
    slope, kept = s.dtype.type(1), np.ones((), bool)
    axes = numbers_of(s.shape, options)
    aux = [np.asarray(x) for x in options.get("aux") or ()]
    if options.get("bias") is not None:
        s = s + _part(options["bias"], axes).astype(s.dtype)
    score_mod, mask_mod = options.get("score_mod"), options.get("mask_mod")
    of_both = score_mod is not None and mask_mod is not None
    if score_mod is not None:
        exact = s.astype(np.float64)
        with np.errstate(all="ignore"):
            near = (exact + x for x in (-NEAR, NEAR))
            low, high = (on_arrays(score_mod, (x, *axes), aux, of_both) for x in near)
            slope = ((high - low) / (2 * NEAR)).astype(s.dtype)
            new = on_arrays(score_mod, (s, *axes), aux, of_both)
            s = np.broadcast_to(new, s.shape).astype(s.dtype)
    if options.get("mask") is not None:
        kept = kept & _part(options["mask"], axes)
    if mask_mod is not None:
        kept = kept & on_arrays(mask_mod, axes, aux, of_both)
    return s, slope, kept


def end_of_rows(row_max, row_sum, options):
    """(row_max, row_sum, kept): with what features join to rows, all (batch, head, query, 1).

    Exponentials relative to row_max, as they were, must be multiplied by `kept`.
    """
    kept = row_max.dtype.type(1)
    for row, value in asked(options, row_max.shape[1]):
        if row.hook == "finish":
            row_max, row_sum, more = row.reference(row_max, row_sum, value)
            kept = kept * more
    return row_max, row_sum, kept


def weights_of(shape, dtype, options):
    """The factors of P (batch, head, query, key), once its rows have their sums."""
    weights, origin = np.ones((), dtype), options.get("origin") or (0, 0, 0)
    entry = options.get("entry", 0)
    for row in FEATURES:
        value = options.get(row.option, row.default)
        if row.hook == "weigh" and row.is_asked(value):
            beside = (options.get(each.name, each.default) for each in row.beside)
            of_all = row.reference((entry + shape[0], *shape[1:]), origin, value, *beside)
            weights = weights * of_all[entry:].astype(dtype)
    return weights


def dropout_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    dropout_p: float,
    seed: int,
    origin: tuple[int, int, int] = (0, 0, 0),
) -> np.ndarray:
    """The scores that dropout keeps, a boolean (batch, heads, seqlen_q, seqlen_k) array.

    Args:
        batch, heads, seqlen_q, seqlen_k: sizes; heads are those of q.
        dropout_p, seed, origin: as for `numflash.attention`; a seed in an array must be on the
            host.

    The random bits of a score are those of Philox4x32-10 for the seed and the score's place alone:
    the same in every kernel, for every tile size, on every GPU, forward and backward. A score is
    kept if its 16 bits are at least round(2**16 dropout_p); the weights of those kept are
    multiplied by 1 / (1 - round(2**16 dropout_p) / 2**16).

    Example:
        >>> from numflash import reference
        >>> kept = reference.dropout_mask(1, 2, 64, 64, dropout_p=0.25, seed=1)
        >>> kept.shape, round(float(kept.mean()), 2)
        ((1, 2, 64, 64), 0.75)
    """
    shape = batch, heads, seqlen_q, seqlen_k
    options = {"dropout_p": dropout_p, "seed": seed, "origin": origin}
    return np.broadcast_to(weights_of(shape, np.float64, options) != 0, shape)


def asked(options: dict, num_heads: int) -> list[tuple[Feature, Any]]:
    """The features that are asked for, with their values: of arrays those of this part."""
    found, (_, _, first) = [], options.get("origin") or (0, 0, 0)
    for row in FEATURES:
        value = options.get(row.option, row.default)
        if row.is_asked(value):
            value = np.asarray(value)[..., first : first + num_heads] if row.is_array else value
            found.append((row, value))
    return found


def numbers_of(shape, options) -> tuple[np.ndarray, ...]:
    """The numbers of batch entries, heads, queries and keys that features see, as axes."""
    row, column, head = options.get("origin") or (0, 0, 0)
    starts = options.get("entry", 0), head, row, column
    return np.ix_(*(first + np.arange(n) for first, n in zip(starts, shape, strict=True)))


def _part(array, axes) -> np.ndarray:
    """Of an array that broadcasts to the scores of a larger problem those at these places."""
    array = np.asarray(array)
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return array[tuple(0 * at if n == 1 else at for n, at in zip(array.shape, axes, strict=True))]


def places_of(seqlen_q: int, seqlen_k: int, options):
    """The keys at which queries stand, (query, 1), and the keys."""
    align = options.get("causal_align", "bottom_right"), options.get("shift", 0)
    i = np.arange(seqlen_q)[:, None] + _alignment(seqlen_q, seqlen_k, *align)
    return i, np.arange(seqlen_k)


def _alignment(seqlen_q: int, seqlen_k: int, causal_align: str, shift: int) -> int:
    """The offset from a query's index to the key at its position."""
    return shift + (seqlen_k - seqlen_q if causal_align == "bottom_right" else 0)
