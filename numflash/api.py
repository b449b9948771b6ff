"""The public functions: check the arguments, pick the configs, allocate, launch.

Checking and picking happen once for each distinct problem; calls with the same shapes, strides,
dtypes and options then find a ready `calls.Forward` or `calls.Backward` under the problem's key
and only allocate and launch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numflash import tuned
from numflash.arrays import library_of, on_stream, stream_address
from numflash.calls import DEFAULTS, Backward, Forward, expect_known
from numflash.compiler import get_cubin
from numflash.configs import Config, MmaConfig, Traits, padded_head_dim
from numflash.dispatch import choose, num_splits
from numflash.fp8 import Fp8Array, Fp8Recipe, PrecisionDecision
from numflash.fp8_calls import AutoForward, Fp8Forward
from numflash.fp8_options import (
    MAX_REL_ERROR,
    has_fp8,
    refuse_backward,
    take_apart,
    with_budget,
)
from numflash.launch import limits_of_device, load, multiprocessors
from numflash.mode import SIMULATED
from numflash.problem import expect_contiguous_rows, expect_head_dim, expect_precision
from numflash.selection import BACKWARD, device_key
from numflash.store import generation
from numflash.views import ArrayView, contiguous_strides

# Ready launches by problem; emptied when it grows past this, so that varying shapes cannot leak.
_MAX_READY = 4096
_LONG, _MANY = 2**20, 2**10
_ready: dict[tuple, Any] = {}


def attention(
    q,
    k,
    v,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes=None,
    layout: str = "bshd",
    precision: str | None = None,
    fp8: Fp8Recipe | None = None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    max_rel_error: float | None = None,
    return_lse: bool = False,
    return_decision: bool = False,
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
        window_size: (left, right): a query sees that many keys before and after its own position,
            inclusive; -1 or None is no limit. What is hidden gets the weight zero, but within a
            tile it is multiplied all the same: a NaN or infinity in a hidden row of v makes NaN
            of the queries that share a computed tile with it (docs/architecture.md, "Masks").
            Nothing beyond the ends of a sequence does.
        softcap: scores s become softcap * tanh(s / softcap); 0 is off.
        alibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q): slope * distance is
            subtracted from a score, after softcap.
        layout: "bshd" or "bhsd", of q, k, v and the result.
        precision: "tf32" allows float32 to be multiplied on tensor cores, with operands rounded
            to 10 bits after the point; where they have no kernel for it (head dims above 128,
            Turing) and with None products are exact. "fp8" quantises q, k and v, float16 or
            bfloat16, to e4m3 and multiplies that, also P: at twice the rate where `mma.sync` has
            it (Ada, Blackwell's sm_120), elsewhere as float16. Sums are float32 in all cases.
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
        out: an array to write the result to; it must not overlap an input. What reads it must
            come after the call on `stream`.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of q.
        config: run the kernel with this config, as in "sm80-m128n64w4s1"; a dictionary may also
            name one for the "combine" of split keys, next to "forward". None lets numflash choose:
            what `numflash-tune` has found, else by rule. `explain_dispatch` tells what it chooses.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) in the layout, dtype and kind of q. A
            query that sees no key gives 0.
        lse: with return_lse, (batch, num_heads_q, seqlen_q) float32: the natural logarithm of the
            sum of exponentials of the scores; -inf where a query sees no key. Without batch or
            heads axes in q, these are absent here too.
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
    """
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "causal_align": causal_align,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "layout": layout,
        "precision": precision,
        "config": config,
        "fp8": fp8,
        "max_rel_error": max_rel_error,
    }
    if return_decision and precision != "auto":
        raise ValueError(f'return_decision goes with precision="auto", got {precision!r}')
    descales = q_descale, k_descale, v_descale
    bound = _bind_forward(q, k, v, out, options, stream, descales)
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
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes=None,
    layout: str = "bshd",
    precision: str | None = None,
    stream=None,
    config: dict[str, str | Config] | None = None,
):
    """The gradients of `attention` with respect to q, k and v.

    Args:
        dout: gradient of the result, shaped like it.
        q, k, v: as given to `attention`.
        out, lse: as returned by `attention(..., return_lse=True)`.
        softmax_scale, causal, causal_align, window_size, softcap, alibi_slopes, layout, precision,
            stream: as given to `attention`.
        config: kernels to run instead of those that numflash chooses, by family: "backward-dkdv"
            and "backward-dq"; or "backward", one kernel for all gradients, which takes five
            products a tile instead of seven and num_splits more float32 copies of dq.

    Returns:
        dq, dk, dv: shaped like q, k and v, contiguous. Queries that see no key have gradient 0.
        The same call gives the same bits every time: no atomics.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.

    Needs two float32 workspaces of batch x num_heads_q x seqlen_q.

    Source: FlashAttention, arXiv 2205.14135, Algorithm 4.
    """
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "causal_align": causal_align,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "layout": layout,
        "precision": precision,
        "config": config,
        "fp8": None,
        "max_rel_error": None,
    }
    refuse_backward(q, k, v, precision)
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse}
    backward, operands, stream = _prepare(Backward, arrays, options, stream)
    library = library_of(q, "q")

    def work(stream: int) -> tuple:
        gradients = backward(operands, library, stream)
        return tuple(library.hand_back(g, q, stream) for g in gradients)

    return on_stream(work, stream, backward.device, arrays, operands)


