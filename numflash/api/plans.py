"""Calls prepared before they are launched: plans, and kernels compiled ahead."""

from dataclasses import replace
from numbers import Integral
from typing import Any

from numflash.api.block_masks import with_own_block_mask
from numflash.calls.arguments import request_of
from numflash.calls.backward import Backward, views_of_results
from numflash.calls.forward import Forward, selection_of
from numflash.calls.fp8_forward import AutoForward, Fp8Forward, fp8_request_of
from numflash.calls.fp8_options import (
    descales_of,
    expect_recipe_is_used,
    refuse_backward,
    with_budget,
)
from numflash.calls.launch import load
from numflash.calls.ready import Bound, bind_backward, bind_forward
from numflash.configs import DTYPES, Traits
from numflash.configs.features import FEATURES
from numflash.machine_code.compiler import get_cubin
from numflash.problem.fp8 import Fp8Array
from numflash.problem.options import (
    GRADIENT_OPTIONS,
    PACKED,
    AttentionOptions,
    GradientOptions,
    expect_bool,
    expect_one_of,
    kind_of,
    options_of,
)
from numflash.problem.problem import expect_contiguous_rows, expect_head_dim, expect_precision
from numflash.problem.sequences import MAX_ROWS
from numflash.runtime.arrays import library_of, metadata, stream_address
from numflash.runtime.driver import limits_of_device
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import ArrayView, fresh
from numflash.selection import tuned
from numflash.selection.choice import BACKWARD, FUSED, Purpose, device_key, split_configs

_LONG, _MANY = 2**20, 2**10


class Plan:
    """An attention call made ready: the same arrays, launched again and again.

    Everything is checked, compiled, allocated and packed once, by `numflash.plan`. A launch reads
    q, k and v where they are and writes `out` and `lse`.

    All launches use the same memory. On another stream, or in a CUDA graph, a launch must come
    after the one before: blocks of Hopper's gradients take turns there, and might wait for ever.

    Attributes:
        out: the result, as `attention` returns it.
        lse: the log-sum-exp, as `attention` returns it.
        kernel: that runs: its family, its config and the traits it was compiled for.
        decision: with precision="auto" a `PrecisionDecision`, made again by each launch.
        gradients: of a plan with dout those that `launch_backward` writes, as
            `attention_backward` returns them; None without.

    Where CuPy sees q for another library, each launch hands the same memory back again, so that
    this library's work comes after the launch: take the results from the plan after each launch.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> plan = numflash.plan(q, k, v, dout=v, wrt=("q",))
        >>> plan.launch() is plan.out, plan.lse.shape
        (True, (1, 2, 32))
        >>> (dq,) = plan.launch_backward()
        >>> dq.shape == q.shape
        True
    """

    def __init__(self, bound: Bound):
        """Made by `numflash.plan`."""
        self._bound, self.kernel = bound, bound.kernel
        self._backward: Bound | None = None
        self.out, self.lse, self.decision = bound.hand_back(bound.stream)
        self.gradients = None

    def launch(self, stream=None):
        """Enqueue the kernel and return `out`.

        Args:
            stream: a CUDA stream or its address; None is the one current when the plan was made.
        """
        self.out, self.lse, self.decision = _launched(self._bound, stream)
        return self.out

    def launch_backward(self, stream=None) -> tuple:
        """Enqueue the kernels of the gradients, which read `out` and `lse`; return `gradients`.

        Args:
            stream: a CUDA stream or its address; None is the one current when the plan was made.
                What fills dout, and `launch`, come before on it.

        Raises:
            ValueError: the plan was made without dout.
        """
        if self._backward is None:
            raise ValueError("launch_backward needs a plan with dout, and this one has none")
        self.gradients = _launched(self._backward, stream)
        return self.gradients

    def _prepare_backward(self, bound: Bound) -> None:
        self._backward, self.gradients = bound, bound.hand_back(bound.stream)


def _launched(bound: Bound, stream) -> tuple:
    return bound.launch(bound.stream if stream is None else stream_address(stream))


