"""Attention of sequences that lie one after another, and its gradients."""

from numflash.api.schedules import Schedule
from numflash.calls.ready import bind_backward, bind_forward
from numflash.problem.options import PACKED, AttentionOptions, GradientOptions

_NOT_HERE = ("layout", "block_mask", "appended", "cached")


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    schedule: Schedule | None = None,
    *,
    return_lse: bool = False,
    out=None,
    check_lengths: bool = False,
    stream=None,
    **options,
):
    """Attention of sequences that lie one after another, each with its own queries and keys.

    The lengths stay on the device: nothing waits for them, and a captured CUDA graph may be
    replayed with others. Sequences may be empty, and have more queries than keys.

    Args:
        q: (tokens_q, num_heads_q, head_dim): the queries of all sequences.
        k: (tokens_k, num_heads_kv, head_dim); v: (tokens_k, num_heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 on the device: sequence s has the rows
            cu_seqlens[s] up to cu_seqlens[s + 1].
        max_seqlen_q, max_seqlen_k: accepted because other libraries ask for them; they decide
            nothing.
        schedule: the result of `plan_varlen` for the same arrays. Its lists of tiles are used, and
            made by the first call that needs them. None makes lists for this call.
        return_lse: also return the log-sum-exp.
        out: an array to write the result to; rows that no sequence has are left as they are.
        check_lengths: read the lengths back, which waits for the device, and raise ValueError
            where a sequence leads out of its array, or where two have a row of q in common.
        stream: as in `attention`.
        options: those of `attention`, without layout, block_mask and 8-bit floats; among them
            seqlens_q, seqlens_k, starts_q and starts_k, here (sequences,) int32 on the device:
            with starts a sequence begins there, with seqlens it has so many rows, whatever
            cu_seqlens says; where both are given, cu_seqlens is not needed. causal_align and shift
            hold for each sequence by itself. Functions, ALiBi and dropout count queries and keys
            from the beginning of a sequence; its number is their batch entry. A bias or a mask
            broadcasts to (sequences, heads, queries, keys), with at least the queries and keys of
            the longest sequence; a longer sequence is cut to what it has.

    Returns:
        out: (tokens_q, num_heads_q, head_dim_v); rows that no sequence has are 0.
        lse: with return_lse, (num_heads_q, tokens_q) float32, -inf where no sequence has the row.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`; also lengths that are not int32,
            or not on the device of q. Numbers in them that lead out of the arrays raise nothing:
            they are cut, so that nothing outside is read or written; `check_lengths` reports them.

    Memory: 32 bytes for each tile of queries, of which there are at most as many as whole tiles of
    all tokens and one more for each sequence. Where keys are split, also parts in float32
    (docs/sequences.md, "The same bits in every batch" and "The order of tiles").

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 30, 2, 16)).astype("float16")
        >>> cu_seqlens = np.array([0, 12, 12, 30], np.int32)
        >>> out = numflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
        >>> alone = numflash.attention(q[12:], k[12:], v[12:], causal=True)
        >>> out.shape, bool(np.allclose(out[12:], alone, atol=1e-2))
        ((30, 2, 16), True)
    """
    asked = _options("attention_varlen", options, cu_seqlens_q, cu_seqlens_k, schedule)
    bound = bind_forward(q, k, v, out, asked, stream, check_lengths=check_lengths)
    result, lse, _ = bound.launch(bound.stream)
    return (result, lse) if return_lse else result


def attention_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    schedule: Schedule | None = None,
    *,
    dlse=None,
    delta=None,
    wrt: tuple[str, ...] | None = None,
    grad_dtype: str | None = None,
    check_lengths: bool = False,
    stream=None,
    **options,
):
    """The gradients of `attention_varlen`.

    Args:
        dout: gradient of the result, shaped like it.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, schedule, options: as
            given there.
        out, lse: as returned by `attention_varlen(..., return_lse=True)`. In rows that no sequence
            has lse is -inf there, and must be: all others count for the gradient of sinks.
        dlse, delta, wrt, grad_dtype, stream: as in `attention_backward`; dlse and delta are shaped
            like lse. Of alibi_slopes the gradient is of those of shape (num_heads_q,).
        check_lengths: as in `attention_varlen`; sequences that share a row of k are refused, too.
            Without it the gradients of such a call are undefined, those of its other sequences
            too.

    Returns:
        A tuple with a gradient for each name in wrt, by default dq, dk and dv; rows that no
        sequence has are 0. The same call gives the same bits every time.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention_varlen`.

    Memory: as `attention_backward`, and a list of tiles of queries and one of tiles of keys, each
    as that of `attention_varlen`.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 30, 2, 16)).astype("float16")
        >>> cu = np.array([0, 12, 30], np.int32)
        >>> out, lse = numflash.attention_varlen(q, k, v, cu, cu, causal=True, return_lse=True)
        >>> dout = np.ones_like(out)
        >>> dq, dk, dv = numflash.attention_varlen_backward(
        ...     dout, q, k, v, out, lse, cu, cu, causal=True
        ... )
        >>> dq.shape == q.shape, dv.dtype
        (True, dtype('float16'))
    """
    name = "attention_varlen_backward"
    asked = _options(name, options, cu_seqlens_q, cu_seqlens_k, schedule)
    of_gradients = GradientOptions(dlse, delta, wrt, grad_dtype)
    results = out, lse
    bound = bind_backward(dout, q, k, v, *results, asked, of_gradients, stream, check_lengths)
    return bound.launch(bound.stream)


def _options(function: str, given: dict, cu_seqlens_q, cu_seqlens_k, schedule) -> AttentionOptions:
    """The options of a call on packed arrays. Raises TypeError."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be what plan_varlen returns, got {schedule!r}")
    for name in _NOT_HERE:
        if name in given:
            raise TypeError(f"{function} has no {name}")
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "layout": PACKED}
    packed["schedule"] = schedule
    return AttentionOptions.of(function, given | packed)
