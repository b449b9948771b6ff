"""Rotary embeddings in float64."""

import numpy as np


def apply_rotary(
    x,
    cos,
    sin,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    offsets=0,
    cu_seqlens=None,
    layout: str = "bshd",
) -> np.ndarray:
    """Rows rotated by the angles of their positions, in float64.

    Args:
        x: (batch, seqlen, heads, head_dim), or as `layout` and `cu_seqlens` say.
        cos, sin: (positions, rotary_dim / 2).
        interleaved, conjugate, offsets, cu_seqlens, layout: as for `numflash.apply_rotary`.

    Returns:
        An array shaped as x. Rows at positions that the tables do not have are those of x.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> x = np.ones((1, 2, 1, 2))
        >>> cos, sin = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])  # 0 and 90 degrees
        >>> reference.apply_rotary(x, cos, sin)[0, :, 0].tolist()
        [[1.0, 1.0], [-1.0, 1.0]]
    """
    x, cos, sin = (np.asarray(each).astype(np.float64) for each in (x, cos, sin))
    out = x.copy()
    rows = out  # a view of the result: (batch, seqlen, heads, head_dim)
    if out.ndim == 2:
        rows = out[None, :, None]
    elif out.ndim == 3:
        rows = out[None]
    if out.ndim > 2 and layout == "bhsd":
        rows = rows.swapaxes(1, 2)
    batch, seqlen = rows.shape[:2]
    if cu_seqlens is None:
        positions = np.arange(seqlen) + np.broadcast_to(offsets, batch)[:, None]
    else:
        positions = np.full((1, seqlen), -1)
        bounds = np.asarray(cu_seqlens).tolist()
        firsts = np.broadcast_to(offsets, len(bounds) - 1)
        for begin, end, first in zip(bounds[:-1], bounds[1:], firsts, strict=True):
            positions[0, begin:end] = first + np.arange(end - begin)
    inside = (positions >= 0) & (positions < len(cos))
    half = cos.shape[1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    chosen = rows[inside]  # (tokens, heads, head_dim)
    c, s = (table[positions[inside]][:, None] for table in (cos, -sin if conjugate else sin))
    a, b = chosen[..., first].copy(), chosen[..., second].copy()
    chosen[..., first], chosen[..., second] = a * c - b * s, b * c + a * s
    rows[inside] = chosen
    return out
