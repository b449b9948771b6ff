"""The calls of attention of one rank as dense float64 arithmetic: quick, whatever the layout.

They take the options of attention that say where a call lies and what a query sees, and no others.
"""

import numpy as np

_LENGTHS = ("starts_q", "seqlens_q", "starts_k", "seqlens_k")


def replace_calls(monkeypatch, local_calls, ring) -> None:
    """Make the modules of `numflash.distributed` call these."""
    monkeypatch.setattr(local_calls, "attention", forward)
    monkeypatch.setattr(local_calls, "attention_backward", backward)
    monkeypatch.setattr(local_calls, "attention_varlen", forward_varlen)
    monkeypatch.setattr(local_calls, "attention_varlen_backward", backward_varlen)
    monkeypatch.setattr(ring, "merge_onto", merge_onto)


def scores(q, k, seen) -> np.ndarray:
    """(batch, heads, queries, keys) float64, -inf where a query does not see."""
    q, k = q.astype("f8"), k.astype("f8").repeat(q.shape[2] // k.shape[2], 2)
    return np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[3]), -np.inf)


def results(q, k, v, seen) -> tuple[np.ndarray, np.ndarray]:
    """out and lse."""
    s = scores(q, k, seen)
    most = s.max(-1, initial=-np.inf)
    weights = np.exp(s - np.where(np.isfinite(most), most, 0)[..., None])
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, most + np.log(total), -np.inf)
    weights /= np.where(total > 0, total, 1)[..., None]
    values = v.astype("f8").repeat(q.shape[2] // v.shape[2], 2)
    return np.einsum("bhqk,bkhd->bqhd", weights, values), lse


def gradients(dout, q, k, v, lse, delta, seen) -> dict[str, np.ndarray]:
    """dq, dk and dv by name."""
    dout, group = dout.astype("f8"), q.shape[2] // k.shape[2]
    p = np.exp(scores(q, k, seen) - np.where(np.isfinite(lse), lse, np.inf)[..., None])
    dp = np.einsum("bqhd,bkhd->bhqk", dout, v.astype("f8").repeat(group, 2))
    ds = p * (dp - delta[..., None]) / np.sqrt(q.shape[3])
    dq = np.einsum("bhqk,bkhd->bqhd", ds, k.astype("f8").repeat(group, 2))
    of_heads = (
        np.einsum("bhqk,bqhd->bkhd", ds, q.astype("f8")),
        np.einsum("bhqk,bqhd->bkhd", p, dout),
    )
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in of_heads)
    return {"q": dq, "k": dk, "v": dv}


def row_sums(dout, out) -> np.ndarray:
    """(batch, heads, queries) float64."""
    return np.einsum("bqhd,bqhd->bhq", dout.astype("f8"), out.astype("f8"))


def _seen(q, k, window_size, shift=0, causal_align="bottom_right") -> np.ndarray:
    (left, right), queries, keys = window_size, q.shape[1], k.shape[1]
    if causal_align == "bottom_right":
        shift += keys - queries
    ahead = np.arange(keys) - np.arange(queries)[:, None] - shift
    return (ahead <= (right if right >= 0 else keys + queries + abs(shift))) & (
        -ahead <= (left if left >= 0 else keys + queries + abs(shift))
    )


def forward(q, k, v, *, return_lse, out=None, out_dtype=None, config=None, **place):
    """`attention`."""
    found, lse = results(q, k, v, _seen(q, k, **place))
    out = np.empty(found.shape, out_dtype or q.dtype) if out is None else out
    out[...] = found
    return out, lse.astype("f4")


def backward(dout, q, k, v, out, lse, *, wrt, grad_dtype=None, delta=None, config=None, **place):
    """`attention_backward`."""
    assert lse.flags.c_contiguous
    delta = row_sums(dout, out) if delta is None else delta
    found = gradients(dout, q, k, v, lse, delta, _seen(q, k, **place))
    return tuple(found[name].astype("f4") for name in wrt)


def _rows(options: dict) -> list[tuple[slice, slice]]:
    """The rows of queries and of keys of each sequence."""
    each = zip(*(options.pop(name) for name in _LENGTHS), strict=True)
    return [(slice(q, q + num_q), slice(k, k + num_k)) for q, num_q, k, num_k in each]


def forward_varlen(q, k, v, *, out=None, out_dtype=None, **options):
    """`attention_varlen`; rows of no sequence are 0, or those of `out` left as they are."""
    whole = np.zeros((*q.shape[:2], v.shape[2]), out_dtype or q.dtype) if out is None else out
    lse = np.full((q.shape[1], q.shape[0]), -np.inf, "f4")
    for rows, keys in _rows(options):
        found = forward(q[None, rows], k[None, keys], v[None, keys], **options)
        whole[rows], lse[:, rows] = found[0][0], found[1][0]
    return whole, lse


def backward_varlen(dout, q, k, v, out, lse, *, wrt, grad_dtype=None, delta=None, **options):
    """`attention_varlen_backward`."""
    found = {"q": np.zeros(q.shape, "f4"), "k": np.zeros(k.shape, "f4")}
    found["v"] = np.zeros(v.shape, "f4")
    delta = row_sums(dout[None], out[None])[0] if delta is None else delta
    for rows, keys in _rows(options):
        operands = dout[None, rows], q[None, rows], k[None, keys], v[None, keys]
        of_rows = np.ascontiguousarray(lse[None, :, rows])
        more = {"delta": delta[None, :, rows], "wrt": ("q", "k", "v")}
        for name, x in zip(
            "qkv", backward(*operands, None, of_rows, **more, **options), strict=True
        ):
            found[name][rows if name == "q" else keys] = x[0]
    return tuple(found[name] for name in wrt)


def merge_onto(out, lse, part, part_lse) -> None:
    """`merge_onto`."""
    total = np.logaddexp(lse.astype("f8"), part_lse.astype("f8"))
    finite = np.where(np.isfinite(total), total, 0)
    ours, theirs = (np.exp(x - finite).swapaxes(1, 2)[..., None] for x in (lse, part_lse))
    out[...] = ours * out + theirs * part
    lse[...] = total
