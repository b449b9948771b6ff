"""Whether a method computes attention: its results on a sample of heads against float32.

The rule is numflash's own (`numflash.api.comparison`): the largest error may be twice that of a
naive implementation that rounds every intermediate to the input precision, plus the rounding of
one result. It is applied on the device, to the first head of the first batch entry and the last of
the last, or of the longest packed sequence, so that the longest points of the grid are checked as
well. Methods on 8-bit floats are held to a relative root mean square instead: what their error is
depends on how they quantise.

The sums here are float32, row block by row block, so that memory stays linear in seqlen. `xp` is
the array module: torch, cupy or numpy, whose names are alike as far as they are used.
"""

import math
from dataclasses import dataclass

from bench.points.points import Point

_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_ROWS = 2048


@dataclass(frozen=True)
class Sample:
    """One head's exact results, and how far off they may be.

    Attributes:
        batch, head, head_kv: which head of the arrays.
        exact: result name -> float32 array, (seqlen, head_dim).
        budgets: result name -> largest error allowed.
        rows: of packed arrays those of the sequence `batch`; None: arrays have a batch.
    """

    batch: int
    head: int
    head_kv: int
    exact: dict
    budgets: dict[str, float]
    rows: slice | None = None


def make_samples(xp, point: Point, round_to, q, k, v, dout=None) -> list[Sample]:
    """The samples that every method of a point is checked on.

    Args:
        xp: the array module.
        point: sizes and mask; a backward needs num_heads_q == num_heads_kv.
        round_to: rounds a float32 array to the input precision and back.
        q, k, v, dout: (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) of packed
            sequences; dout for the backward only.
    """
    if dout is not None and point.group_size != 1:
        raise ValueError("the sample of a backward holds one head of K and V for each of Q")
    samples = []
    longest = point.seqlens.index(max(point.seqlens)) if point.is_packed else point.batch - 1
    last = (longest, point.num_heads_q - 1)
    for batch, head in dict.fromkeys([(0, 0), last]):
        head_kv = head // point.group_size
        own = _rows_of_sequence(point, batch)
        places = (q, head), (k, head_kv), (v, head_kv)
        rows = [_rows(x, batch, number, own) for x, number in places]
        if dout is None:
            exact = {"out": forward(xp, *rows, point.causal)}
            naive = {"out": forward(xp, *rows, point.causal, round_to)}
        else:
            do = _rows(dout, batch, head, own)
            names = "dq", "dk", "dv"
            exact = dict(zip(names, backward(xp, do, *rows, point.causal), strict=True))
            naive = dict(zip(names, backward(xp, do, *rows, point.causal, round_to), strict=True))
        epsilon = _EPSILON[point.dtype]
        budgets = {
            name: 2 * _largest(naive[name] - value) + epsilon * _largest(value)
            for name, value in exact.items()
        }
        samples.append(Sample(batch, head, head_kv, exact, budgets, own))
    return samples


def compare(results: dict, samples: list[Sample], max_rel_rms: float | None = None) -> dict:
    """Errors of a method's results; `outcome` is "checked" or "failed".

    Args:
        results: "out", or "dq", "dk" and "dv", each (batch, seqlen, heads, head_dim).
        samples: as `make_samples` gives them.
        max_rel_rms: if given, errors are root mean squares relative to that of the exact result,
            and this is their budget.
    """
    worst = {"outcome": "checked", "errors": {}, "budgets": {}}
    for sample in samples:
        for name, exact in sample.exact.items():
            head = sample.head if name in ("out", "dq") else sample.head_kv
            norm = _largest if max_rel_rms is None else _rms
            error = _error(results[name], sample, head, exact, norm)
            budget = sample.budgets[name]
            if max_rel_rms is not None:
                error, budget = error / _rms(exact), max_rel_rms
            # The sample whose error comes closest to its budget is the one to report.
            known = worst["errors"].get(name)
            if known is None or error * worst["budgets"][name] > known * budget:
                worst["errors"][name], worst["budgets"][name] = error, budget
            if not error <= budget:
                worst["outcome"] = "failed"
    # JSON has no infinity.
    worst["errors"] = {
        n: e if math.isfinite(e) else "not finite" for n, e in worst["errors"].items()
    }
    return worst


def forward(xp, q, k, v, causal: bool, round_to=None):
    """Attention of one head in float32; with `round_to`, naively: every intermediate rounded."""
    blocks = [
        _probabilities(xp, q, k, first, causal, round_to)[0] @ v
        for first in range(0, q.shape[0], _ROWS)
    ]
    return _rounded(xp.concatenate(blocks), round_to)


def backward(xp, do, q, k, v, causal: bool, round_to=None):
    """dq, dk and dv of one head in float32; with `round_to`, naively."""
    scale = q.shape[1] ** -0.5
    dq, dk, dv = [], 0.0, 0.0
    for first in range(0, q.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        p, _ = _probabilities(xp, q, k, first, causal, round_to)
        out = _rounded(p @ v, round_to)
        delta = (do[rows] * out).sum(-1)[:, None]
        dp = _rounded(do[rows] @ v.T, round_to)
        ds = _rounded(p * (dp - delta), round_to)
        dq.append(scale * (ds @ k))
        dk = dk + scale * (ds.T @ q[rows])
        dv = dv + p.T @ do[rows]
    return tuple(_rounded(x, round_to) for x in (xp.concatenate(dq), dk, dv))


def _probabilities(xp, q, k, first: int, causal: bool, round_to):
    """P of the rows from `first` on, and the rows of Q they belong to."""
    rows = q[first : first + _ROWS]
    s = _rounded((rows @ k.T) * q.shape[1] ** -0.5, round_to)
    if causal:
        # Bottom right: the last query sees the last key.
        shift = k.shape[0] - q.shape[0]
        query = first + shift + _positions(xp, rows)[:, None]
        s = xp.where(_positions(xp, k)[None, :] <= query, s, s * 0 - math.inf)
    p = xp.exp(s - xp.amax(s, axis=-1)[:, None])
    return _rounded(p / p.sum(-1)[:, None], round_to), rows


def _positions(xp, rows):
    """0, 1, 2, ... for each row, on the rows' device."""
    ones = xp.ones_like(rows[:, 0])
    return xp.cumsum(ones, axis=0) - 1


def _rounded(x, round_to):
    return x if round_to is None else round_to(x)


def _rows(x, batch: int, head: int, rows: slice | None):
    """One head, (seqlen, head_dim), in float32; `rows` are those of a packed sequence."""
    return _to_float32(x[batch, :, head] if rows is None else x[rows, head])


def _rows_of_sequence(point: Point, number: int) -> slice | None:
    """The rows of a packed sequence; None of a batch entry."""
    if not point.is_packed:
        return None
    first = sum(point.seqlens[:number])
    return slice(first, first + point.seqlens[number])


def _to_float32(x):
    return x.float() if hasattr(x, "float") else x.astype("float32")


def _error(result, sample: Sample, head: int, exact, norm) -> float:
    """norm(result - exact) of one head; infinite where shapes differ or a number is not finite."""
    got = _rows(result, sample.batch, head, sample.rows)
    if tuple(got.shape) != tuple(exact.shape):
        return math.inf
    error = norm(got - exact)
    return error if math.isfinite(error) else math.inf


def _largest(x) -> float:
    """max |x|; NaN if any is."""
    return float(abs(x).max())


def _rms(x) -> float:
    """The root mean square of x; NaN if any is."""
    return float((x**2).mean()) ** 0.5
