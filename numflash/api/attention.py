"""Attention and its gradients, as people call them."""

from collections.abc import Callable

from numflash.api.block_masks import with_own_block_mask
from numflash.calls.fp8_options import descales_of
from numflash.calls.ready import bind_backward, bind_forward
from numflash.configs import Config
from numflash.problem.fp8 import Fp8Recipe
from numflash.problem.options import AttentionOptions, GradientOptions


def attention(
    q,
    k,
    v,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    shift: int = 0,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes=None,
    sinks=None,
    dropout_p: float = 0.0,
    seed=None,
    origin: tuple[int, int, int] | None = None,
    bias=None,
    mask=None,
    score_mod: Callable | None = None,
    score_mod_grad: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: tuple = (),
    block_mask=None,
    seqlens_q=None,
    seqlens_k=None,
    starts_q=None,
    starts_k=None,
    check_lengths: bool = False,
    batch_invariant: bool = False,
    layout: str = "bshd",
    precision: str | None = None,
    fp8: Fp8Recipe | None = None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    max_rel_error: float | None = None,
    return_lse: bool = False,
    return_decision: bool = False,
    out_dtype: str | None = None,
    out=None,
    stream=None,
    config: str | Config | dict[str, str | Config] | None = None,
):
    """Attention, softmax(softmax_scale Q K^T) V, without storing the score matrix.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), float16, bfloat16 or float32. With layout
            "bhsd" the two middle axes are swapped. Three dimensions mean one batch entry, two one
            head. Any strides; only a last axis that is not contiguous is copied.
        k: (batch, seqlen_k, num_heads_kv, head_dim); num_heads_kv divides num_heads_q, and each
            group of num_heads_q // num_heads_kv query heads shares one key-value head.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v). Head dims are 1 to 256.
        softmax_scale: factor of Q K^T; None means head_dim ** -0.5.
        causal: each query sees the keys up to its own position.
        causal_align: where the diagonal lies if seqlen_q != seqlen_k: "bottom_right" (the last
            query sees the last key) or "top_left" (the first query sees only the first key). It
            also aligns window_size and alibi_slopes.
        shift: added to the alignment: every query's own position is that many keys further on,
            for masks, windows and alibi_slopes. For parts of a sequence that are not its ends:
            with causal_align="top_left" queries q0 to q1 and keys k0 to k1 take q0 - k0.
        window_size: (left, right): a query sees that many keys before and after its own position,
            inclusive; -1 or None is no limit. Hidden keys get the weight zero, but within a
            tile they are multiplied all the same: a NaN or infinity in a hidden row of v makes NaN
            of the queries that share a computed tile with it (docs/decisions.md, "Masks").
            Nothing beyond the ends of a sequence does.
        softcap: scores s become softcap * tanh(s / softcap); 0 is off.
        alibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q): slope * distance is
            subtracted from a score, after softcap.
        sinks: float32, (num_heads_q,): a logit of each query head that is part of the sum of
            each of its rows, as one more score without a key or value: P of a row adds up to
            less than 1. lse includes it; -inf is none.
        dropout_p: the share of the weights P that become 0, at random; the others are divided by
            the share that stays. It is rounded to a multiple of 2**-16. lse is without dropout.
        seed: with dropout_p, which weights these are: an integer of at most 64 bits, or an array
            of one int64, uint64 or int32 on the device, which kernels read when they run, so that
            a CUDA graph can change it. A weight is dropped for the seed and its batch entry, head,
            query and key alone, whatever kernel runs: `numflash.reference.dropout_mask` says
            which are kept. The backward takes the same. Another seed compiles nothing.
        origin: (row, column, head): a part of a larger problem says where it begins there: the
            numbers of its first query, key and query head, as features see them. alibi_slopes
            and sinks then are those of all heads of the larger problem. Masks, windows and the
            distances of ALiBi go by `shift`: with causal_align="top_left", row - column.
        bias: float16, bfloat16 or float32, broadcastable to (batch, num_heads_q, seqlen_q,
            seqlen_k), any strides: added to the scaled scores, after softcap and ALiBi.
        mask: boolean, broadcastable in the same way: True keeps a key, False hides it.
        score_mod: score_mod(score, batch, head, q_idx, kv_idx, *aux) -> score, a Python function
            of symbolic numbers (`numflash.math`): what becomes of a score, which arrives scaled,
            after softcap, ALiBi and bias, and before masks.
        score_mod_grad: the derivative of score_mod by the score, of the same arguments. numflash
            finds it, unless score_mod has a Python `if` that depends on a symbol.
        mask_mod: mask_mod(batch, head, q_idx, kv_idx, *aux) -> boolean: which keys a query sees,
            besides what mask, causal and window_size hide.
        aux: arrays, and numbers that change from call to call, that score_mod and mask_mod get.
            Numbers that a function closes over are constants of its kernel.
        block_mask: a `BlockMask`, as `create_block_mask` makes it, or FlexAttention's: which
            blocks of queries and keys are computed at all, and the function that decides within
            those that are partly kept, which need not be given as mask_mod again.
        seqlens_q, seqlens_k: (batch,) int32 on the device: how many queries, and keys, each batch
            entry really has; the rows behind them are padding, whose result is 0 and whose lse is
            -inf. causal_align and shift hold for each entry by itself. Nothing waits for the
            numbers, and a captured graph may be replayed with others; those that lead out of the
            arrays are cut. `attention_varlen` takes sequences that lie one after another.
        starts_q, starts_k: (batch,) int32 on the device: the row at which each entry begins.
        check_lengths: read the lengths back, which waits for the device, and raise ValueError
            where one leads out of its array.
        batch_invariant: with seqlens_k or packed sequences, the bits of a query's result depend on
            its own sequence alone: they are the same in any batch, at any place in it, and whether
            the query is the last of many or the only one. Costs speed, and memory for long keys
            (docs/sequences.md).
        layout: "bshd" or "bhsd", of q, k, v and the result.
        precision: "tf32" allows float32 to be multiplied on tensor cores, with operands rounded
            to 10 bits after the point; where there is no such kernel (head dims above 128,
            Turing), and with None, products are exact. "fp8" quantises q, k and v, float16 or
            bfloat16, to e4m3 and multiplies that, also P: on the tensor cores of Ada, Hopper
            and Blackwell's sm_120, elsewhere as float16. Sums are float32 in all cases.
            "auto" does so for the key-value heads whose error stays within max_rel_error, by an
            estimate from their quantised blocks, and computes the others in 16 bits.
        fp8: with precision="fp8", how to quantise; None is `Fp8Recipe()`: a scale for each 128
            tokens of a head, and q and k rotated. Any of q, k and v may also be an `Fp8Array`, as
            `quantize_fp8` makes it; precision then is "fp8" and need not be said.
        q_descale, k_descale, v_descale: float32, (batch, num_heads_kv): scales of q, k and v that
            are e4m3 codes (uint8 or an 8-bit float dtype) of the caller's own, each value being
            code * descale. The result then is bfloat16 (float16 on Turing), or what `out` is.
        max_rel_error: with precision="auto", the root mean square of a head's error relative to
            that of its result; None means 0.1. The error of 8 bits on random numbers is 0.05.
        return_lse: also return the log-sum-exp.
        return_decision: with precision="auto", also return which heads were computed in 8 bits.
        out_dtype: "float32" leaves the result in float32, as it was summed, where q, k and v have
            fewer bits; None is the dtype of q.
        out: an array to write the result to; it must not overlap an input. What reads it must
            come after the call on `stream`.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of q.
        config: run the kernel with this config, as in "sm80-m128n64w4s1"; a dictionary may also
            name one for the "combine" of split keys, next to "forward". None lets numflash choose:
            one that `numflash-tune` has found, else one by rule. `explain_dispatch` names it.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) in the layout and kind of q, and its dtype
            or out_dtype. A query that sees no key gives 0.
        lse: with return_lse, (batch, num_heads_q, seqlen_q) float32: the natural logarithm of the
            sum of exponentials of the scores; where a query sees no key -inf, or its sink. Without
            batch or heads axes in q, these are absent here too.
        decision: with return_decision, a `PrecisionDecision`.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: shapes that do not fit together, values out of range.
        UnsupportedError: possible in principle, not here (head_dim above 256, an old GPU, a
            tensor that requires a gradient while PyTorch's gradients are enabled, ...).

    The kernels are enqueued, not waited for. A CUDA graph can capture a call once its kernels are
    compiled and loaded: by an equal call or `plan` before, or by `warmup`. Memory beyond the
    results: nothing, or, where few queries make it worthwhile to split the keys over blocks,
    num_splits float32 copies of the results; with precision="fp8" codes and scales of what is
    quantised.

    Sources: FlashAttention-2, arXiv 2307.08691; FlashAttention-3, arXiv 2407.08608, for FP8.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((1, 32, 2, 16), (1, 2, 32))
    """
    # By position, which is faster: a test holds the names together.
    options = AttentionOptions(
        softmax_scale,
        causal,
        causal_align,
        shift,
        window_size,
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        seed,
        origin,
        bias,
        mask,
        score_mod,
        score_mod_grad,
        mask_mod,
        aux,
        block_mask,
        seqlens_q,
        seqlens_k,
        starts_q,
        starts_k,
        layout,
        precision,
        config,
        batch_invariant,
        fp8,
        max_rel_error,
        out_dtype,
    )
    options = with_own_block_mask(options, stream)
    if return_decision and precision != "auto":
        raise ValueError(f'return_decision goes with precision="auto", got {precision!r}')
    descales = descales_of(q_descale, k_descale, v_descale)
    bound = bind_forward(q, k, v, out, options, stream, descales, check_lengths)
    result, lse, decision = bound.launch(bound.stream)
    if not (return_lse or return_decision):
        return result
    return (result, *([lse] * return_lse), *([decision] * return_decision))


