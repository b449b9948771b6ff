"""torch's `scaled_dot_product_attention`, by numflash where numflash can, else by torch itself.

`arrange` decides: it turns a call into one of `attention`, or says why torch's own must run.
Nothing else knows what numflash lacks, so that a call, the overriding of torch's operator
(`enabling`) and `explain` agree.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from numflash.configs.traits import MAX_HEAD_DIM
from numflash.frontends.torch import context_parallel
from numflash.frontends.torch.attention import attention
from numflash.frontends.torch.calls import DTYPES, under_autocast
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED

_NAMES = "query", "key", "value", "attn_mask"
_IS_ROCM = bool(torch.version.hip)
_STRIDED = torch.strided
_DEVICE = "cpu" if SIMULATED else "cuda"
_WHERE = (
    "CPU in the simulator (NUMBA_ENABLE_CUDASIM=1), as this process does"
    if SIMULATED
    else "CUDA devices, and the CPU where NUMBA_ENABLE_CUDASIM=1 is set before Python starts"
)
# With those of tensors that torch traces with. Other classes mean something by being one.
_PLAIN = Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor
# Which fused kernels torch may use. Dynamo knows these names, and not the public ones.
_has_flash = torch._C._get_flash_sdp_enabled
_has_efficient = torch._C._get_mem_efficient_sdp_enabled
_has_cudnn = torch._C._get_cudnn_sdp_enabled
_NUMBERS = float, int, torch.SymFloat


class Reason(NamedTuple):
    """Why torch's own attention runs.

    Attributes:
        text: a sentence.
        is_error: torch raises an error for this call.
    """

    text: str
    is_error: bool = False


class Arranged(NamedTuple):
    """A call as one of `numflash.torch.attention`.

    Attributes:
        q, k, v: views of four dimensions, in the order of the layout that `options` say.
        options: of the call; with dropout `attention` draws the seed.
        shape: of the result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    shape: tuple[int, ...]

    def of(self, out: Tensor) -> Tensor:
        """The result of the call, of that of `attention`."""
        return out.transpose(1, 2) if self.options["layout"] == "bshd" else out.view(self.shape)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by numflash where numflash can.

    Where it cannot (float64, head dims above 256, devices without kernels, ...) torch's own runs;
    `explain` says why.

    Args:
        query: (..., heads, seqlen_q, head_dim), of 2 dimensions or more. float16, bfloat16 and
            float32 are numflash's.
        key: (..., heads, seqlen_k, head_dim). Leading dimensions broadcast, heads, too.
        value: (..., heads, seqlen_k, head_dim_v).
        attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k). Boolean: True keeps a key.
            float32 or of query's dtype: added to the scaled scores, with a gradient. torch's
            `CausalBias`, too.
        dropout_p: share of the weights that become 0; from torch's generator of query's device.
        is_causal: query i sees the keys up to i, also where seqlen_q != seqlen_k.
        scale: factor of the scores; None means head_dim ** -0.5.
        enable_gqa: query may have a multiple of the heads of key and value.

    Returns:
        (..., heads, seqlen_q, head_dim_v). A query that sees no key gives 0. Of four dimensions
        its `transpose(1, 2)` is contiguous, as that of torch's flash kernels.

    Raises:
        As torch's math path raises: RuntimeError for dtypes and shapes that do not fit and for
        attn_mask together with is_causal, TypeError for types.
        UnsupportedError: a second derivative, which only torch's math path has
            (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, inside which torch's own runs).

    Example:
        >>> import torch, numflash.torch
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()
        >>> out = numflash.torch.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> out.shape
        torch.Size([2, 4, 16, 8])
    """
    call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    out = attended(*call)
    if not isinstance(out, Reason):
        return out
    with by(out):
        return functional.scaled_dot_product_attention(
            *call[:6], scale=scale, enable_gqa=enable_gqa
        )


def attended(*call) -> Tensor | Reason:
    """The result of a call, in the order of torch's parameters, or why torch's own must run."""
    arranged = arrange(*call)
    if context_parallel.opened:
        return context_parallel.attended(arranged, _on_one_device)
    return _on_one_device(arranged)


def _on_one_device(arranged: "Arranged | Reason") -> Tensor | Reason:
    if isinstance(arranged, Reason):
        return arranged
    q, k, v, options, _ = arranged
    try:
        return arranged.of(attention(q, k, v, **options))
    except UnsupportedError as error:
        return Reason(str(error))


def by(reason: Reason):
    """Inside, torch's own runs: the math path where it is to raise an error."""
    return sdpa_kernel(SDPBackend.MATH) if reason.is_error else nullcontext()


def arrange(
    query,
    key,
    value,
    attn_mask,
    dropout_p,
    is_causal,
    scale,
    enable_gqa,
    *,
    is_on: str | None = _DEVICE,
    cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> Arranged | Reason:
    """A call as one of `attention`, or why torch's own must run.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: torch's.
        is_on: the type of the device that tensors must be on; None is any.
        cast: (tensor, dtype) -> the tensor in another dtype, for autocast.
    """
    align = "top_left"
    if attn_mask is not None and type(attn_mask) not in _PLAIN:
        # Imported here, because Dynamo comes with it: who has such a mask has it already.
        from torch.nn.attention.bias import CausalBias, CausalVariant

        if type(attn_mask) is CausalBias:
            if is_causal or not _is_of_shape(attn_mask, query, key):
                return Reason(
                    "attn_mask is a CausalBias of other lengths, or is_causal is given, too"
                )
            if attn_mask.variant is CausalVariant.LOWER_RIGHT:
                align = "bottom_right"
            attn_mask, is_causal = None, True
    if (
        type(is_causal) is not bool
        or type(enable_gqa) is not bool
        or not (type(dropout_p) is float or _is_number(dropout_p))
        or not (scale is None or _is_number(scale))
    ):
        return Reason(
            "dropout_p and scale must be numbers, is_causal and enable_gqa True or False"
        )
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    for n, x in enumerate(tensors):
        if type(x) not in _PLAIN:
            return Reason(f"{_NAMES[n]} is a {type(x).__name__}: numflash takes plain tensors")
        if x.layout is not _STRIDED or x.is_nested:
            return Reason(f"{_NAMES[n]} is nested or {x.layout}: numflash takes dense tensors")
    device = query.device
    if is_on is not None and (device.type != is_on or _IS_ROCM):
        return Reason(f"query is on {device}: numflash runs on {_WHERE}")
    for x in tensors:
        if x.device != device:
            return _wrong("tensors on several devices")
    if not (_has_flash() or _has_efficient() or _has_cudnn()):
        # As who want second derivatives ask for it.
        return Reason("torch.nn.attention.sdpa_kernel asks for torch's math path alone")
    query, key, value, attn_mask = under_autocast(query, key, value, attn_mask, cast=cast)
    dtype = query.dtype
    if key.dtype != dtype or value.dtype != dtype:
        return _wrong("dtypes of query, key and value that differ")
    if dtype not in DTYPES:
        return Reason(f"query is {dtype}: numflash takes float16, bfloat16 and float32")
    if not 0 <= dropout_p < 1:
        return Reason(f"dropout_p is {dropout_p}: numflash takes at least 0 and below 1")
    if scale is not None:
        # Of a traced graph with varying head dims a symbol, of NumPy a scalar.
        scale = float(scale)
        if not math.isfinite(scale):
            return Reason(f"scale is {scale}: numflash takes finite numbers")
    shaped = _in_four_dimensions(query, key, value, enable_gqa)
    if type(shaped) is Reason:
        return shaped
    q, k, v, scores, lead, shape = shaped
    options: dict[str, Any] = {"layout": "bhsd", "softmax_scale": scale}
    if attn_mask is not None:
        if is_causal:
            return _wrong("attn_mask together with is_causal")
        if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
            return _wrong(f"attn_mask is {attn_mask.dtype}: not boolean, float32 or query's dtype")
        if attn_mask.dim() > max(query.dim(), key.dim()) or not _fits(attn_mask.shape, scores):
            return _wrong(f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast")
        option = "mask" if attn_mask.dtype is torch.bool else "bias"
        options[option] = _flattened(attn_mask, lead)
    if is_causal:
        options |= {"causal": True, "causal_align": align}
    if dropout_p:
        options["dropout_p"] = dropout_p
    if len(shape) == 4:
        options["layout"] = "bshd"
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return Arranged(q, k, v, options, shape)


def _wrong(what: str) -> Reason:
    return Reason(f"torch refuses {what}", is_error=True)


def _is_number(x) -> bool:
    return type(x) in _NUMBERS or isinstance(x, Real)


def _is_of_shape(mask: Tensor, query, key) -> bool:
    shape = mask.seq_len_q, mask.seq_len_kv
    both = isinstance(query, Tensor) and isinstance(key, Tensor)
    return both and query.dim() > 1 < key.dim() and shape == (query.shape[-2], key.shape[-2])


def _in_four_dimensions(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool):
    """(q, k, v, shape of scores, lead, shape of result), or why torch's own must run.

    q, k and v are (batch, heads, seqlen, head_dim); scores have as many dimensions as the call, at
    least four; lead is (..., heads), of which batch is the product.
    """
    rank = query.dim()
    if rank == 4 == key.dim() == value.dim():
        # The usual call, sooner; what follows says the same of it.
        batch, heads, seqlen_q, head_dim = query.shape
        batch_k, heads_k, seqlen_k, head_dim_k = key.shape
        if (
            batch_k == batch
            and heads_k == heads
            and head_dim_k == head_dim
            and 1 <= head_dim <= MAX_HEAD_DIM
            and heads
            and key.shape == value.shape
        ):
            lead = (batch, heads)
            shape = (batch, heads, seqlen_q, head_dim)
            return query, key, value, (batch, heads, seqlen_q, seqlen_k), lead, shape
    rank = max(rank, key.dim(), value.dim())
    least = min(query.dim(), key.dim(), value.dim())
    if least < 2 or (enable_gqa and least < 3):
        return _wrong("tensors of so few dimensions")
    q, k, v = (_of_rank(x, max(rank, 4)) for x in (query, key, value))
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return _wrong("shapes of query, key and value that do not fit")
    for name, head_dim in (("query", q.shape[-1]), ("value", v.shape[-1])):
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            return Reason(f"head_dim of {name} is {head_dim}: numflash takes 1 to {MAX_HEAD_DIM}")
    heads, heads_k, heads_v = q.shape[-3], k.shape[-3], v.shape[-3]
    # Leading dimensions, with heads unless these are grouped.
    before = -3 if enable_gqa else -2
    scores = _broadcast(q.shape[:before], k.shape[:before])
    lead = None if scores is None else _broadcast(scores, v.shape[:before])
    if lead is None:
        return _wrong("leading dimensions that do not broadcast")
    if enable_gqa:
        if 0 in (heads_k, heads_v) or heads % heads_k or heads % heads_v:
            return _wrong("heads of key and value that do not divide those of query")
        scores, lead = (*scores, heads), (*lead, heads)
    if heads_k != heads_v and enable_gqa:
        return Reason(
            f"key has {heads_k} heads and value {heads_v}: numflash takes equally many of both"
        )
    if not lead[-1]:
        return Reason("query has 0 heads: numflash takes at least 1")
    # One head of keys and values for all is a group: their gradients add up in the kernel.
    grouped = enable_gqa or heads_k == heads_v == 1
    q = _expanded(q, lead)
    k, v = (_expanded(x, (*lead[:-1], heads_k) if grouped else lead) for x in (k, v))
    shape = *lead[len(lead) + 2 - rank :], q.shape[-2], v.shape[-1]
    return q, k, v, (*scores, q.shape[-2], k.shape[-2]), lead, shape


def _of_rank(x: Tensor, rank: int) -> Tensor:
    return x[(None,) * (rank - x.dim())] if x.dim() < rank else x


def _expanded(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """x of (batch, heads, ...), its leading dimensions broadcast to `lead`."""
    if x.shape[:-2] != lead:
        x = x.expand(*lead, -1, -1)
    return x if x.dim() == 4 else x.flatten(0, -4)


def _flattened(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A mask in at most four dimensions; one for all the batch stays so."""
    if len(lead) == 2:
        return mask
    mask = _of_rank(mask, len(lead) + 2)
    if any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*lead[:-1], -1, -1, -1)
    return mask.flatten(0, -4)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Two shapes of one rank broadcast; None where they do not."""
    if any(m != n and m != 1 and n != 1 for m, n in zip(a, b, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    return all(m in (1, n) for m, n in zip(reversed(shape), reversed(into), strict=False))
