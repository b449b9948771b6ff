"""Packed arrays with gaps between sequences: what is not a sequence's own is NaN."""

import ml_dtypes
import numpy as np


def starts(lengths, gap: int) -> tuple[np.ndarray, int]:
    """The first row of each sequence, with `gap` rows before each, and the number of rows."""
    ends = np.cumsum([n + gap for n in lengths])
    return np.array(ends - np.array(lengths), np.int32), int(ends[-1]) + gap


def gapped_arrays(lengths, bad: int, heads, head_dims, dtype: str, seed: int = 0):
    """(q, k, v, dout), and where their sequences of queries and of keys begin.

    Args:
        lengths: (queries, keys) of each sequence.
        bad: the number of a sequence that is NaN, too.
        heads: of queries and of keys.
        head_dims: of q and k, and of v.
        dtype: of all.
        seed: of the numbers in the other sequences.
    """
    rng, dtype = np.random.default_rng(seed), np.dtype(getattr(ml_dtypes, dtype, dtype))
    of_q, of_k = zip(*lengths, strict=True)
    (first_q, rows_q), (first_k, rows_k) = starts(of_q, 1), starts(of_k, 3)
    arrays = []
    for rows, first, sizes, count, columns in (
        (rows_q, first_q, of_q, heads[0], head_dims[0]),
        (rows_k, first_k, of_k, heads[1], head_dims[0]),
        (rows_k, first_k, of_k, heads[1], head_dims[1]),
        (rows_q, first_q, of_q, heads[0], head_dims[1]),
    ):
        x = np.full((rows, count, columns), np.nan, dtype)
        for number, (start, n) in enumerate(zip(first, sizes, strict=True)):
            if number != bad:
                x[start : start + n] = rng.standard_normal((n, count, columns))
        arrays.append(x)
    return arrays, first_q, first_k