def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    shift: int = 0,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes=None,
    sinks=None,
    dropout_p: float = 0.0,
    seed=None,
    origin: tuple[int, int, int] | None = None,
    bias=None,
    mask=None,
    score_mod: Callable | None = None,
    score_mod_grad: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: tuple = (),
    block_mask=None,
    seqlens_q=None,
    seqlens_k=None,
    starts_q=None,
    starts_k=None,
    check_lengths: bool = False,
    layout: str = "bshd",
    precision: str | None = None,
    dlse=None,
    delta=None,
    wrt: tuple[str, ...] | None = None,
    grad_dtype: str | None = None,
    stream=None,
    config: dict[str, str | Config] | None = None,
):
    """The gradients of `attention`, with respect to q, k and v or what `wrt` names.

    Args:
        dout: gradient of the result, shaped like it.
        q, k, v: as given to `attention`.
        out, lse: as returned by `attention(..., return_lse=True)`. With delta out is not read,
            and may be None. out may be float32, as out_dtype leaves it; dout has the dtype of q.
        softmax_scale, causal, causal_align, shift, window_size, softcap, alibi_slopes, sinks,
            dropout_p, seed, origin, bias, mask, score_mod, score_mod_grad, mask_mod, aux,
            block_mask, seqlens_q, seqlens_k, starts_q, starts_k, check_lengths, layout, precision,
            stream: as given to `attention`.
        dlse: gradient of lse, where a loss depends on it: shaped like lse, float32, any strides.
        delta: the sum over head_dim_v of dout * out, where the caller has it: shaped like lse,
            float32, any strides.
        wrt: what to return gradients of, in this order: "q", "k", "v"; with sinks "sinks"; with
            alibi_slopes "alibi_slopes"; with bias "bias"; "aux0", "aux1", ... of arrays of
            float16, bfloat16 or float32 that score_mod reads. Kernels that make none of them do
            not run. None is ("q", "k", "v"), and with sinks also "sinks".
        grad_dtype: "float32" leaves dq, dk and dv, and gradients of arrays that scores read, in
            float32, as they were summed, where q, k and v have fewer bits; None is the dtype of q,
            and of the array.
        config: kernels to run instead of those that numflash chooses, by family: "backward-dkdv"
            and "backward-dq"; or "backward", one kernel for all gradients, which takes five
            products a tile instead of seven and num_splits float32 copies of dq, on Hopper one;
            "backward-rows", "backward-columns", "backward-tiles" and "backward-scatter" of arrays.

    Returns:
        A tuple with a gradient for each name in wrt.
        dq, dk, dv: shaped like q, k and v, contiguous. Queries that see no key have gradient 0.
        dsinks: (num_heads_q,) float32: the sum over a head's rows of
            exp(sink - lse) * (dlse - dout . out).
        dalibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q), as the slopes: the sum of
            -dS * distance, of dS by scores. With origin both have the shape of the larger
            problem's, and zeros where this call has no heads.
        dbias, daux0, ...: of the shape and dtype of the array, contiguous, summed in float32. An
            axis of one element is summed over; along an axis of stride 0, of a broadcast view,
            each element has a gradient of its own. Elements that no score reads have gradient 0.
            An array that is read once, at batch, head, q_idx and kv_idx themselves, has a sum in
            a fixed order. Any other, as a table that is read at a computed place, has one of
            integers of 64 bits, in units of at most 2 ** -59 of the sum of all absolute values:
            each score loses less than one. Where one of them is infinite or NaN, all are NaN.
        The same call gives the same bits every time: floats are added in a fixed order.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.

    Needs two float32 workspaces of batch x num_heads_q x seqlen_q, and one more, or one of
    batch x num_heads_q x seqlen_k, for each array of heads in wrt and each array that scores
    read; none for one with an axis of queries and one of keys. One that is read at computed places
    takes 8 bytes for each of its elements. Where one kernel makes all gradients, as on Hopper from
    some thousand tiles of keys on, dq in float32 comes to that.

    Source: FlashAttention, arXiv 2205.14135, Algorithm 4.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
        >>> dout = np.ones_like(out)
        >>> dq, dk, dv = numflash.attention_backward(dout, q, k, v, out, lse, causal=True)
        >>> dq.shape == q.shape, dv.dtype
        (True, dtype('float16'))
        >>> (dv,) = numflash.attention_backward(dout, q, k, v, out, lse, causal=True, wrt=("v",))
        >>> dv.shape == v.shape
        True
    """
    options = AttentionOptions(
        softmax_scale,
        causal,
        causal_align,
        shift,
        window_size,
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        seed,
        origin,
        bias,
        mask,
        score_mod,
        score_mod_grad,
        mask_mod,
        aux,
        block_mask,
        seqlens_q,
        seqlens_k,
        starts_q,
        starts_k,
        layout,
        precision,
        config,
    )
    options = with_own_block_mask(options, stream)
    asked = GradientOptions(dlse, delta, wrt, grad_dtype)
    results = out, lse
    bound = bind_backward(dout, q, k, v, *results, options, asked, stream, check_lengths)
    return bound.launch(bound.stream)
