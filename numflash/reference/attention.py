"""Attention and its gradients, in float64 and naively in lower precisions.

Float64, the whole score matrix at once, one line of code per line of mathematics. `naive` is the
same computation the way a straightforward program does it in a lower precision: each kernel's
error budget is twice the error of `naive` in the kernel's input precision.

All functions take NumPy arrays of shape (batch, seqlen, heads, head_dim), or what `layout` says,
with any number of key-value heads that divides the query heads.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

from numflash.configs.features import FEATURES, Feature, default_gradients
from numflash.functions.plain import on_arrays

# Half the length of the line through a function that gives its slope.
_NEAR = 1e-6

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
            aux, layout. Functions get NumPy arrays that broadcast to the scores.

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
    dtype, matmul = _PRECISIONS[precision], _multiplication(precision)
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
    dtype, matmul = _PRECISIONS[precision], _multiplication(precision)
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
    product = (do * out).sum(-1, dtype=_sums(dtype)) - _dlse(lse, options)
    of_scores = p * (dp - product.astype(dtype)[..., None])
    ds = of_scores * _product(slopes)
    dq = matmul(ds, repeat(k4.astype(dtype), group), dtype) * scale
    dk = matmul(ds.swapaxes(-1, -2), q4.astype(dtype), dtype) * scale
    gradients = {"q": dq, "k": _sum_groups(dk, group, dtype), "v": _sum_groups(dv, group, dtype)}
    found = {name: heads_back(g, bhsd, np.ndim(q)) for name, g in gradients.items()}
    found |= _gradients_of_heads(lse, product, of_scores, slopes, options)
    operands = q4, k4, dtype, matmul
    found |= _gradients_of_arrays(operands, np.where(p == 0, 0, of_scores), slopes, options)
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
    float64 = np.dtype(np.float64)
    out, lse, s, slopes, scale, weights = _forward(q, k, v, float64, _matmul, options)
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
    ds = of_scores * _product(slopes) * abs(scale)
    found["dq"] = ds @ k_abs
    found["dk"] = _sum_groups(ds.swapaxes(-1, -2) @ np.abs(q), group, np.float64)
    found["dv"] = _sum_groups((p * weights).swapaxes(-1, -2) @ np.abs(do), group, np.float64)
    of_heads = _gradients_of_heads(lse, product, of_scores, slopes, options)
    operands = q, k, np.dtype(np.float64), _matmul
    of_arrays = _gradients_of_arrays(operands, of_scores, slopes, options, np.abs)
    found |= {f"d{name}": np.abs(g) for name, g in (of_heads | of_arrays).items()}
    return {n: x for n, x in found.items() if n in ("out", "lse") or n[1:] in wanted}


def _asked(options: dict, num_heads: int) -> list[tuple[Feature, Any]]:
    """The features that are asked for, with their values: of arrays those of this part."""
    found, (_, _, first) = [], options.get("origin") or (0, 0, 0)
    for row in FEATURES:
        value = options.get(row.option, row.default)
        if row.is_asked(value):
            value = np.asarray(value)[..., first : first + num_heads] if row.is_array else value
            found.append((row, value))
    return found


def names_of_gradients(options: dict) -> tuple[str, ...]:
    """What `attention_backward` returns gradients of with these options, in order."""
    asked = (row for row in FEATURES if row.is_asked(options.get(row.option, row.default)))
    return options.get("wrt") or default_gradients(tuple(row.name for row in asked))


def _dlse(lse, options):
    """The gradient of lse, (batch, head, query); 0 where that is a constant, or none is given."""
    dlse = options.get("dlse")
    dlse = np.asarray(0 if dlse is None else dlse, lse.dtype)
    if dlse.ndim:
        dlse = dlse.reshape(lse.shape)
    return np.where(np.isneginf(lse), lse.dtype.type(0), dlse)


def _product(slopes: dict[str, np.ndarray]):
    """The derivative of scores by scaled products, from those of one feature by another."""
    return math.prod(slopes.values())


def _gradients_of_heads(lse, product, of_scores, slopes, options) -> dict[str, np.ndarray]:
    """By name, as in "sinks": the gradients of options that heads have.

    `lse`, and `product`, that of dO and O less the gradient of lse, are (batch, head, query);
    `of_scores` is the gradient of the final scores, (batch, head, query, key).
    """
    found, places = {}, _places(*of_scores.shape[2:], options)
    for row, value in _asked(options, lse.shape[1]):
        if row.gradient is None:
            continue
        if row.hook == "finish":
            shares = row.gradient.shares(lse, product, value)
        else:
            names = list(slopes)
            later = {name: slopes[name] for name in names[names.index(row.name) + 1 :]}
            of_this = of_scores.astype(lse.dtype) * _product(later)
            shares = row.gradient.shares(of_this, *places)
        batches = 0 if np.ndim(value) == 1 else ()
        whole = np.zeros(np.shape(options[row.option]), lse.dtype)
        first = (options.get("origin") or (0, 0, 0))[2]
        part = shares.sum(-1, dtype=lse.dtype).sum(batches)
        whole[..., first : first + lse.shape[1]] = part
        found[row.option] = whole
    return found


class _Probe:
    """An array of `aux` whose read `number`, of those that a function makes, is larger by `step`.

    Attributes:
        count: reads so far.
        index: of that read.
    """

    def __init__(self, array: np.ndarray, number: int, step: float):
        self._array, self._number, self._step = array, number, step
        self.count, self.index = 0, None

    def __getitem__(self, index):
        read = self._array[index]
        if self.count == self._number:
            self.index, read = index, read + self._step
        self.count += 1
        return read

    def __getattr__(self, name):
        return getattr(self._array, name)


def _gradients_of_arrays(operands, of_scores, slopes, options, sign=np.asarray) -> dict:
    """By name: the gradients of the bias, and of arrays of `aux`, that `wrt` names.

    `operands` are those of `scores`, `of_scores` is the gradient of the final scores, 0 where P
    is; `sign` is applied to derivatives. A function's derivative by an element that it reads is,
    for each score, the slope of a short line through it, in float64.
    """
    q, k, dtype, matmul = operands
    found, wanted = {}, names_of_gradients(options)
    if "bias" in wanted:
        found["bias"] = _gradient_of_bias(of_scores * slopes["given"], options, dtype)
    arrays = [name for name in wanted if name.startswith("aux")]
    if not arrays:
        return found
    unmasked = {"mask": None, "mask_mod": None, "causal": False, "window_size": (-1, -1)}
    before, *_ = scores(q, k, dtype, matmul, options | unmasked | {"score_mod": None})
    before, axes = before.astype(np.float64), np.ix_(*map(np.arange, before.shape))
    aux = [np.asarray(x).astype(np.float64) if _is_real(x) else x for x in options["aux"]]
    for name in arrays:
        place = int(name[3:])
        gradient, number, count = np.zeros(aux[place].shape, _sums(dtype)), 0, 1
        is_read_whole = aux[place].ndim == 0
        while number < count:
            ends = []
            for step in (-_NEAR, _NEAR):
                probe = _Probe(aux[place], number, step)
                if is_read_whole:
                    probe = aux[place] + step
                given = [*aux[:place], probe, *aux[place + 1 :]]
                with np.errstate(all="ignore"):
                    of_both = options.get("mask_mod") is not None
                    places = (before, *axes)
                    ends.append(on_arrays(options["score_mod"], places, given, of_both))
            count = 1 if is_read_whole else probe.count
            index = () if is_read_whole else probe.index
            if index is not None:
                slope = np.where(of_scores == 0, 0, (ends[1] - ends[0]) / (2 * _NEAR))
                shares = of_scores * sign(slope).astype(dtype)
                shape = np.shape(aux[place][index])
                np.add.at(gradient, index, _sum_to(shares, shape, _sums(dtype)))
            number += 1
        found[name] = gradient.astype(dtype)
    return found


def _gradient_of_bias(of_bias, options, dtype) -> np.ndarray:
    """Of a bias of a larger problem that of the part where `origin` says, and zeros elsewhere."""
    shape, (row, column, head) = np.shape(options["bias"]), options.get("origin") or (0, 0, 0)
    if options.get("origin") is None:
        return _sum_to(of_bias, shape, dtype)
    axes = zip(shape, of_bias.shape[4 - len(shape) :], strict=True)
    part = tuple(1 if n == 1 else full for n, full in axes)
    first = (0, head, row, column)[4 - len(shape) :]
    whole = np.zeros(shape, dtype)
    places = zip(first, part, shape, strict=True)
    inside = tuple(slice(None) if n == 1 else slice(x, x + m) for x, m, n in places)
    whole[inside] = _sum_to(of_bias, part, dtype)
    return whole


def _is_real(x) -> bool:
    """Whether something of `aux` is a float, or an array of them."""
    kind = np.asarray(x).dtype
    return kind.kind == "f" or kind == ml_dtypes.bfloat16


def _sum_to(x, shape: tuple[int, ...], dtype) -> np.ndarray:
    """The sums of x over the axes along which `shape` is broadcast to it."""
    full = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(full) if n == 1)
    return x.sum(axes, dtype=_sums(np.dtype(dtype)), keepdims=True).astype(dtype).reshape(shape)


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


def _forward(q, k, v, dtype, matmul, options):
    """Attention on (batch, heads, seqlen, head_dim); also S, its slopes, scale, weights of P."""
    s, slopes, scale = scores(q, k, dtype, matmul, options)
    with np.errstate(divide="ignore", invalid="ignore"):
        row_max = s.max(-1, keepdims=True, initial=dtype.type(-np.inf))
        # -inf - -inf is NaN: rows that see no key subtract 0 instead.
        e = np.exp(s - np.where(np.isneginf(row_max), dtype.type(0), row_max))
        row_sum = e.sum(-1, keepdims=True, dtype=_sums(dtype)).astype(dtype)
        exact_sum = e.sum(-1, keepdims=True, dtype=_sums(dtype))
        _, row_sum, kept = end_of_rows(row_max, row_sum, options)
        p = np.where(row_sum == 0, dtype.type(0), e * kept / row_sum)
        exact_max = row_max.astype(_sums(dtype))
        exact_max, exact_sum, _ = end_of_rows(exact_max, exact_sum, options)
        lse = (exact_max + np.log(exact_sum))[..., 0]
    weights = _weights(s.shape, dtype, options)
    out = matmul(p * weights, repeat(v.astype(dtype), q.shape[1] // v.shape[1]), dtype)
    return out, lse, s, slopes, scale, weights


def _weights(shape, dtype, options):
    """The factors of P (batch, head, query, key), once its rows have their sums."""
    weights, origin = np.ones((), dtype), options.get("origin") or (0, 0, 0)
    for row in FEATURES:
        value = options.get(row.option, row.default)
        if row.hook == "weigh" and row.is_asked(value):
            beside = (options.get(each.name, each.default) for each in row.beside)
            weights = weights * row.reference(shape, origin, value, *beside).astype(dtype)
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
    return np.broadcast_to(_weights(shape, np.float64, options) != 0, shape)


def end_of_rows(row_max, row_sum, options):
    """(row_max, row_sum, kept): with what features join to rows, all (batch, head, query, 1).

    Exponentials relative to row_max, as they were, must be multiplied by `kept`.
    """
    kept = row_max.dtype.type(1)
    for row, value in _asked(options, row_max.shape[1]):
        if row.hook == "finish":
            row_max, row_sum, more = row.reference(row_max, row_sum, value)
            kept = kept * more
    return row_max, row_sum, kept


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
    slopes, places = {}, _places(seqlen_q, seqlen_k, options)
    for row, value in _asked(options, num_heads):
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


def _given_scores(s, options):
    """Scores with the caller's bias, masks and functions: (scores, their slope, which are kept).

    The slope of a function is that of a short line through it, in float64.
    """
    slope, kept = s.dtype.type(1), np.ones((), bool)
    row, column, head = options.get("origin") or (0, 0, 0)
    starts = 0, head, row, column
    axes = np.ix_(*(first + np.arange(n) for first, n in zip(starts, s.shape, strict=True)))
    aux = [np.asarray(x) for x in options.get("aux") or ()]
    if options.get("bias") is not None:
        s = s + _part(options["bias"], axes).astype(s.dtype)
    score_mod, mask_mod = options.get("score_mod"), options.get("mask_mod")
    of_both = score_mod is not None and mask_mod is not None
    if score_mod is not None:
        exact = s.astype(np.float64)
        with np.errstate(all="ignore"):
            near = (exact + x for x in (-_NEAR, _NEAR))
            low, high = (on_arrays(score_mod, (x, *axes), aux, of_both) for x in near)
            slope = ((high - low) / (2 * _NEAR)).astype(s.dtype)
            new = on_arrays(score_mod, (s, *axes), aux, of_both)
            s = np.broadcast_to(new, s.shape).astype(s.dtype)
    if options.get("mask") is not None:
        kept = kept & _part(options["mask"], axes)
    if mask_mod is not None:
        kept = kept & on_arrays(mask_mod, axes, aux, of_both)
    return s, slope, kept


def _part(array, axes) -> np.ndarray:
    """Of an array that broadcasts to the scores of a larger problem those at these places."""
    array = np.asarray(array)
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return array[tuple(0 * at if n == 1 else at for n, at in zip(array.shape, axes, strict=True))]


def _places(seqlen_q: int, seqlen_k: int, options):
    """The keys at which queries stand, (query, 1), and the keys."""
    align = options.get("causal_align", "bottom_right"), options.get("shift", 0)
    i = np.arange(seqlen_q)[:, None] + _alignment(seqlen_q, seqlen_k, *align)
    return i, np.arange(seqlen_k)


def _alignment(seqlen_q: int, seqlen_k: int, causal_align: str, shift: int) -> int:
    """The offset from a query's index to the key at its position."""
    return shift + (seqlen_k - seqlen_q if causal_align == "bottom_right" else 0)


def _sums(dtype):
    """Sums and products accumulate in at least float32, as tensor cores and BLAS do."""
    return np.float64 if dtype == np.float64 else np.float32


def _matmul(a, b, dtype):
    a, b = a.astype(_sums(dtype)), b.astype(_sums(dtype))
    if dtype != np.float32:
        return np.matmul(a, b).astype(dtype)
    # Naive means term after term; a BLAS sums in a different, more exact order.
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    for k in range(a.shape[-1]):
        total += a[..., k, None] * b[..., None, k, :]
    return total


def _multiplication(precision: str):
    return _matmul_tf32 if precision == "tf32" else _matmul


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


def _sum_groups(x, group, dtype):
    batch, heads, seqlen, head_dim = x.shape
    grouped = x.reshape(batch, heads // group, group, seqlen, head_dim)
    return grouped.sum(2, dtype=_sums(dtype)).astype(dtype)


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
