"""The public functions: check the arguments, pick the configs, allocate, launch.

Checking and picking happen once for each distinct problem; calls with the same shapes, strides,
dtypes and options then find a ready `_Forward` or `_Backward` under the problem's key and only
allocate and launch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numflash.arrays import ArrayLibrary, library_of, stream_address
from numflash.compiler import get_cubin
from numflash.configs import Config, MmaConfig, Traits, padded_head_dim
from numflash.dispatch import (
    Choice,
    Geometry,
    choose,
    force,
    heads_in_flight,
    num_splits,
    rows_packed,
)
from numflash.launch import Launcher, limits_of_device, multiprocessors
from numflash.mode import SIMULATED
from numflash.problem import (
    AttentionProblem,
    Tensor,
    as_tensor,
    describe,
    expect_contiguous_rows,
    expect_head_dim,
    expect_like,
    expect_precision,
    expect_writeable,
)
from numflash.views import ArrayView, Operand, contiguous_strides, overlap

# Ready launches by problem; emptied when it grows past this, so that varying shapes cannot leak.
_MAX_READY = 4096
_LONG = 2**20
BACKWARD = ("backward-dkdv", "backward-dq")
FUSED = "backward"
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
    return_lse: bool = False,
    out=None,
    stream=None,
    config: str | Config | None = None,
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
            inclusive; -1 or None is no limit.
        softcap: scores s become softcap * tanh(s / softcap); 0 is off.
        alibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q): slope * distance is
            subtracted from a score, after softcap.
        layout: "bshd" or "bhsd", of q, k, v and the result.
        precision: "tf32" allows float32 to be multiplied on tensor cores, with operands rounded
            to 10 bits after the point; where they have no kernel for it (head dims above 128,
            Turing) and with None products are exact. Sums are float32 either way.
        return_lse: also return the log-sum-exp.
        out: an array to write the result to; it must not overlap an input.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of q.
        config: run the kernel with this config, as in "sm80-m128n64w4s1"; None lets numflash
            choose. `explain_dispatch` tells what it chooses.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) in the layout, dtype and kind of q. A
            query that sees no key gives 0.
        lse: with return_lse, (batch, num_heads_q, seqlen_q) float32: the natural logarithm of the
            sum of exponentials of the scores; -inf where a query sees no key. Without batch or
            heads axes in q, these are absent here too.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: shapes that do not fit together, values out of range.
        UnsupportedError: possible in principle, not here (head_dim above 256, an old GPU, ...).

    The kernels are enqueued, not waited for. Memory beyond the results: nothing, or, where few
    queries make it worthwhile to split the keys over blocks, num_splits float32 copies of the
    results.

    Source: FlashAttention-2, arXiv 2307.08691.
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
    }
    result, lse, launch, stream, _ = _bind_forward(q, k, v, out, options, stream)
    launch(stream)
    return (result, lse) if return_lse else result


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
    }
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse}
    backward, operands, stream = _prepare(_Backward, arrays, options, stream)
    library = library_of(q, "q")
    if stream is None:
        gradients = backward(operands, library, library.stream(backward.device))
    else:
        with library.ordered_on(stream, backward.device):
            gradients = backward(operands, library, stream)
    return tuple(library.hand_back(g, q) for g in gradients)


class Plan:
    """An attention call made ready: the same arrays, launched again and again.

    Everything is checked, compiled, allocated and packed once, by `numflash.plan`. A launch reads
    q, k and v where they are and writes `out` and `lse`.

    Attributes:
        out: the result, as `attention` returns it.
        lse: the log-sum-exp, as `attention` returns it.
        kernel: which kernel runs: family, config and what it was compiled for.
    """

    def __init__(self, out, lse, launch: Callable[[int], None], stream: int, kernel: str):
        """Made by `numflash.plan`."""
        self.out, self.lse, self.kernel = out, lse, kernel
        self._launch, self._stream = launch, stream

    def launch(self, stream=None):
        """Enqueue the kernel and return `out`.

        Args:
            stream: a CUDA stream or its address; None is the one current when the plan was made.
        """
        self._launch(self._stream if stream is None else stream_address(stream))
        return self.out


def plan(q, k, v, *, out=None, stream=None, **options) -> Plan:
    """Prepare an attention call that is launched many times on the same arrays.

    Args:
        q, k, v, out, stream: as for `attention`. Changing the arrays' contents is what plans are
            for; they must have a contiguous last axis, because a copy would not see the change.
        options: the other options of `attention`, without return_lse.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    defaults = {
        "softmax_scale": None,
        "causal": False,
        "causal_align": "bottom_right",
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "layout": "bshd",
        "precision": None,
        "config": None,
    }
    unknown = set(options) - set(defaults)
    if unknown:
        raise TypeError(
            f"plan got unknown options: {', '.join(sorted(unknown))}; it takes out, stream, "
            f"{', '.join(defaults)}"
        )
    for name, array in (("q", q), ("k", k), ("v", v)):
        view = library_of(array, name).view(array, name)
        expect_contiguous_rows(f"{name} of a plan", view)
    return Plan(*_bind_forward(q, k, v, out, {**defaults, **options}, stream))


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
    backward: bool = False,
    device: int = 0,
) -> None:
    """Compile ahead what `attention` needs, so that the first call does not wait.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        head_dim, head_dim_v: as in the arrays to come; head_dim_v defaults to head_dim.
        seqlen_q, seqlen_k: likewise; sequences of up to 32 tokens have kernels of their own.
        softcap, alibi: whether the calls will use them.
        precision: as in the calls to come.
        backward: also compile for `attention_backward`.
        device: ordinal of the CUDA device.

    Raises:
        TypeError: a head_dim that is not an integer.
        ValueError: a dtype that does not exist, or a head_dim below 1.
        UnsupportedError: a head_dim above 256, no GPU, or no compiler.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        expect_head_dim(name, value)
    expect_precision(precision, dtype)
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
        choice = choose(family, traits, limits, rows)
        get_cubin(choice.config, choice.traits, limits)
        if family == "forward" and isinstance(choice.config, MmaConfig):
            blocks = -(-seqlen_q // choice.config.block_rows)
            num_sms, _ = multiprocessors(device)
            if num_splits(choice.config, traits, limits, num_sms, blocks, seqlen_k) > 1:
                split = replace(choice.config, num_splits=2)
                combine = choose("combine", traits, limits)
                get_cubin(split, choice.traits, limits)
                get_cubin(combine.config, combine.traits, limits)


def _bind_forward(q, k, v, out, options: dict, stream):
    """Check a forward call; what `Plan` takes: result, lse, launch, stream, kernel."""
    arrays = {"q": q, "k": k, "v": v}
    if out is not None:
        arrays["out"] = out
    forward, operands, stream = _prepare(_Forward, arrays, options, stream)
    library = library_of(q, "q")
    if stream is None:
        stream = library.stream(forward.device)
        result, lse, launch = forward.bind(operands, library)
    else:
        with library.ordered_on(stream, forward.device):
            result, lse, launch = forward.bind(operands, library)
    result = library.hand_back(result, q) if out is None else out
    return result, library.hand_back(lse, q), launch, stream, forward.kernel


def _prepare(kind: type, arrays: dict[str, Any], options: dict, stream):
    """Check a call.

    Returns:
        The `kind`, _Forward or _Backward, for this call: found, or made now; the call's arrays as
        operands; the address of `stream`, or None.
    """
    if options["alibi_slopes"] is not None:
        arrays["alibi_slopes"] = options["alibi_slopes"]
    key, operands = [kind], {}
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
) -> tuple:
    """A key of the options; the slopes' is that of an array."""
    values = softmax_scale, causal, softcap, *window_size
    # With their types: what an equal 1 made ready must not let a wrong True pass.
    kind = type(config)
    if isinstance(config, dict):
        config = tuple(config.items())
    kinds = *map(type, values), type(window_size), kind
    return *values, *kinds, causal_align, layout, precision, config


