"""Attention on JAX's arrays, as people call it."""

import inspect
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numflash.api.attention import attention as attention_of_numflash
from numflash.frontends.encoding import encode
from numflash.frontends.jax.calls import Call
from numflash.frontends.jax.transforms import attended
from numflash.frontends.wording import says
from numflash.problem.block_masks import NUMBER, ListedBlocks
from numflash.problem.options import ARRAY_OPTIONS, AttentionOptions, expect_one_of, kind_of
from numflash.runtime.views import fresh

# Of numflash.attention: who allocates, on which stream, and what needs the host to wait.
_NOT_HERE = {"return_lse", "return_decision", "check_lengths", "out", "stream"}
_NOT_HERE |= {"q_descale", "k_descale", "v_descale"}
_TAKEN = frozenset(
    name
    for name, each in inspect.signature(attention_of_numflash).parameters.items()
    if each.kind is each.KEYWORD_ONLY and name not in _NOT_HERE
)
_BROADCAST = ("bias", "mask")
_IMPLEMENTATIONS = ("numflash", "xla", "cudnn")


def attention(q, k, v, *, return_lse: bool = False, **options: Any):
    """`numflash.attention` on JAX's arrays: for jit, grad, vmap, scan, checkpoint and shard_map.

    Args:
        q, k, v: as of `numflash.attention`: (batch, seqlen, heads, head_dim), with layout="bhsd"
            (batch, heads, seqlen, head_dim); float16, bfloat16 or float32.
        return_lse: also return the log-sum-exp, (batch, heads, seqlen_q) float32, which has a
            gradient, too.
        options: those of `numflash.attention`, without out, stream, check_lengths, descales and
            return_decision. Arrays among them may be traced, and bias, sinks, alibi_slopes and
            arrays of `aux` that `score_mod` reads have gradients. Numbers may not: each other
            number is another program of XLA's. A seed that changes is an int32 array of one
            element.

    Under vmap the mapped axis is folded into the batch; with dropout, a block mask, functions of
    the batch entry, or mapped sinks, slopes or aux, its entries run one after another. For several
    devices call it in `jax.shard_map`, which runs it on each one's part: elsewhere XLA gathers
    the arrays first, because it cannot see into the call.

    Returns:
        out, or (out, lse).

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`, when the call is traced;
            for second derivatives, and where JAX has no CUDA device, UnsupportedError.

    Example:
        >>> import jax, numflash.jax
        >>> x = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
        >>> loss = jax.jit(lambda x: (numflash.jax.attention(x, x, x, causal=True) ** 2).sum())
        >>> jax.grad(loss)(x).shape
        (1, 16, 2, 8)
    """
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}")
    if unknown := sorted({*options} - _TAKEN):
        raise TypeError(
            f"numflash.jax.attention got options that it does not take: {', '.join(unknown)}; it "
            f"takes {', '.join(sorted(_TAKEN))}"
        )
    options = {name: as_option(name, value) for name, value in options.items()}
    q, k, v = (as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    # Two axes are those of one head, three those of one batch entry.
    of_one_head = (0, 1) if options.get("layout") == "bhsd" else (0, 2)
    missing = {2: of_one_head, 3: (0,)}.get(q.ndim, ())
    if not missing or not q.ndim == k.ndim == v.ndim:
        results = _attended(q, k, v, options)
    else:
        out, lse = _attended(*(jnp.expand_dims(x, missing) for x in (q, k, v)), options)
        results = jnp.squeeze(out, missing), jnp.squeeze(lse, (0, 1)[: len(missing)])
    return results if return_lse else results[0]


def _attended(q, k, v, options: dict[str, Any]):
    """(out, lse) of arrays of four axes."""
    asked = AttentionOptions.of("numflash.jax.attention", options)
    encoded = encode(asked, _view)
    names, arrays = ("q", "k", "v", *encoded.arrays), (q, k, v, *encoded.arrays.values())
    return attended(Call(encoded.text, names), *arrays)


@says(
    q="query",
    k="key",
    v="value",
    softmax_scale="scale",
    causal="is_causal",
    window_size="local_window_size",
    seqlens_q="query_seq_lengths",
    seqlens_k="key_value_seq_lengths",
)
def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
):
    """`jax.nn.dot_product_attention` by numflash, with its arguments and their meaning.

    Args:
        query: (batch, seqlen_q, heads, head_dim) or (seqlen_q, heads, head_dim).
        key, value: (batch, seqlen_k, heads_kv, head_dim), or without the batch; heads_kv divides
            heads.
        bias: broadcastable to (batch, heads, seqlen_q, seqlen_k): added to the scores. It has a
            gradient.
        mask: boolean, likewise: True keeps a key.
        scale: a number; None means head_dim ** -0.5.
        is_causal: query i sees the keys j <= i, whichever lengths the two sequences have.
        query_seq_lengths, key_value_seq_lengths: (batch,) int32: tokens that each entry has.
        local_window_size: (left, right), or one number for both: a query sees that many keys
            before and after its own position.
        implementation: None and "numflash" are numflash; "xla" and "cudnn" are JAX's own.
        return_residual: also return the log-sum-exp, (batch, seqlen_q, heads) in the dtype of
            query, which has no gradient.

    Where a query sees no key, the result is 0, as cuDNN has it; JAX's "xla" takes the mean of all
    values there.

    Returns:
        out, of the shape of query, or (out, residual).

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.

    Example:
        >>> import jax, numflash.jax
        >>> q = jax.random.normal(jax.random.key(0), (1, 16, 4, 8))
        >>> k = jax.random.normal(jax.random.key(1), (1, 24, 2, 8))
        >>> numflash.jax.dot_product_attention(q, k, k, local_window_size=8).shape
        (1, 16, 4, 8)
    """
    if implementation is not None:
        expect_one_of("implementation", implementation, _IMPLEMENTATIONS)
    if implementation in ("xla", "cudnn"):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            **({"return_residual": True} if return_residual else {}),
        )
    arrays = {"query": query, "key": key, "value": value}
    arrays = {name: as_array(name, x) for name, x in arrays.items()}
    for name, array in arrays.items():
        if array.ndim not in (3, 4):
            raise ValueError(f"{name} must have three or four axes, got shape {array.shape}")
        if array.ndim != arrays["query"].ndim:
            raise ValueError(
                f"{name} must have as many axes as query, {arrays['query'].ndim}, got shape "
                f"{array.shape}"
            )
    query, key, value = arrays.values()
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {key.shape}, got {value.shape}")
    if mask is not None and (mask := as_array("mask", mask)).dtype != bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}; an additive one is a bias")
    found = attention(
        query,
        key,
        value,
        return_lse=True,
        softmax_scale=scale,
        causal=is_causal,
        causal_align="top_left",
        window_size=_window(local_window_size),
        bias=bias,
        mask=mask,
        seqlens_q=query_seq_lengths,
        seqlens_k=key_value_seq_lengths,
    )
    out, lse = found
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(jnp.swapaxes(lse, -1, -2).astype(query.dtype))


