"""Masks and scores to use and to read: `numflash.masks`.

A mask is `mask_mod(batch, head, q_idx, kv_idx, *aux)`: whether a query sees a key. A score is
`score_mod(score, batch, head, q_idx, kv_idx, *aux)`. Those that need a number are made with it;
those that need an array take it from `aux`. All of them also work on NumPy's arrays of indices, as
the examples show.
"""

import inspect
import itertools
from collections.abc import Callable

from numflash.functions.math import tanh, where

__all__ = [
    "alibi",
    "and_masks",
    "causal",
    "chunked",
    "document",
    "not_mask",
    "or_masks",
    "prefix",
    "relative_position",
    "sliding_window",
    "soft_cap",
]


def causal(batch, head, q_idx, kv_idx):
    """A query sees the keys up to its own number.

    Example:
        >>> import numpy as np, numflash
        >>> q, k = np.ogrid[:3, :3]
        >>> numflash.masks.causal(0, 0, q, k).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    return kv_idx <= q_idx


def sliding_window(left: int, right: int = 0) -> Callable:
    """A query sees `left` keys before its own number, that one, and `right` after it.

    Raises:
        TypeError, ValueError: a number of keys is no whole number, or negative.

    Example:
        >>> import numpy as np, numflash
        >>> q, k = np.ogrid[:3, :3]
        >>> numflash.masks.sliding_window(1)(0, 0, q, k).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    left, right = _whole("left", left, 0), _whole("right", right, 0)

    def mask(batch, head, q_idx, kv_idx):
        distance = kv_idx - q_idx
        return (distance >= -left) & (distance <= right)

    return mask


def prefix(length: int | None = None) -> Callable:
    """All see the first keys, as a prompt is seen; with `causal` by `or_masks` a prefix LM.

    Args:
        length: the number of keys of the prefix; None if aux has it for each batch entry, an
            integer array (batch,).

    Raises:
        TypeError, ValueError: `length` is no whole number, or negative.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash import masks
        >>> q, k = np.ogrid[:3, :3]
        >>> masks.or_masks(masks.causal, masks.prefix(2))(0, 0, q, k).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    if length is None:

        def mask_of_batch(batch, head, q_idx, kv_idx, lengths):
            return kv_idx < lengths[batch]

        return mask_of_batch
    length = _whole("length", length, 0)

    def mask(batch, head, q_idx, kv_idx):
        return kv_idx < length

    return mask


def document(batch, head, q_idx, kv_idx, documents):
    """A query sees the keys of its own document, where several are packed into a sequence.

    Args:
        documents: the number of the document of each token, (seqlen,) or (batch, seqlen).

    Example:
        >>> import numpy as np, numflash
        >>> q, k = np.ogrid[:3, :3]
        >>> documents = np.array([0, 0, 1])
        >>> numflash.masks.document(0, 0, q, k, documents).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    if documents.ndim == 2:
        return documents[batch, q_idx] == documents[batch, kv_idx]
    return documents[q_idx] == documents[kv_idx]


def chunked(size: int) -> Callable:
    """A query sees the keys of its own chunk of `size` tokens.

    Raises:
        TypeError, ValueError: `size` is no whole number, or less than 1.

    Example:
        >>> import numpy as np, numflash
        >>> q, k = np.ogrid[:3, :3]
        >>> numflash.masks.chunked(2)(0, 0, q, k).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    size = _whole("size", size, 1)

    def mask(batch, head, q_idx, kv_idx):
        return q_idx // size == kv_idx // size

    return mask


def and_masks(*masks: Callable) -> Callable:
    """A query sees what it sees by each of these masks.

    Each takes as many of the arrays of aux as it has parameters for, one mask after another.

    Raises:
        TypeError: no mask is given, or one is no function.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash import masks
        >>> q, k = np.ogrid[:3, :3]
        >>> mask = masks.and_masks(masks.causal, masks.document)
        >>> mask(0, 0, q, k, np.array([0, 0, 1])).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    return _together(masks, False)


