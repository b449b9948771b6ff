"""What flash-attn's functions mean, in PyTorch: the reference of tests of their names.

`attend` is attention as its documentation defines it, of tensors (batch, seqlen, heads, head_dim),
in float64 or, to know what rounding costs, in the tensors' own precision.
"""

import torch
from torch import Tensor

EXACT = torch.float64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: torch.dtype = EXACT,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size=(-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attention_chunk: int = 0,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse (batch, heads, seqlen_q)), computed in `dtype`; differentiable.

    `kept`: boolean (batch, heads, seqlen_q, seqlen_k), of dropout.
    """
    q, k, v = (x.to(dtype) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    columns = torch.arange(k.shape[1])
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[0], q.shape[2])[:, :, None, None].to(dtype)
        scores = scores - slopes * (rows - columns).abs()
    seen = torch.ones(rows.shape[0], columns.shape[0], dtype=torch.bool)
    left, right = (int(each) for each in window_size)
    if causal:
        seen &= columns <= rows
    if left >= 0:
        seen &= columns >= rows - left
    if right >= 0:
        seen &= columns <= rows + right
    if attention_chunk:
        seen &= columns // attention_chunk == rows // attention_chunk
    scores = scores.masked_fill(~seen, -torch.inf)
    joined = scores
    if learnable_sink is not None:
        sink = learnable_sink.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        joined = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(joined, dim=-1)
    empty = lse == -torch.inf
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    if kept is not None:
        weights = weights * kept / (1 - round(2**16 * dropout_p) / 2**16)
    return torch.einsum("bhij,bjhd->bihd", weights.to(dtype), v), lse


def attend_alone(q: Tensor, k: Tensor, v: Tensor, ends_q, ends_k, kept=None, **options):
    """(out, lse (heads, tokens)) of packed sequences, each by itself.

    Args:
        ends_q, ends_k: pairs (first row, behind the last) of each sequence.
        kept: boolean (sequences, heads, longest, longest).
        options: of `attend`; alibi_slopes may be (sequences, heads).
    """
    slopes = options.pop("alibi_slopes", None)
    dtype = options.get("dtype", EXACT)
    # A function of all of them, also where no sequence has a row.
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    out = out + 0 * sum(x.sum() for x in (q, k, v))
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
    for n, ((q0, q1), (k0, k1)) in enumerate(zip(ends_q, ends_k, strict=True)):
        if q0 == q1:
            continue
        if slopes is not None:
            options["alibi_slopes"] = slopes[n] if slopes.dim() == 2 else slopes
        if kept is not None:
            options["kept"] = kept[n : n + 1, :, : q1 - q0, : k1 - k0]
        own_out, own_lse = attend(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], **options)
        out = out.index_copy(0, torch.arange(q0, q1), own_out[0])
        lse = lse.index_copy(1, torch.arange(q0, q1), own_lse[0])
    return out, lse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """(batch, seqlen, heads, head_dim) rotated by the angles of (batch, seqlen) positions."""
    half = cos.shape[-1]
    cos, sin = (table.to(x.dtype)[positions][:, :, None] for table in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (
        (turned[..., ::2], turned[..., 1::2])
        if interleaved
        else (turned[..., :half], turned[..., half:])
    )
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def is_close_enough(got, exact, rounded, factor: float, least: float = 1e-5) -> bool:
    """flash-attn's rule: an error at most `factor` times that of the same in 16 bits."""
    error = (got.to(EXACT) - exact.to(EXACT)).abs()
    return error.max() <= factor * (rounded.to(EXACT) - exact.to(EXACT)).abs().max() + least