def _describe(views: dict[str, ArrayView], options: dict) -> tuple[AttentionProblem, dict]:
    described = {**options, "alibi_slopes": views.get("alibi_slopes")}
    del described["config"]
    return describe(views["q"], views["k"], views["v"], **described)


def problem_of(views: dict[str, ArrayView], options: dict) -> tuple[AttentionProblem, Traits, int]:
    """The problem of a call, the traits of its kernels and its device. Raises as `attention`."""
    rows, _ = _with_contiguous_rows(views, ("q", "k", "v"))
    problem, tensors = _describe(rows, {"config": None, **options})
    q = rows["q"]
    out = _fresh((*q.shape[:-1], problem.head_dim_v), q)
    tensors["out"] = as_tensor("out", out, options.get("layout", "bshd"))
    return problem, _traits(problem, tensors), q.device


class _Forward:
    """A forward problem with its kernel bound to everything but addresses."""

    def __init__(self, views: dict[str, ArrayView], options: dict):
        rows, self.copied = _with_contiguous_rows(views, ("q", "k", "v"))
        problem, tensors = _describe(rows, options)
        q = rows["q"]
        self.views, self.dtype, self.device = views, problem.dtype, q.device
        self.out_shape = (*q.shape[:-1], problem.head_dim_v)
        self.lse_shape = _lse_shape(problem, q)
        self.is_given_out = "out" in views
        if self.is_given_out:
            expect_like("out", views["out"], self.out_shape, q.dtype, q.device)
            expect_writeable("out", views["out"])
            self.spans = {name: view.span() for name, view in views.items()}
            self._refuse_overlap({name: view.pointer for name, view in views.items()})
        out = views.get("out") or _fresh(self.out_shape, q)
        tensors["out"] = as_tensor("out", out, options["layout"])
        self.launchers, self.workspaces, self.kernel = [], {}, "none: the result is empty"
        if problem.batch * problem.seqlen_q:
            self._choose_launchers(problem, tensors, options["config"])
            self.kernel = str(self.launchers[0])

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary):
        """Allocate; (out, lse, function of the stream that launches)."""
        if self.is_given_out:
            self._refuse_overlap({name: o.pointer for name, o in operands.items()})
            out = operands["out"].array
        else:
            out = library.empty(self.out_shape, self.dtype, self.device)
            operands["out"] = library.operand(out)
        lse = library.empty(self.lse_shape, "float32", self.device)
        operands["lse"] = library.operand(lse)
        operands.setdefault("alibi_slopes", None)
        _copy_rows(self.copied, operands)
        if not self.workspaces:
            return out, lse, self.launchers[0].bind(operands) if self.launchers else _do_nothing
        for name, size in self.workspaces.items():
            operands[name] = library.operand(library.empty((size,), "float32", self.device))
        parts = {**operands, "out": operands["parts"], "lse": operands["part_lses"]}
        forward, combine = self.launchers[0].bind(parts), self.launchers[1].bind(operands)

        def launch(stream: int) -> None:
            forward(stream)
            combine(stream)

        return out, lse, launch

    def _choose_launchers(self, problem, tensors: dict[str, Tensor], config) -> None:
        """The forward, and where it splits the keys the kernel that puts the parts together."""
        device = self.device
        traits = _traits(problem, tensors)
        choice, geometry = forward_choice(problem, traits, device, config)
        scalars = _scalars(problem, tensors) | {
            "pack": geometry.pack,
            "num_splits": geometry.num_splits,
            "heads_in_flight": geometry.heads_in_flight,
            "out_split": 0,
        }
        rows, heads = problem.seqlen_q * geometry.pack, problem.num_heads_q // geometry.pack
        num_blocks = problem.num_blocks(
            rows, heads * geometry.num_splits, choice.config.block_rows
        )
        if geometry.num_splits == 1:
            self.launchers = [Launcher(choice.config, choice.traits, device, num_blocks, scalars)]
            return
        row = traits.head_dim_v
        rows = problem.batch * problem.seqlen_q * problem.num_heads_q
        self.workspaces = {
            "parts": geometry.num_splits * rows * row,
            "part_lses": geometry.num_splits * rows,
        }
        into_parts = {
            "out_split": rows * row,
            "out_batch": problem.seqlen_q * problem.num_heads_q * row,
            "out_row": problem.num_heads_q * row,
            "out_head": row,
        }
        combine = choose("combine", traits, limits_of_device(device))
        blocks = problem.num_blocks(
            problem.seqlen_q, problem.num_heads_q, combine.config.block_rows
        )
        self.launchers = [
            Launcher(choice.config, choice.traits, device, num_blocks, scalars | into_parts),
            Launcher(combine.config, combine.traits, device, blocks, scalars),
        ]

    def _refuse_overlap(self, pointers: dict[str, int]) -> None:
        """Raise ValueError if `out` shares memory with an input, all at these addresses."""
        first, end = (pointers["out"] + offset for offset in self.spans["out"])
        for name, (low, high) in self.spans.items():
            # Most arrays lie apart, which is quick to see; those that interleave need a proof.
            apart = pointers[name] + high <= first or end <= pointers[name] + low
            if name != "out" and not apart:
                out = replace(self.views["out"], pointer=pointers["out"])
                if overlap(out, replace(self.views[name], pointer=pointers[name])):
                    raise ValueError(f"out must not overlap {name}, but they share memory")


