"""Attention with 8-bit floats: quantisation exact to the bit, attention in float64 around it.

Quantisation, in float32 and in this order:

    x          rotated, if asked for: signs, then the Walsh-Hadamard transform of each piece of
               `rotation_size` elements with strides 1, 2, 4, ..., then a factor size ** -0.5
    amax       the largest finite |x| of what shares a scale, at least 2 ** -100
    codes      x * (peak / amax), to the nearest e4m3 or e5m2, saturating; peak is 256 or 32768
    descale    amax / peak: x is about descale * code

A key's P is quantised too, with the scale of its V, in units of the largest of its row among
`tile_n` neighbouring keys. With T = S + log(v_descale)

    m = max T,   P = e4m3(2 ** 8 exp(T - m)),   O = sum over tiles of exp(m) 2 ** -8 P codes of V

up to the common factor 1 / sum exp(S).

Sources: FlashAttention-3, arXiv 2407.08608, section 3.3 (a scale per block, incoherent
processing); QuIP, arXiv 2307.13304 (random orthogonal transforms). A scale of P per tile is
numflash's: a running maximum, as FlashAttention-3 has it, loses numbers that are small next to an
attention sink (arXiv 2606.06521).
"""

import numpy as np

from numflash.configs.formats import FORMATS
from numflash.reference.arrays import heads_back, heads_first, repeat
from numflash.reference.scores import end_of_rows, scores

HEAD_DIM_STEP = 64
TOKEN_STEP = 64
SMALLEST_AMAX = np.float32(2.0**-100)
P_SCALE_LOG2 = 8
_GROUP = 16


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that codes are stored with: the next multiple of 64, filled up with zeros."""
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


def rotation_size(padded: int) -> int:
    """Elements that are rotated among each other: the largest power of two in a padded head_dim.

    64 of 64, 128 of 128, 3 x 64 of 192, 256 of 256.
    """
    return padded & -padded


def hadamard_signs(padded: int, seed: int) -> np.ndarray:
    """(padded,) float32 of +1 and -1, from the first 256 bits of PCG64(seed), low bits first.

    Example:
        >>> from numflash import reference
        >>> reference.hadamard_signs(4, seed=0).shape
        (4,)
    """
    words = np.random.PCG64(seed).random_raw(4).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.where(bits[:padded], np.float32(-1), np.float32(1))


def rotate(x, seed: int) -> np.ndarray:
    """Rows (..., padded) times signs and Hadamard matrices: float32, an orthogonal transform.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> x = np.eye(1, 64)
        >>> bool(np.allclose(abs(reference.rotate(x, seed=0)), 1 / 8))  # an outlier, spread out
        True
    """
    x = np.asarray(x, np.float32)
    size, shape = rotation_size(x.shape[-1]), x.shape
    x = x * hadamard_signs(shape[-1], seed)
    stride = 1
    while stride < size:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * stride), 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], -2).reshape(shape)
        stride *= 2
    return x * np.float32(size**-0.5)


def rotate_back(x, seed: int) -> np.ndarray:
    """The inverse of `rotate`, to rounding: the transform once more, then the signs."""
    signs = hadamard_signs(x.shape[-1], seed)
    return rotate(x * signs, seed) * signs


def quantize_fp8(
    x,
    granularity: str = "block",
    block: int = 128,
    hadamard: bool = False,
    seed: int = 0,
    format: str = "e4m3",
    layout: str = "bshd",
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of an array; see the module's docstring.

    Args:
        x: (batch, seqlen, heads, head_dim), or what `layout` says.
        granularity: what shares a scale: the whole "tensor", each "head" of each batch entry,
            each "block" of `block` tokens of a head, or each "token" of a head.
        block: tokens that share a scale.
        hadamard, seed: whether rows are rotated, and by which signs.
        format: "e4m3" or "e5m2".
        layout: of x.

    Returns:
        codes: (batch, seqlen, heads, padded head_dim) uint8, in the layout and with the axes of x.
        descale: (batch, heads, n) float32 with n = 1, seqlen / block rounded up, or seqlen;
            (1, 1, 1) for "tensor".

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> x = np.random.default_rng(0).standard_normal((1, 32, 2, 64))
        >>> codes, descale = reference.quantize_fp8(x, "block", block=16)
        >>> codes.shape, descale.shape
        ((1, 32, 2, 64), (1, 2, 2))
    """
    ndim, bhsd, kind = np.ndim(x), layout == "bhsd", FORMATS[format]
    x = heads_first(x, bhsd).astype(np.float32)
    batch, heads, seqlen, head_dim = x.shape
    x = np.pad(x, [(0, 0)] * 3 + [(0, padded_head_dim(head_dim) - head_dim)])
    if hadamard:
        with np.errstate(invalid="ignore", over="ignore"):
            x = rotate(x, seed)
    # NaN and infinities have no part in the scale.
    token_amax = np.where(np.isfinite(x), np.abs(x), 0).max(-1, initial=0)
    size = {"token": 1, "block": block}.get(granularity, max(1, seqlen))
    amax = (
        np.maximum.reduceat(token_amax, range(0, seqlen, size), axis=2)
        if seqlen
        else (np.zeros((batch, heads, int(granularity in ("tensor", "head"))), np.float32))
    )
    if granularity == "tensor":
        amax = np.full((1, 1, 1), amax.max(initial=0), np.float32)
    amax = np.maximum(amax, SMALLEST_AMAX)
    peak = np.float32(kind.peak)
    scale = per_token(peak / amax, batch, heads, seqlen, size)
    with np.errstate(over="ignore"):
        codes = kind.encode(x * scale[..., None])
    return heads_back(codes, bhsd, ndim), amax / peak


