"""Attention without FlashAttention's ideas, in CuPy: what each idea is measured against.

Each function prepares arrays (batch, seqlen, heads, head_dim) and returns a call, which gives
"out", or "dq", "dk" and "dv". All are honest: products in the input precision by cuBLAS, one fused
elementwise kernel where CuPy can fuse, nothing computed that the variant does not need.

- whole_matrix: the scores of all queries and keys in memory, a kernel for each step. Its backward
  has stored P in the forward.
- whole_matrix_recomputed: its backward computes P again.
- whole_rows: blocks of queries, but whole rows of scores: no tiles of keys, no running maximum.
- two_passes: tiles of keys; one pass for maximum and sum, another for the output.
- one_pass: tiles of keys and the online softmax: the algorithm of the kernels, but a CuPy kernel
  for each step. What whole_rows and two_passes are compared with.
"""

from collections.abc import Callable
from typing import Any

from bench.points.points import Point

ROWS = 1024
KEYS = 1024


def as_cupy(point: Point, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that the direction needs as CuPy arrays, heads first, sharing their memory."""
    import cupy

    names = "qkv" if point.direction == "forward" else ("q", "k", "v", "dout")
    arrays = {name: cupy.from_dlpack(inputs[name]) for name in names}
    heads_first = {name: x.transpose(0, 2, 1, 3) for name, x in arrays.items()}
    if point.group_size > 1:
        for name in "kv":
            heads_first[name] = cupy.repeat(heads_first[name], point.group_size, axis=1)
    return heads_first


def whole_matrix(point: Point, q, k, v, dout=None) -> Callable[[], dict]:
    """Standard attention; the backward starts from the P that its forward stored."""
    xp = _module_of(q)
    seen = _seen(xp, point, 0, point.seqlen_q, 0, point.seqlen_k)
    if dout is None:
        return lambda: {"out": _back(_softmax(xp, point, q, k, seen) @ v)}
    p = _softmax(xp, point, q, k, seen)
    out = p @ v
    return lambda: _gradients(point, p, out, q, k, v, dout)


def whole_matrix_recomputed(point: Point, q, k, v, dout=None) -> Callable[[], dict]:
    """Standard attention whose backward computes P again, as the kernels do."""
    xp = _module_of(q)
    if dout is None:
        raise NotImplementedError("only a backward can compute P again")
    seen = _seen(xp, point, 0, point.seqlen_q, 0, point.seqlen_k)
    out = _softmax(xp, point, q, k, seen) @ v
    return lambda: _gradients(point, _softmax(xp, point, q, k, seen), out, q, k, v, dout)


def whole_rows(point: Point, q, k, v, dout=None) -> Callable[[], dict]:
    """Blocks of queries against all keys at once."""

    def of_rows(xp, block, rows):
        last_key = _keys_seen(point, rows[1])
        seen = _seen(xp, point, *rows, 0, last_key)
        return _softmax(xp, point, block, k[:, :, :last_key], seen) @ v[:, :, :last_key]

    return _by_rows(point, q, dout, of_rows)


def two_passes(point: Point, q, k, v, dout=None) -> Callable[[], dict]:
    """Tiles of keys, twice: first the maximum and the sum of a row, then its output."""

    def of_rows(xp, block, rows):
        tiles = _blocks(_keys_seen(point, rows[1]), KEYS)
        row_max = row_sum = None
        for tile in tiles:
            s = _scores(xp, point, block, k, rows, tile)
            row_max, row_sum, _, _ = _join(xp, s, row_max, row_sum)
        o = 0
        for first, end in tiles:
            s = _scores(xp, point, block, k, rows, (first, end))
            p = (xp.exp(s - row_max) / row_sum).astype(q.dtype)
            o = o + (p @ v[:, :, first:end]).astype("float32")
        return o.astype(q.dtype)

    return _by_rows(point, q, dout, of_rows)


def one_pass(point: Point, q, k, v, dout=None) -> Callable[[], dict]:
    """Tiles of keys, once: the online softmax rescales the output as the maximum grows."""

    def of_rows(xp, block, rows):
        row_max = row_sum = None
        o = 0
        for first, end in _blocks(_keys_seen(point, rows[1]), KEYS):
            s = _scores(xp, point, block, k, rows, (first, end))
            row_max, row_sum, scale, p = _join(xp, s, row_max, row_sum)
            o = o * scale + (p.astype(q.dtype) @ v[:, :, first:end]).astype("float32")
        return (o / row_sum).astype(q.dtype)

    return _by_rows(point, q, dout, of_rows)


def _by_rows(point: Point, q, dout, of_rows: Callable) -> Callable[[], dict]:
    """A forward whose rows come from `of_rows(xp, block of q, its first row and its end)`."""
    if dout is not None:
        raise NotImplementedError("this variant has a forward only")
    xp = _module_of(q)

    def call() -> dict:
        out = xp.empty_like(q)
        for first, end in _blocks(point.seqlen_q, ROWS):
            out[:, :, first:end] = of_rows(xp, q[:, :, first:end], (first, end))
        return {"out": _back(out)}

    return call


def _module_of(array):
    """numpy or cupy."""
    import sys

    return sys.modules[type(array).__module__.partition(".")[0]]


def _back(x):
    return x.transpose(0, 2, 1, 3)


def _blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _keys_seen(point: Point, end_row: int) -> int:
    """Keys that some query before `end_row` sees."""
    shift = point.seqlen_k - point.seqlen_q
    return min(point.seqlen_k, end_row + shift) if point.causal else point.seqlen_k


def _seen(xp, point: Point, first: int, end: int, first_key: int, end_key: int):
    """Which keys the queries from `first` to `end` see; None if all."""
    shift = point.seqlen_k - point.seqlen_q
    if not point.causal or end_key <= first + shift + 1:
        return None
    return xp.arange(first_key, end_key)[None, :] <= xp.arange(first, end)[:, None] + shift


def _scores(xp, point: Point, q_block, k, rows, tile):
    """A tile of scores in float32."""
    s = (q_block @ k[:, :, tile[0] : tile[1]].swapaxes(-1, -2)).astype("float32")
    s *= point.head_dim**-0.5
    seen = _seen(xp, point, *rows, *tile)
    # Not -inf: the difference of two of them, in a row that a tile masks whole, would be NaN.
    return s if seen is None else xp.where(seen, s, xp.float32(-1e30))


def _join(xp, s, row_max, row_sum):
    """Maximum and sum with one more tile; the factor of what was summed before; P unscaled."""
    tile_max = s.max(-1, keepdims=True)
    if row_max is None:
        p = xp.exp(s - tile_max)
        return tile_max, p.sum(-1, keepdims=True), 0, p
    new_max = xp.maximum(row_max, tile_max)
    scale = xp.exp(row_max - new_max)
    p = xp.exp(s - new_max)
    return new_max, row_sum * scale + p.sum(-1, keepdims=True), scale, p


def _softmax(xp, point: Point, q, k, seen):
    """P in the input precision, from scores that lie in memory in it."""
    s = q @ k.swapaxes(-1, -2)
    s *= s.dtype.type(point.head_dim**-0.5)
    if seen is not None:
        s = xp.where(seen, s, s.dtype.type(-xp.inf))
    p = xp.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True, dtype="float32").astype(p.dtype)).astype(q.dtype)


def _gradients(point: Point, p, out, q, k, v, dout) -> dict:
    """dQ, dK and dV from P."""
    scale = q.dtype.type(point.head_dim**-0.5)
    dv = p.swapaxes(-1, -2) @ dout
    dp = dout @ v.swapaxes(-1, -2)
    delta = (dout * out).sum(-1, keepdims=True, dtype="float32").astype(q.dtype)
    dp -= delta
    dp *= p
    dp *= scale
    dq, dk = dp @ k, dp.swapaxes(-1, -2) @ q
    return {"dq": _back(dq), "dk": _back(dk), "dv": _back(dv)}