class _Backward:
    """A backward problem with its kernels bound to everything but addresses."""

    def __init__(self, views: dict[str, ArrayView], options: dict):
        rows, self.copied = _with_contiguous_rows(views, ("q", "k", "v", "dout", "out"))
        problem, tensors = _describe(rows, options)
        q, layout = rows["q"], options["layout"]
        out_shape = (*q.shape[:-1], problem.head_dim_v)
        expect_like("dout", rows["dout"], out_shape, q.dtype, q.device)
        expect_like("out", rows["out"], out_shape, q.dtype, q.device)
        expect_like("lse", rows["lse"], _lse_shape(problem, q), "float32", q.device)
        if not rows["lse"].is_contiguous:
            raise ValueError(
                f"lse must be contiguous, as `attention` returns it, got strides "
                f"{rows['lse'].strides} for shape {rows['lse'].shape}"
            )
        tensors["do"] = as_tensor("dout", rows["dout"], layout)
        tensors["out"] = as_tensor("out", rows["out"], layout)
        for name in ("q", "k", "v"):
            tensors["d" + name] = as_tensor("d" + name, _fresh(rows[name].shape, q), layout)
        self.shapes = {"d" + name: rows[name].shape for name in ("q", "k", "v")}
        self.dtype, self.device = problem.dtype, q.device
        self.delta_size = (problem.batch * problem.num_heads_q * problem.seqlen_q,)
        forced, traits = backward_configs(options["config"]), _traits(problem, tensors)
        self.workspaces = dict.fromkeys(("delta", "lse_log2"), self.delta_size)
        rows = {"delta": problem.seqlen_q}
        if FUSED not in forced:
            rows |= {"backward-dkdv": problem.seqlen_k, "backward-dq": problem.seqlen_q}
        # All are chosen before one is compiled: a wrong config must not cost a wait.
        choices = [
            backward_choice(family, problem, traits, q.device, forced.get(family))
            for family in rows
            if problem.batch and rows[family]
        ]
        self.launchers = [_launcher(choice, problem, tensors, q.device) for choice in choices]
        if FUSED in forced:
            self._add_fused(problem, tensors, forced[FUSED])

    def _add_fused(self, problem, tensors: dict[str, Tensor], config: str | Config) -> None:
        """The one kernel for all gradients, and the one that adds up its parts of dQ."""
        traits = _traits(problem, tensors)
        choice = backward_choice(FUSED, problem, traits, self.device, config)
        config, scalars = choice.config, _scalars(problem, tensors)
        scalars["num_splits"] = config.num_splits
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.num_heads_q * problem.batch
        part = tiles * config.tile_m * traits.head_dim
        self.workspaces["dq_parts"] = (config.num_splits * part,)
        if problem.batch and problem.seqlen_k:
            blocks = problem.num_blocks(1, problem.num_heads_kv * config.num_splits, 1)
            launcher = Launcher(config, choice.traits, self.device, blocks, scalars)
            self.launchers.append(launcher)
        if tiles:
            launcher = Launcher(config.reduction(), choice.traits, self.device, tiles, scalars)
            self.launchers.append(launcher)

    def __call__(self, operands: dict[str, Operand], library: ArrayLibrary, stream: int):
        """Allocate and launch; the three gradients."""
        _copy_rows(self.copied, operands)
        operands["do"] = operands["dout"]
        operands.setdefault("alibi_slopes", None)
        for name, shape in self.workspaces.items():
            operands[name] = library.operand(library.empty(shape, "float32", self.device))
        gradients = []
        for name, shape in self.shapes.items():
            gradients.append(library.empty(shape, self.dtype, self.device))
            operands[name] = library.operand(gradients[-1])
        for launcher in self.launchers:
            launcher.bind(operands)(stream)
        return gradients