def dequantize_fp8(
    codes,
    descale,
    head_dim: int,
    block: int = 1,
    hadamard: bool = False,
    seed: int = 0,
    format: str = "e4m3",
    layout: str = "bshd",
) -> np.ndarray:
    """The numbers that codes stand for, float32, shaped like the quantised array.

    `block` is the number of tokens per scale; where there is one for all it does not matter.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> x = np.random.default_rng(0).standard_normal((1, 32, 2, 64))
        >>> codes, descale = reference.quantize_fp8(x, "block", block=16)
        >>> y = reference.dequantize_fp8(codes, descale, head_dim=64, block=16)
        >>> bool(abs(y - x).max() < 0.07 * abs(x).max())
        True
    """
    ndim, bhsd = np.ndim(codes), layout == "bhsd"
    codes = heads_first(codes, bhsd)
    scale = per_token(descale, *codes.shape[:3], block)
    x = FORMATS[format].decode(codes) * scale[..., None]
    if hadamard:
        x = rotate_back(x, seed)
    return heads_back(x[..., :head_dim], bhsd, ndim)


def per_token(descale, batch: int, heads: int, seqlen: int, block: int) -> np.ndarray:
    """(batch, heads, seqlen) scales from (batch or 1, heads or 1, n); n = 1 is one for all."""
    descale = np.asarray(descale, np.float32)
    n = descale.shape[2]
    token = np.arange(seqlen) // block if n > 1 else np.zeros(seqlen, int)
    return np.broadcast_to(descale, (batch, heads, n))[:, :, token]


def tokens_innermost(codes) -> np.ndarray:
    """(batch, heads, head_dim, padded seqlen) from (batch, seqlen, heads, head_dim).

    This is how V is stored: for each of its columns all tokens, filled up with zeros to a multiple
    of 64, and in each 16 in the order in which P leaves the tensor cores: position p holds token
    2 (p // 4) + p % 2 + 8 (p // 2 % 2). So P goes from accumulator to operand without a shuffle.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> codes = np.arange(16, dtype=np.uint8).reshape(1, 16, 1, 1)
        >>> reference.tokens_innermost(codes)[0, 0, 0, :8].tolist()
        [0, 1, 8, 9, 2, 3, 10, 11]
    """
    codes = np.asarray(codes).transpose(0, 2, 3, 1)
    codes = np.pad(codes, [(0, 0)] * 3 + [(0, -codes.shape[3] % TOKEN_STEP)])
    return np.take(codes, _stored_tokens(codes.shape[3]), axis=3)


def tokens_outermost(codes, seqlen: int) -> np.ndarray:
    """The inverse of `tokens_innermost`.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> codes = np.arange(16, dtype=np.uint8).reshape(1, 16, 1, 1)
        >>> stored = reference.tokens_innermost(codes)
        >>> bool((reference.tokens_outermost(stored, seqlen=16) == codes).all())
        True
    """
    order = np.argsort(_stored_tokens(codes.shape[3]))
    return np.take(codes, order, axis=3)[..., :seqlen].transpose(0, 3, 1, 2)