def or_masks(*masks: Callable) -> Callable:
    """A query sees what it sees by any of these masks.

    Each takes as many of the arrays of aux as it has parameters for, one mask after another.

    Raises:
        TypeError: no mask is given, or one is no function.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash import masks
        >>> q, k = np.ogrid[:3, :3]
        >>> mask = masks.or_masks(masks.causal, masks.chunked(2))
        >>> mask(0, 0, q, k).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return _together(masks, True)


def not_mask(mask: Callable) -> Callable:
    """A query sees what it does not see by this mask.

    Raises:
        TypeError: the mask is no function.

    Example:
        >>> import numpy as np, numflash
        >>> from numflash import masks
        >>> q, k = np.ogrid[:3, :3]
        >>> masks.not_mask(masks.causal)(0, 0, q, k).astype(int).tolist()
        [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    """
    _aux_of(mask)

    def inverted(batch, head, q_idx, kv_idx, *aux):
        return ~_as_truth(mask(batch, head, q_idx, kv_idx, *aux))

    inverted.__signature__ = inspect.signature(mask)
    return inverted


def alibi(score, batch, head, q_idx, kv_idx, slopes):
    """score - slopes[head] * |q_idx - kv_idx|.

    Args:
        slopes: of each query head, (heads,), or of each batch entry's, (batch, heads).

    Example:
        >>> import numpy as np, numflash
        >>> slopes = np.array([0.5, 0.25])
        >>> float(numflash.masks.alibi(0.0, 0, 1, 5, 2, slopes))
        -0.75
    """
    slope = slopes[batch, head] if slopes.ndim == 2 else slopes[head]
    return score - slope * abs(q_idx - kv_idx)


def relative_position(
    num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Callable:
    """T5's relative position: a score plus a number that a head has learned for the distance.

    Distances share buckets: small ones have their own, larger ones are put together by their
    logarithm, and from `max_distance` on all are alike. Where each begins is computed here,
    exactly, so that kernels compare whole numbers.

    Args:
        num_buckets: rows of the table, which is an array (num_buckets, heads) of aux.
        max_distance: distances from it on share the last bucket.
        bidirectional: keys after the query have half of the buckets; else they are as distance 0.

    Raises:
        TypeError, ValueError: a number is no whole number, or the buckets cannot be divided so.

    Example:
        >>> import numpy as np, numflash
        >>> table = np.arange(32.0)[:, None]
        >>> score_mod = numflash.masks.relative_position()
        >>> [float(score_mod(0.0, 0, 0, 20, k, table)) for k in (20, 15, 0, 21)]
        [0.0, 5.0, 10.0, 17.0]
    """
    num_buckets = _whole("num_buckets", num_buckets, 2)
    max_distance = _whole("max_distance", max_distance, 2)
    if bidirectional and num_buckets % 2:
        raise ValueError(f"num_buckets must be even if keys have two sides, got {num_buckets}")
    one_side = num_buckets // 2 if bidirectional else num_buckets
    exact = one_side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"max_distance must be above {exact}, the distances with buckets of their own, of "
            f"which there is at least one, got {max_distance} and num_buckets {num_buckets}"
        )
    firsts = tuple(_first_distances(exact, one_side - exact, max_distance))

    def score_mod(score, batch, head, q_idx, kv_idx, table):
        distance = kv_idx - q_idx
        size = abs(distance) if bidirectional else where(distance < 0, -distance, 0)
        bucket = where(size < exact, size, exact)
        for first in firsts:
            bucket = bucket + where(size >= first, 1, 0)
        if bidirectional:
            bucket = bucket + where(distance > 0, one_side, 0)
        return score + table[bucket, head]

    return score_mod


def _first_distances(exact: int, shared: int, max_distance: int):
    """The smallest distance of each shared bucket but the first.

    That of bucket `exact` + t is the least n with log(n / exact) / log(max_distance / exact) >=
    t / shared, to which both sides are raised in whole numbers.
    """
    for t in range(1, shared):
        bound = max_distance**t * exact ** (shared - t)
        yield next(n for n in itertools.count(exact) if n**shared >= bound)


def soft_cap(cap: float) -> Callable:
    """cap * tanh(score / cap): scores stay between -cap and cap.

    Raises:
        ValueError: `cap` is not above 0.

    Example:
        >>> import numflash
        >>> float(numflash.masks.soft_cap(20.0)(0.0, 0, 0, 0, 0))
        0.0
    """
    cap = float(cap)
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")

    def score_mod(score, batch, head, q_idx, kv_idx):
        return cap * tanh(score / cap)

    return score_mod


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    value = value.__index__()
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _as_truth(x):
    """A mask's value, for & | and ~, which mean something else for Python's True and False."""
    return where(True, x, x) if isinstance(x, bool) else x


def _together(masks: tuple[Callable, ...], any_of_them: bool) -> Callable:
    if not masks:
        raise TypeError("at least one mask is needed, got none")
    counts = tuple(map(_aux_of, masks))

    def mask(batch, head, q_idx, kv_idx, *aux):
        kept, first = None, 0
        for function, count in zip(masks, counts, strict=True):
            end = len(aux) if count is None else first + count
            seen = _as_truth(function(batch, head, q_idx, kv_idx, *aux[first:end]))
            kept = seen if kept is None else kept | seen if any_of_them else kept & seen
            first = end
        return kept

    kinds = inspect.Parameter
    names = [f"aux{n}" for n in range(sum(count or 0 for count in counts))]
    parameters = [
        kinds(name, kinds.POSITIONAL_ONLY) for name in ("batch", "head", "q_idx", "kv_idx", *names)
    ]
    if None in counts:
        parameters.append(kinds("aux", kinds.VAR_POSITIONAL))
    mask.__signature__ = inspect.Signature(parameters)
    return mask


def _aux_of(mask: Callable) -> int | None:
    """The number of arrays that a mask takes; None if it takes any number."""
    if not callable(mask):
        raise TypeError(f"a mask must be a function, got {type(mask).__name__}")
    parameters = inspect.signature(mask).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    if len(positional) < 4 or (len(needed) < 4 and len(needed) != len(positional)):
        raise TypeError(
            f"a mask takes (batch, head, q_idx, kv_idx, *aux), got {inspect.signature(mask)}"
        )
    return len(needed) - 4
