"""Products and sums of arrays in any precision, and their axes in order."""

import numpy as np


def dtype_of_sums(dtype):
    """Sums and products accumulate in at least float32, as tensor cores and BLAS do."""
    return np.float64 if dtype == np.float64 else np.float32


def multiplication(precision: str):
    """matmul(a, b, dtype): the product in this precision, rounded to dtype."""
    return _matmul_tf32 if precision == "tf32" else _matmul


def _matmul(a, b, dtype):
    a, b = a.astype(dtype_of_sums(dtype)), b.astype(dtype_of_sums(dtype))
    if dtype != np.float32:
        return np.matmul(a, b).astype(dtype)
    # Naive means term after term; a BLAS sums in a different, more exact order.
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    for k in range(a.shape[-1]):
        total += a[..., k, None] * b[..., None, k, :]
    return total


def _matmul_tf32(a, b, dtype):
    return np.matmul(_rounded_to_tf32(a), _rounded_to_tf32(b)).astype(dtype)


def _rounded_to_tf32(x) -> np.ndarray:
    """float32 with 10 bits after the point, ties away from zero; as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = np.where(np.isfinite(x), bits + np.uint32(0x1000), bits) & np.uint32(0xFFFFE000)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def repeat(x, group):
    """(batch, heads, ...) with each head `group` times."""
    return np.repeat(x, group, axis=1)


def sum_groups(x, group, dtype):
    """(batch, heads // group, ...): the sums over each `group` heads."""
    batch, heads, seqlen, head_dim = x.shape
    grouped = x.reshape(batch, heads // group, group, seqlen, head_dim)
    return grouped.sum(2, dtype=dtype_of_sums(dtype)).astype(dtype)


def heads_first(x, bhsd: bool) -> np.ndarray:
    """(batch, heads, seqlen, head_dim) of an array with two to four dimensions."""
    x = np.asarray(x)
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        x = x[None]
    return x if bhsd else x.swapaxes(1, 2)


def heads_back(x, bhsd: bool, ndim: int) -> np.ndarray:
    """The inverse of `heads_first`."""
    if ndim == 2:
        return x[0, 0]
    x = x if bhsd else x.swapaxes(1, 2)
    return x[0] if ndim == 3 else x