def _window(size) -> tuple[int, int]:
    """local_window_size as numflash has it. Raises TypeError, ValueError."""
    if size is None:
        return -1, -1
    window = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if any(isinstance(n, bool) or not isinstance(n, Integral) for n in window):
        raise TypeError(f"local_window_size must be a number or two, got {size!r}")
    if len(window) != 2 or min(window) < 0:
        raise ValueError(f"local_window_size must be (left, right), 0 or more, got {size!r}")
    return int(window[0]), int(window[1])


def as_array(name: str, x):
    """An array of JAX's; others are taken where they lie. Raises TypeError."""
    if isinstance(x, np.ndarray | np.generic):
        return jnp.asarray(x)
    if isinstance(x, jax.Array):
        if not isinstance(x.dtype, np.dtype):
            raise TypeError(
                f"{name} must be an array of numbers, got a key of jax.random ({x.dtype}). A seed "
                'is made of one by jax.random.randint(key, (), 0, 2**31 - 1, "int32")'
            )
        return x
    if hasattr(x, "__dlpack__"):
        return jax.dlpack.from_dlpack(x)
    raise TypeError(f"{name} must be an array of JAX's or NumPy's, got {kind_of(x)}")


def as_option(name: str, value):
    """An option with JAX's arrays, and Python's numbers. Raises TypeError."""
    if name == "aux" and isinstance(value, tuple | list):
        return tuple(_number_or_array(f"aux{n}", x) for n, x in enumerate(value))
    if name == "block_mask" and isinstance(value, ListedBlocks):
        return value.with_arrays({n: as_array(n, x) for n, x in value.arrays().items()})
    if name in ARRAY_OPTIONS:
        is_number = value is None or (isinstance(value, NUMBER) and name == "seed")
        value = value if is_number else as_array(name, value)
        if name in _BROADCAST and value is not None and value.ndim < 4:
            value = value.reshape((1,) * (4 - value.ndim) + value.shape)
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, tuple | list):
        return tuple(_number(name, x) for x in value)
    return _number(name, value)


def _number(name: str, value):
    """An option that is no array, as Python has it. Raises TypeError for one that is traced."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be known when the call is traced, got {value}: make it a static "
            "argument of jit (static_argnames), or a number of the function's closure"
        )
    is_scalar = isinstance(value, np.generic) or (isinstance(value, jax.Array) and not value.ndim)
    return value.item() if is_scalar else value


def _number_or_array(name: str, x):
    return x if isinstance(x, NUMBER) else as_array(name, x)


def _view(x, name: str):
    """What tracing a function is told of an array: XLA's are dense."""
    return fresh(tuple(x.shape), x.dtype.name, device=-1)