def _launcher(choice: Choice, problem, tensors: dict[str, Tensor], device: int) -> Launcher:
    """A backward kernel for a problem, with its strides and scalars bound."""
    rows, heads = problem.seqlen_q, problem.num_heads_q
    if choice.family == "backward-dkdv":
        rows, heads = problem.seqlen_k, problem.num_heads_kv
    if getattr(choice.config, "apart", False):
        heads *= 2
    num_blocks = problem.num_blocks(rows, heads, choice.config.block_rows)
    scalars = _scalars(problem, tensors)
    return Launcher(choice.config, choice.traits, device, num_blocks, scalars)


def backward_configs(config) -> dict[str, str | Config]:
    """The forced configs of a backward call by family. Raises TypeError, ValueError."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise TypeError(f"config of a backward must map families to configs, got {config!r}")
    for family in config:
        if family not in (*BACKWARD, FUSED):
            raise ValueError(
                f"config of a backward has the keys {', '.join(BACKWARD)} or {FUSED}, got "
                f"{family!r}"
            )
    return config


def backward_choice(family: str, problem, traits: Traits, device: int, config) -> Choice:
    """The kernel of a backward family for a problem."""
    limits, positive = limits_of_device(device), problem.softmax_scale > 0
    if config is not None:
        return force(family, config, traits, limits, positive)
    rows = problem.seqlen_k if family == "backward-dkdv" else problem.seqlen_q
    return choose(family, traits, limits, rows, positive)


def forward_choice(problem, traits: Traits, device: int, config) -> tuple[Choice, Geometry]:
    """The forward kernel for a problem, and how it is laid over the machine."""
    limits, positive = limits_of_device(device), problem.softmax_scale > 0
    pack = rows_packed(problem)
    if config is not None:
        choice = force("forward", config, traits, limits, positive)
    else:
        choice = choose("forward", traits, limits, problem.seqlen_q * pack, positive)
    if not isinstance(choice.config, MmaConfig):
        if pack > 1 and config is None:
            choice = choose("forward", traits, limits, problem.seqlen_q, positive)
        return choice, Geometry()
    splits = choice.config.num_splits
    num_sms, l2_bytes = multiprocessors(device)
    if config is None:
        heads = problem.num_heads_q // pack
        blocks = problem.num_blocks(problem.seqlen_q * pack, heads, choice.config.block_rows)
        splits = num_splits(choice.config, traits, limits, num_sms, blocks, problem.seqlen_k)
        choice = replace(choice, config=replace(choice.config, num_splits=splits))
    # Packed heads are one: K and V are read once for all of them.
    in_flight = max(1, heads_in_flight(problem, traits.dtype_bytes, l2_bytes) // pack)
    return choice, Geometry(pack, splits, in_flight)


def _traits(problem, tensors: dict[str, Tensor]) -> Traits:
    """What the kernels for a problem with these tensors are compiled for."""
    return problem.traits(all(tensor.is_vectorizable for tensor in tensors.values()))


def _scalars(problem, tensors: dict[str, Tensor]) -> dict[str, int | float]:
    """The scalar arguments of any kernel for a problem, and its tensors' strides."""
    scalars = problem.scalars()
    for name, tensor in tensors.items():
        batch, row, head, _ = tensor.strides
        scalars |= {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}
    return scalars