def plan(
    q,
    k,
    v,
    *,
    dout=None,
    out=None,
    stream=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    **options,
) -> Plan:
    """Prepare an attention call that is launched many times on the same arrays.

    Args:
        q, k, v, out, stream, q_descale, k_descale, v_descale: as for `attention`. Changing the
            arrays' contents is what plans are for; they must have a contiguous last axis, because
            a copy would not see the change. With precision="fp8" each launch quantises again.
        dout: gradient of the result, likewise: the plan then has `launch_backward`, too.
        options: the other options of `attention`, without return_lse; with dout also those of
            `attention_backward`: dlse, delta, wrt and grad_dtype. `config` then may be a
            dictionary that also names configs for the backward, by family.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention` and, with dout,
            `attention_backward`; an option of gradients without dout.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> plan = numflash.plan(q, k, v)
        >>> v[:] = 1  # the plan reads the arrays where they are
        >>> bool(np.allclose(plan.launch(), 1, atol=1e-3))
        True
    """
    options, asked = options_of("plan", options, ("dout", "out", "stream"))
    options = with_own_block_mask(options, stream)
    arrays = {"q": q, "k": k, "v": v} | ({} if dout is None else {"dout": dout})
    for name, array in arrays.items():
        array = array.data if isinstance(array, Fp8Array) else array
        view = library_of(array, name).view(array, name)
        expect_contiguous_rows(f"{name} of a plan", view)
    of_forward, of_backward = options, None
    if dout is None:
        _expect_no_gradients("a plan with dout", asked)
    else:
        refuse_backward(q, k, v, options.precision)
        of_forward, of_backward = _by_pass(options)
    descales = descales_of(q_descale, k_descale, v_descale)
    made = Plan(bind_forward(q, k, v, out, of_forward, stream, descales))
    if of_backward is not None:
        results = made.out, made.lse
        made._prepare_backward(bind_backward(dout, q, k, v, *results, of_backward, asked, stream))
    return made


def _by_pass(options: AttentionOptions) -> tuple[AttentionOptions, AttentionOptions]:
    """The options of the forward and those of its backward, each with its configs."""
    of_forward, of_backward = split_configs(options.config)
    return options._replace(config=of_forward), options.of_backward(of_backward)


def _expect_no_gradients(goes_with: str, asked: GradientOptions) -> None:
    """Raise ValueError if an option of gradients is given."""
    for option in GRADIENT_OPTIONS:
        if getattr(asked, option.name) is not option.default:
            raise ValueError(f"{option.name} is of gradients, and goes with {goes_with}")