class Plan:
    """An attention call made ready: the same arrays, launched again and again.

    Everything is checked, compiled, allocated and packed once, by `numflash.plan`. A launch reads
    q, k and v where they are and writes `out` and `lse`.

    Attributes:
        out: the result, as `attention` returns it.
        lse: the log-sum-exp, as `attention` returns it.
        kernel: which kernel runs: family, config and what it was compiled for.
        decision: with precision="auto" a `PrecisionDecision`, made anew by each launch.

    Where q is of a library that is seen through CuPy, each launch hands the same memory back anew,
    so that this library's work comes after the launch: take the results from the plan then.
    """

    def __init__(self, bound: "_BoundForward"):
        """Made by `numflash.plan`."""
        self._bound, self.kernel = bound, bound.kernel
        self.out, self.lse, self.decision = bound.hand_back(bound.stream)

    def launch(self, stream=None):
        """Enqueue the kernel and return `out`.

        Args:
            stream: a CUDA stream or its address; None is the one current when the plan was made.
        """
        address = self._bound.stream if stream is None else stream_address(stream)
        self.out, self.lse, self.decision = self._bound.launch(address)
        return self.out


def plan(
    q, k, v, *, out=None, stream=None, q_descale=None, k_descale=None, v_descale=None, **options
) -> Plan:
    """Prepare an attention call that is launched many times on the same arrays.

    Args:
        q, k, v, out, stream, q_descale, k_descale, v_descale: as for `attention`. Changing the
            arrays' contents is what plans are for; they must have a contiguous last axis, because
            a copy would not see the change. With precision="fp8" each launch quantises anew.
        options: the other options of `attention`, without return_lse.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    expect_known("plan", options, ("out", "stream"))
    for name, array in (("q", q), ("k", k), ("v", v)):
        array = array.data if isinstance(array, Fp8Array) else array
        view = library_of(array, name).view(array, name)
        expect_contiguous_rows(f"{name} of a plan", view)
    descales = q_descale, k_descale, v_descale
    return Plan(_bind_forward(q, k, v, out, {**DEFAULTS, **options}, stream, descales))


def warmup(
    dtype: str = "float16",
    head_dim: int = 64,
    head_dim_v: int | None = None,
    *,
    seqlen_q: int = _LONG,
    seqlen_k: int = _LONG,
    softcap: bool = False,
    alibi: bool = False,
    precision: str | None = None,
    fp8: Fp8Recipe | None = None,
    backward: bool = False,
    device: int = 0,
) -> None:
    """Compile and load ahead what `attention` needs, so that the first call does not wait.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        head_dim, head_dim_v: as in the arrays to come; head_dim_v defaults to head_dim.
        seqlen_q, seqlen_k: likewise; sequences of up to 32 tokens have kernels of their own.
        softcap, alibi: whether the calls will use them.
        precision, fp8: as in the calls to come; on 8-bit floats also what quantises.
        backward: also compile for `attention_backward`.
        device: ordinal of the CUDA device.

    Raises:
        TypeError: a head_dim that is not an integer, an fp8 that is no `Fp8Recipe`.
        ValueError: a dtype that does not exist or does not go with precision, a head_dim below 1.
        UnsupportedError: a head_dim above 256, no GPU, or no compiler; a backward on 8-bit floats.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        expect_head_dim(name, value)
    expect_precision(precision, dtype)
    if precision in ("fp8", "auto"):
        if backward:
            refuse_backward(None, None, None, precision)
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(
                f'dtype must be float16 or bfloat16 for precision="{precision}", got {dtype!r}'
            )
        options = {"softcap": float(softcap), "precision": precision, "fp8": fp8}
        if not SIMULATED:
            _warm_up_fp8(
                dtype, (seqlen_q, head_dim), (seqlen_k, head_dim_v), alibi, device, options
            )
        return
    vector = 4 if dtype == "float32" else 8
    traits = Traits(
        dtype,
        padded_head_dim(head_dim),
        padded_head_dim(head_dim_v),
        softcap=bool(softcap),
        alibi=bool(alibi),
        vectorized=head_dim % vector == 0 and head_dim_v % vector == 0,
        tf32=precision == "tf32",
    )
    if SIMULATED:
        return
    limits = limits_of_device(device)
    for family in ("forward", "delta", *BACKWARD) if backward else ("forward",):
        rows = seqlen_k if family == "backward-dkdv" else seqlen_q
        # Of contiguous arrays rows that are not aligned cannot be fetched by bulk copies.
        no_bulk_copies = None if traits.vectorized else "rows are not aligned to 16 bytes"
        choices = [choose(family, traits, limits, rows, no_bulk_copies=no_bulk_copies)]
        if tuned.enabled():
            # Which of them a call takes depends on sizes that are not known yet.
            choices += tuned.choices(family, traits, device_key(device), limits)
        for choice in choices:
            load(get_cubin(choice.config, choice.traits, limits), device)
        choice = choices[0]
        if family == "forward" and isinstance(choice.config, MmaConfig):
            blocks = -(-seqlen_q // choice.config.block_rows)
            num_sms, _ = multiprocessors(device)
            if num_splits(choice.config, traits, limits, num_sms, blocks, seqlen_k) > 1:
                split = replace(choice.config, num_splits=2)
                combine = choose("combine", traits, limits)
                for each in (replace(choice, config=split), combine):
                    load(get_cubin(each.config, each.traits, limits), device)


def _warm_up_fp8(dtype, q_size, v_size, alibi: bool, device: int, options: dict) -> None:
    """Make calls ready that are nothing but shapes."""
    options = {**DEFAULTS, **options, "described": {}, "max_rel_error": MAX_REL_ERROR}
    kind = AutoForward if options["precision"] == "auto" else Fp8Forward
    sizes = {"q": q_size, "k": (v_size[0], q_size[1]), "v": v_size}
    # One head may be split over its keys, many are not.
    for batch in (1, _MANY):
        views = {}
        for name, (seqlen, columns) in sizes.items():
            shape = (batch, seqlen, 1, columns)
            views[name] = ArrayView(0, shape, contiguous_strides(shape), dtype, device)
        if alibi:
            views["alibi_slopes"] = ArrayView(0, (1,), (1,), "float32", device)
        kind(views, options)


class _BoundForward:
    """A forward call that is checked, allocated and bound.

    Attributes:
        stream: the address of the one that it was allocated on.
        kernel: which kernel runs.
    """

    def __init__(
        self,
        launches: tuple[Callable[[int], None], ...],
        stream: int,
        kernel: str,
        hand_back: Callable[[int], tuple],
    ):
        self._launches, self.stream, self.kernel = launches, stream, kernel
        self.hand_back = hand_back

    def launch(self, stream: int) -> tuple:
        """Enqueue on a stream; what `hand_back` returns then."""
        for launch in self._launches:
            launch(stream)
        return self.hand_back(stream)


def _bind_forward(
    q, k, v, out, options: dict, stream, descales: tuple = (None, None, None)
) -> _BoundForward:
    """Check a forward call, allocate and bind it.

    Its `hand_back` gives (out, lse, decision or None) as objects of q's library.
    """
    arrays, kind = {"q": q, "k": k, "v": v}, Forward
    if options["precision"] == "auto" or options["max_rel_error"] is not None:
        options = with_budget(options)
    is_fp8 = options["precision"] in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        kind, q = Fp8Forward, q.data if isinstance(q, Fp8Array) else q
        arrays, options = take_apart(arrays, descales, options)
        if options["precision"] == "auto":
            kind = AutoForward
    elif options["fp8"] is not None:
        raise ValueError(
            f'fp8 says how to quantise with precision="fp8"; precision is {options["precision"]!r}'
        )
    if out is not None:
        arrays["out"] = out
    forward, operands, stream = _prepare(kind, arrays, options, stream)
    library = library_of(q, "q")

    def work(stream: int) -> tuple:
        return stream, *forward.bind(operands, library)

    stream, result, lse, launches = on_stream(work, stream, forward.device, arrays, operands)
    decided = ()
    if kind is AutoForward:
        decided = operands["in_fp8"].array, operands["estimate"].array

    def hand_back(stream: int) -> tuple:
        given = library.hand_back(result, q, stream) if out is None else out
        decision = None
        if decided:
            decision = PrecisionDecision(*(library.hand_back(x, q, stream) for x in decided))
        return given, library.hand_back(lse, q, stream), decision

    return _BoundForward(tuple(launches.values()), stream, forward.kernel, hand_back)


def _prepare(kind: type, arrays: dict[str, Any], options: dict, stream):
    """Check a call.

    Returns:
        The `kind`, Forward or Backward, for this call: found, or made now; the call's arrays as
        operands; the address of `stream`, or None.
    """
    if options["alibi_slopes"] is not None:
        arrays["alibi_slopes"] = options["alibi_slopes"]
    # What this process tunes changes what is ready.
    key, operands = [kind, generation()], {}
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key += name, identity
    if stream is not None:
        stream = stream_address(stream)
    try:
        key = (*key, *_option_key(**options))
        ready = _ready.get(key)
    except TypeError:
        ready = None  # an option cannot even be hashed: `kind` finds what is wrong with it
    if ready is None:
        views = {name: library_of(x, name).view(x, name) for name, x in arrays.items()}
        ready = kind(views, options)
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[key] = ready
    return ready, operands, stream


def _option_key(
    softmax_scale,
    causal,
    causal_align,
    window_size,
    softcap,
    alibi_slopes,
    layout,
    precision,
    config,
    fp8,
    max_rel_error,
    described=None,
) -> tuple:
    """A key of the options; the slopes' is that of an array."""
    values = softmax_scale, causal, softcap, *window_size
    # With their types: what an equal 1 made ready must not let a wrong True pass.
    kind = type(config)
    if isinstance(config, dict):
        config = tuple(config.items())
    kinds = *map(type, values), type(window_size), kind
    described = tuple(described.items()) if described else None
    return *values, *kinds, causal_align, layout, precision, config, fp8, max_rel_error, described


__all__ = ["Plan", "attention", "attention_backward", "plan", "warmup"]
