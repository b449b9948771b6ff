"""Attention and its gradients, in float64 and naively in lower precisions.

Float64, the whole score matrix at once, one line of code per line of mathematics. `naive` is the
same computation the way a straightforward program does it in a lower precision: each kernel's
error budget is twice the error of `naive` in the kernel's input precision.

All functions take NumPy arrays of shape (batch, seqlen, heads, head_dim), or what `layout` says,
with any number of key-value heads that divides the query heads.
"""

import ml_dtypes
import numpy as np

from numflash.reference.arrays import (
    dtype_of_sums,
    heads_back,
    heads_first,
    multiplication,
    repeat,
    sum_groups,
)
from numflash.reference.gradients import (
    gradients_of_arrays,
    gradients_of_heads,
    names_of_gradients,
    slope_of_scores,
)
from numflash.reference.scores import end_of_rows, scores, weights_of

_PRECISIONS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "tf32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def attention(q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
    """O = softmax(softmax_scale Q K^T) V in float64.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        options: as for `numflash.attention`: softmax_scale, causal, causal_align, shift,
            window_size, softcap, alibi_slopes, sinks, origin, bias, mask, score_mod, mask_mod,
            aux, layout. Functions get NumPy arrays that broadcast to the scores. `entry` is the
            number that dropout and functions see of the first batch entry.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), in the layout of q.
        lse: (batch, num_heads_q, seqlen_q), without the axes that q does not have: natural
            log-sum-exp of the scores. A query that sees no key has out 0 and lse -inf.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> out, lse = reference.attention(q, k, v, causal=True)
        >>> bool(np.allclose(out[:, 0], v[:, 0]))  # the first query sees the first key only
        True
    """
    return naive(q, k, v, precision="float64", **options)


def attention_backward(dout, q, k, v, **options):
    """The gradients of `attention`, in float64.

    Args:
        dout: gradient of the output, shaped like it.
        q, k, v, options: as for `attention`; and `dlse` and `wrt` as for
            `numflash.attention_backward`.

    Returns:
        A tuple of gradients, as `numflash.attention_backward` returns them.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> dq, dk, dv = reference.attention_backward(np.ones_like(q), q, k, v)
        >>> bool(np.allclose(dv.sum(1), 32))  # each query's weights sum to 1
        True
    """
    return naive_backward(dout, q, k, v, precision="float64", **options)


def naive(q, k, v, *, precision: str, **options) -> tuple[np.ndarray, np.ndarray]:
    """`attention` computed step by step in `precision`, every intermediate rounded to it.

    "tf32" rounds the operands of each product, and keeps everything else in float32.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> exact, _ = reference.attention(q, k, v)
        >>> rounded, _ = reference.naive(q, k, v, precision="float16")
        >>> bool(0 < abs(rounded - exact).max() < 0.01)
        True
    """
    dtype, matmul = _PRECISIONS[precision], multiplication(precision)
    bhsd = options.get("layout", "bshd") == "bhsd"
    arrays = (heads_first(x, bhsd) for x in (q, k, v))
    out, lse, *_ = _forward(*arrays, dtype, matmul, options)
    ndim = np.ndim(q)
    return heads_back(out, bhsd, ndim), lse.reshape(lse.shape[4 - ndim :])


def naive_backward(dout, q, k, v, *, precision: str, **options):
    """`attention_backward` computed step by step in `precision`.

    As `numflash.attention_backward` does, it starts from lse, in no less than float32.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> dq, dk, dv = reference.naive_backward(q, q, k, v, precision="bfloat16")
        >>> dq.shape == q.shape
        True
    """
    dtype, matmul = _PRECISIONS[precision], multiplication(precision)
    bhsd = options.get("layout", "bshd") == "bhsd"
    do, q4, k4, v4 = (heads_first(x, bhsd) for x in (dout, q, k, v))
    out, lse, s, slopes, scale, weights = _forward(q4, k4, v4, dtype, matmul, options)
    group = q4.shape[1] // k4.shape[1]
    do = do.astype(dtype)
    with np.errstate(invalid="ignore"):
        p = np.exp(s - lse[..., None]).astype(dtype)
    p = np.where(np.isneginf(s), dtype.type(0), p)
    # A function may bend without bound where P is 0.
    slopes = {name: np.where(p == 0, dtype.type(0), slope) for name, slope in slopes.items()}

    dv = matmul((p * weights).swapaxes(-1, -2), do, dtype)
    dp = matmul(do, repeat(v4.astype(dtype), group).swapaxes(-1, -2), dtype) * weights
    product = (do * out).sum(-1, dtype=dtype_of_sums(dtype)) - _dlse(lse, options)
    of_scores = p * (dp - product.astype(dtype)[..., None])
    ds = of_scores * slope_of_scores(slopes)
    dq = matmul(ds, repeat(k4.astype(dtype), group), dtype) * scale
    dk = matmul(ds.swapaxes(-1, -2), q4.astype(dtype), dtype) * scale
    gradients = {"q": dq, "k": sum_groups(dk, group, dtype), "v": sum_groups(dv, group, dtype)}
    found = {name: heads_back(g, bhsd, np.ndim(q)) for name, g in gradients.items()}
    found |= gradients_of_heads(lse, product, of_scores, slopes, options)
    operands = q4, k4, dtype, matmul
    found |= gradients_of_arrays(operands, np.where(p == 0, 0, of_scores), slopes, options)
    return tuple(found[name] for name in names_of_gradients(options))