def _stored_tokens(padded_seqlen: int) -> np.ndarray:
    """The token at each position."""
    position = np.arange(padded_seqlen)
    p = position % _GROUP
    return position - p + 2 * (p // 4) + p % 2 + 8 * (p // 2 % 2)


def attention_fp8(
    q,
    k,
    v,
    *,
    granularity: str = "block",
    block: int = 128,
    hadamard: bool = True,
    seed: int = 0,
    tile_n: int = 64,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """`attention` with q, k, v and P in e4m3: the specification of `precision="fp8"`.

    Args:
        q, k, v, options: as for `attention`.
        granularity, block, seed: see `quantize_fp8`.
        hadamard: whether q and k are rotated, which leaves exact scores as they are.
        tile_n: neighbouring keys, counted from the first, in whose units P is quantised.

    Returns:
        out, lse: as `attention`, in float64.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16))
        >>> exact, _ = reference.attention(q, k, v)
        >>> out, _ = reference.attention_fp8(q, k, v, granularity="token")
        >>> bool(abs(out - exact).max() < 0.1)
        True
    """
    layout = options.get("layout", "bshd")
    share = {"granularity": granularity, "block": block, "layout": layout}
    turn = {"hadamard": hadamard, "seed": seed}
    codes, scales = [], []
    for x, turned in ((q, turn), (k, turn), (v, {})):
        x_codes, descale = quantize_fp8(x, **share, **turned)
        codes.append(x_codes)
        scales.append(descale)
    options.setdefault("softmax_scale", None)
    if options["softmax_scale"] is None:
        options["softmax_scale"] = np.shape(q)[-1] ** -0.5
    size = {"token": 1}.get(granularity, block)
    out, lse = attention_of_codes(*codes, *scales, blocks=(size,) * 3, tile_n=tile_n, **options)
    return out[..., : np.shape(v)[-1]], lse


def attention_of_codes(
    q,
    k,
    v,
    q_descale,
    k_descale,
    v_descale,
    *,
    blocks: tuple[int, int, int] = (1, 1, 1),
    tile_n: int | None = 64,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """`attention_fp8` from e4m3 codes and scales, of `blocks` tokens each.

    q_descale may have the heads of k and v: each group of query heads then shares one. `tile_n`
    None leaves P as it is: attention of what the codes stand for.

    Example:
        >>> import numpy as np
        >>> from numflash import reference
        >>> x = np.random.default_rng(0).standard_normal((1, 32, 2, 64))
        >>> codes, descale = reference.quantize_fp8(x, "token")
        >>> out, lse = reference.attention_of_codes(codes, codes, codes, descale, descale, descale)
        >>> out.shape, lse.shape
        ((1, 32, 2, 64), (1, 2, 32))
    """
    bhsd, ndim = options.get("layout", "bshd") == "bhsd", np.ndim(q)
    q, k, v = (heads_first(x, bhsd) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if q_descale.shape[1] not in (1, q.shape[1]):
        q_descale = np.repeat(q_descale, group, axis=1)
    e4m3, numbers = FORMATS["e4m3"], []
    for x, descale, block in zip(
        (q, k, v), (q_descale, k_descale, v_descale), blocks, strict=True
    ):
        scale = per_token(descale, *x.shape[:3], block)
        numbers.append((e4m3.decode(x).astype(np.float64), scale.astype(np.float64)))
    (q, q_scale), (k, k_scale), (v, v_scale) = numbers
    s, *_ = scores(
        q * q_scale[..., None], k * k_scale[..., None], np.dtype(np.float64), _exact, options
    )
    v, v_scale = repeat(v, group), repeat(v_scale, group)[:, :, None, :]
    seqlen_k = s.shape[3]
    total = np.zeros((*s.shape[:3], 1))
    out = np.zeros((*s.shape[:3], v.shape[3]))
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = s.max(-1, keepdims=True, initial=-np.inf)
        largest = np.where(np.isneginf(largest), 0, largest)
        step = tile_n or max(1, seqlen_k)
        total += np.exp(s - largest).sum(-1, keepdims=True)
        t = s + np.log(v_scale)
        for first in range(0, seqlen_k, step):
            keys = slice(first, first + step)
            m = t[..., keys].max(-1, keepdims=True)
            m = np.where(np.isneginf(m), 0, m)
            p = np.exp(t[..., keys] - m)
            if tile_n is not None:
                p = e4m3.decode(e4m3.encode(p * 2.0**P_SCALE_LOG2)) * 2.0**-P_SCALE_LOG2
            out += np.exp(m - largest) * (p @ v[:, :, keys])
        largest, total, kept = end_of_rows(largest, total, options)
        out = np.where(total == 0, 0, out * kept / total)
        lse = (largest + np.log(total))[..., 0]
    return heads_back(out, bhsd, ndim), lse.reshape(lse.shape[4 - ndim :])


def _exact(a, b, dtype):
    return np.matmul(a, b)