def _do_nothing(stream: int) -> None:
    """Launch nothing: the result is empty."""


def _lse_shape(problem: AttentionProblem, q: ArrayView) -> tuple[int, ...]:
    """(batch, heads, seqlen_q), without the axes that q does not have."""
    return (problem.batch, problem.num_heads_q, problem.seqlen_q)[4 - len(q.shape) :]


def _fresh(shape: tuple[int, ...], like: ArrayView) -> ArrayView:
    """The view of a contiguous array still to be allocated; allocators align to 16 bytes."""
    return ArrayView(0, shape, contiguous_strides(shape), like.dtype, like.device)


def _with_contiguous_rows(views: dict[str, ArrayView], names: tuple[str, ...]):
    """The views, with those of the copies of `names` that must be copied; and their names."""
    copied = [name for name in names if not views[name].has_contiguous_rows]
    return views | {name: _fresh(views[name].shape, views[name]) for name in copied}, copied


def _copy_rows(names: list[str], operands: dict[str, Operand]) -> None:
    """Replace these operands by copies whose last axis is contiguous."""
    for name in names:
        array = operands[name].array
        library = library_of(array, name)
        operands[name] = library.operand(library.with_contiguous_rows(array))


__all__ = ["Plan", "attention", "attention_backward", "plan", "warmup"]