def magnitudes(q, k, v, dout=None, **options) -> dict[str, np.ndarray]:
    """The sums behind each result, taken without signs, in float64.

    Rounding is relative to these, not to the results, in which much may cancel: a query that sees
    one key has dS = P * (dP - delta) = 0.

    Args:
        q, k, v, dout, options: as for `attention` and `attention_backward`.

    Returns:
        "out" and "lse", with dout also the gradients, as in "dq": shaped like the results with
        (batch, heads, seqlen, ...), whatever the layout.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> out, _ = reference.attention(q, k, v)
        >>> found = reference.magnitudes(q, k, v)
        >>> bool((found["out"] >= abs(out.transpose(0, 2, 1, 3)) - 1e-12).all())
        True
    """
    bhsd = options.get("layout", "bshd") == "bhsd"
    q, k, v = (heads_first(x, bhsd).astype(np.float64) for x in (q, k, v))
    float64, matmul = np.dtype(np.float64), multiplication("float64")
    out, lse, s, slopes, scale, weights = _forward(q, k, v, float64, matmul, options)
    wanted, group = names_of_gradients(options), q.shape[1] // k.shape[1]
    k_abs, v_abs = (repeat(np.abs(x), group) for x in (k, v))
    with np.errstate(invalid="ignore"):
        p = np.where(np.isneginf(s), 0, np.exp(s - lse[..., None]))
    slopes = {name: np.where(p == 0, 0, np.abs(slope)) for name, slope in slopes.items()}
    products = np.abs(q) @ k_abs.swapaxes(-1, -2) * abs(scale)
    products = np.where(np.isneginf(s), 0, products)
    found = {"out": (p * weights) @ v_abs, "lse": products.max(-1, initial=0)}
    if dout is None:
        return found
    do = heads_first(dout, bhsd).astype(np.float64)
    product = np.abs(do * out).sum(-1) + np.abs(_dlse(lse, options))
    dp = np.abs(do) @ v_abs.swapaxes(-1, -2) * weights
    of_scores = p * (dp + product[..., None])
    ds = of_scores * slope_of_scores(slopes) * abs(scale)
    found["dq"] = ds @ k_abs
    found["dk"] = sum_groups(ds.swapaxes(-1, -2) @ np.abs(q), group, np.float64)
    found["dv"] = sum_groups((p * weights).swapaxes(-1, -2) @ np.abs(do), group, np.float64)
    of_heads = gradients_of_heads(lse, product, of_scores, slopes, options)
    operands = q, k, float64, matmul
    of_arrays = gradients_of_arrays(operands, of_scores, slopes, options, np.abs)
    found |= {f"d{name}": np.abs(g) for name, g in (of_heads | of_arrays).items()}
    return {n: x for n, x in found.items() if n in ("out", "lse") or n[1:] in wanted}


def _forward(q, k, v, dtype, matmul, options):
    """Attention on (batch, heads, seqlen, head_dim); also S, its slopes, scale, weights of P."""
    s, slopes, scale = scores(q, k, dtype, matmul, options)
    with np.errstate(divide="ignore", invalid="ignore"):
        row_max = s.max(-1, keepdims=True, initial=dtype.type(-np.inf))
        # -inf - -inf is NaN: rows that see no key subtract 0 instead.
        e = np.exp(s - np.where(np.isneginf(row_max), dtype.type(0), row_max))
        row_sum = e.sum(-1, keepdims=True, dtype=dtype_of_sums(dtype)).astype(dtype)
        exact_sum = e.sum(-1, keepdims=True, dtype=dtype_of_sums(dtype))
        _, row_sum, kept = end_of_rows(row_max, row_sum, options)
        p = np.where(row_sum == 0, dtype.type(0), e * kept / row_sum)
        exact_max = row_max.astype(dtype_of_sums(dtype))
        exact_max, exact_sum, _ = end_of_rows(exact_max, exact_sum, options)
        lse = (exact_max + np.log(exact_sum))[..., 0]
    weights = weights_of(s.shape, dtype, options)
    out = matmul(p * weights, repeat(v.astype(dtype), q.shape[1] // v.shape[1]), dtype)
    return out, lse, s, slopes, scale, weights


def _dlse(lse, options):
    """The gradient of lse, (batch, head, query); 0 where that is a constant, or none is given."""
    dlse = options.get("dlse")
    dlse = np.asarray(0 if dlse is None else dlse, lse.dtype)
    if dlse.ndim:
        dlse = dlse.reshape(lse.shape)
    return np.where(np.isneginf(lse), lse.dtype.type(0), dlse)