def warmup(
    dtype: str = "float16",
    head_dim: int = 64,
    head_dim_v: int | None = None,
    *,
    seqlen_q: int = _LONG,
    seqlen_k: int = _LONG,
    batch: int | None = None,
    num_heads: int = 1,
    num_heads_kv: int | None = None,
    varlen: bool = False,
    backward: bool = False,
    device: int = 0,
    **options,
) -> None:
    """Compile and load ahead what `attention` needs, so that the first call does not wait.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        head_dim, head_dim_v: as in the arrays to come; head_dim_v defaults to head_dim.
        seqlen_q, seqlen_k: likewise; sequences of up to 32 tokens have kernels of their own.
        batch, num_heads, num_heads_kv: likewise, where arrays among the options have axes of
            these, or few queries share heads of K and V. batch None is any: the kernels of one
            entry, whose keys may be split, and those of many.
        varlen: whether they are of sequences with lengths of their own, as `attention_varlen`; the
            seqlens then are those of a sequence, and batch is their number.
        backward: also compile for `attention_backward`.
        device: ordinal of the CUDA device.
        options: those of the calls to come: the options of `attention`, and with backward also
            dlse, delta, wrt and grad_dtype of `attention_backward`. Of arrays only the metadata
            matters: NumPy's will do, and for dlse and delta True. softcap, alibi, sinks and
            dropout may be True: the calls will use them, with any numbers and arrays.

    Raises:
        TypeError: an argument of a wrong type, or an option that no call has.
        ValueError: a dtype that does not exist or does not go with precision, a size below 1,
            arrays that do not fit the sizes, an option of gradients without backward.
        UnsupportedError: a head_dim above 256, no GPU, or no compiler; a backward on 8-bit floats.

    Kernels for codes with q_descale are compiled by the `plan` of a call.

    Example:
        >>> import numflash
        >>> numflash.warmup("bfloat16", head_dim=128, backward=True)
        >>> numflash.warmup(alibi=True, backward=True, wrt=("q", "alibi_slopes"))
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        expect_head_dim(name, value)
    expect_one_of("dtype", dtype, DTYPES)
    heads_kv = num_heads if num_heads_kv is None else num_heads_kv
    for name, value in (
        ("seqlen_q", seqlen_q),
        ("seqlen_k", seqlen_k),
        ("batch", 1 if batch is None else batch),
        ("num_heads", num_heads),
        ("num_heads_kv", heads_kv),
    ):
        _expect_size(name, value)
    names = tuple(row.name for row in FEATURES if row.name != row.option)
    options, asked = options_of("warmup", _with_examples(options, num_heads), names)
    options.check()
    expect_precision(options.precision, dtype)
    kind = {"fp8": Fp8Forward, "auto": AutoForward}.get(options.precision, Forward)
    if kind is not Forward:
        if backward:
            refuse_backward(None, None, None, options.precision)
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(
                f'dtype must be float16 or bfloat16 for precision="{options.precision}", got '
                f"{dtype!r}"
            )
        options = with_budget(options) if kind is AutoForward else options
    expect_recipe_is_used(options)
    if not backward:
        _expect_no_gradients("backward=True", asked)
    options = with_own_block_mask(options)
    expect_bool("varlen", varlen)
    if varlen:
        options = options._replace(layout=PACKED)
    sizes = {
        "q": (seqlen_q, num_heads, head_dim),
        "k": (seqlen_k, heads_kv, head_dim),
        "v": (seqlen_k, heads_kv, head_dim_v),
    }
    # Of more keys there are more splits than a record numbers.
    most = _LONG if options.batch_invariant else MAX_ROWS - 1
    for entries in (1, _MANY) if batch is None else (batch,):
        views = _views_of_options(options, device)
        for name, (seqlen, *rest) in sizes.items():
            shape = entries, seqlen, *rest
            if options.layout == "bhsd":
                shape = entries, rest[0], seqlen, rest[1]
            elif varlen:
                shape = min(entries * seqlen, most), *rest
            views[name] = fresh(shape, dtype, device)
        for side in "qk" if varlen else "":
            views[f"cu_seqlens_{side}"] = fresh((entries + 1,), "int32", device)
        if kind is Forward:
            _warm_up(views, options, asked, backward)
        elif kind is AutoForward:
            kind(views, options)
        else:
            kind(views, options, purpose=Purpose.AHEAD)
            request, _ = fp8_request_of(views, options)
            chosen = selection_of(request, options.config, Purpose.AHEAD).forward
            traits = replace(request.traits, key_scales=chosen.traits.key_scales)
            _load_tuned(("forward",), traits, request.device)


def _warm_up(
    views: dict[str, ArrayView],
    options: AttentionOptions,
    asked: GradientOptions,
    backward: bool,
) -> None:
    """Make calls on these views ready; also their kernels with tuned configs, of any sizes."""
    of_forward, of_backward = _by_pass(options) if backward else (options, None)
    request = request_of(views, of_forward)
    if backward:
        like = fresh(request.lse_shape, "float32", request.device)
        given = {
            name: like if array is True else _view(array, name, request.device)
            for name, array in asked.arrays().items()
        }
        given |= views_of_results(request, given)
        # First, so that wrong options are found before anything is compiled.
        Backward(views | given, of_backward, asked, Purpose.AHEAD)
    Forward(views, of_forward, Purpose.AHEAD)
    families = ("forward", *((*BACKWARD, FUSED) if backward else ()))
    _load_tuned(families, request.traits, request.device)


def _load_tuned(families: tuple[str, ...], traits: Traits, device: int) -> None:
    """Compile and load the kernels with tuned configs that calls with these traits may take."""
    if SIMULATED or not tuned.enabled():
        return
    limits = limits_of_device(device)
    for family in families:
        # The sizes that decide which of them a call takes are not known yet.
        for each in tuned.choices(family, traits, device_key(device), limits):
            configs = (each.config, each.config.reduction()) if family == FUSED else (each.config,)
            for config in configs:
                load(get_cubin(config, each.traits, limits), device)


def _with_examples(options: dict[str, Any], num_heads: int) -> dict[str, Any]:
    """The options, with examples of features that are asked for by True."""
    options = dict(options)
    for row in FEATURES:
        if row.name != row.option and row.name in options:
            expect_bool(row.name, options[row.name])
        elif not isinstance(options.get(row.name), bool):
            continue
        if options.pop(row.name):
            examples = {row.option: row.example(num_heads)}
            examples |= {each.name: each.example for each in row.beside}
            options = examples | options
    return options


def _views_of_options(options: AttentionOptions, device: int) -> dict[str, ArrayView]:
    return {name: _view(array, name, device) for name, array in options.arrays().items()}


def _view(array, name: str, device: int) -> ArrayView:
    return replace(metadata(array, name), device=device)


def _expect_size(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind_of(value)})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
