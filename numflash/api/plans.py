"""Calls prepared before they are launched: plans, and kernels compiled ahead."""

from dataclasses import replace

from numflash.api.block_masks import with_own_block_mask
from numflash.calls.fp8_forward import AutoForward, Fp8Forward
from numflash.calls.fp8_options import MAX_REL_ERROR, refuse_backward
from numflash.calls.launch import load
from numflash.calls.ready import BoundForward, bind_forward
from numflash.configs import Traits, padded_head_dim
from numflash.configs.features import rows_of
from numflash.machine_code.compiler import get_cubin
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.problem.gradients import Gradients
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import expect_contiguous_rows, expect_head_dim, expect_precision
from numflash.runtime.arrays import library_of, stream_address
from numflash.runtime.driver import limits_of_device, multiprocessors
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import ArrayView, contiguous_strides
from numflash.selection import tuned
from numflash.selection.choice import BACKWARD, HEAD_SUMS, device_key, traits_of_delta
from numflash.selection.geometry import num_splits
from numflash.selection.rules import choose

_LONG, _MANY = 2**20, 2**10


class Plan:
    """An attention call made ready: the same arrays, launched again and again.

    Everything is checked, compiled, allocated and packed once, by `numflash.plan`. A launch reads
    q, k and v where they are and writes `out` and `lse`.

    Attributes:
        out: the result, as `attention` returns it.
        lse: the log-sum-exp, as `attention` returns it.
        kernel: that runs: its family, its config and the traits it was compiled for.
        decision: with precision="auto" a `PrecisionDecision`, made again by each launch.

    Where CuPy sees q for another library, each launch hands the same memory back again, so that
    this library's work comes after the launch: take the results from the plan after each launch.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> plan = numflash.plan(q, k, v)
        >>> plan.launch() is plan.out, plan.lse.shape
        (True, (1, 2, 32))
    """

    def __init__(self, bound: BoundForward):
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
            a copy would not see the change. With precision="fp8" each launch quantises again.
        options: the other options of `attention`, without return_lse.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> plan = numflash.plan(q, k, v)
        >>> v[:] = 1  # the plan reads the arrays where they are
        >>> bool(np.allclose(plan.launch(), 1, atol=1e-3))
        True
    """
    options = AttentionOptions.of("plan", options, ("out", "stream"))
    options = with_own_block_mask(options, stream)
    for name, array in (("q", q), ("k", k), ("v", v)):
        array = array.data if isinstance(array, Fp8Array) else array
        view = library_of(array, name).view(array, name)
        expect_contiguous_rows(f"{name} of a plan", view)
    descales = q_descale, k_descale, v_descale
    return Plan(bind_forward(q, k, v, out, options, stream, descales))


def warmup(
    dtype: str = "float16",
    head_dim: int = 64,
    head_dim_v: int | None = None,
    *,
    seqlen_q: int = _LONG,
    seqlen_k: int = _LONG,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    dropout: bool = False,
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
        softcap, alibi, sinks, dropout: whether the calls will use them.
        precision, fp8: as in the calls to come; on 8-bit floats also what quantises.
        backward: also compile for `attention_backward`.
        device: ordinal of the CUDA device.

    Raises:
        TypeError: a head_dim that is not an integer, an fp8 that is no `Fp8Recipe`.
        ValueError: a dtype that does not exist or does not go with precision, a head_dim below 1.
        UnsupportedError: a head_dim above 256, no GPU, or no compiler; a backward on 8-bit floats.

    Example:
        >>> import numflash
        >>> numflash.warmup("bfloat16", head_dim=128, backward=True)
    """
    asked = {"softcap": softcap, "alibi": alibi, "sinks": sinks, "dropout": dropout}
    features = tuple(name for name, is_asked in asked.items() if is_asked)
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
        options = AttentionOptions(precision=precision, fp8=fp8, max_rel_error=MAX_REL_ERROR)
        sizes = (seqlen_q, head_dim), (seqlen_k, head_dim_v)
        if not SIMULATED:
            _warm_up_fp8(dtype, *sizes, features, device, options)
        return
    vector = 4 if dtype == "float32" else 8
    traits = Traits(
        dtype,
        padded_head_dim(head_dim),
        padded_head_dim(head_dim_v),
        features,
        vectorized=head_dim % vector == 0 and head_dim_v % vector == 0,
        tf32=precision == "tf32",
    )
    if SIMULATED:
        return
    limits = limits_of_device(device)
    families = ["forward", *(("delta", *BACKWARD) if backward else ())]
    gradients = Gradients.of(features)
    if backward and gradients.options_of("delta", features):
        load(get_cubin(HEAD_SUMS.config, HEAD_SUMS.traits, limits), device)
    for family in families:
        rows = seqlen_k if family == "backward-dkdv" else seqlen_q
        # Bulk copies cannot fetch contiguous arrays whose rows are not aligned.
        no_bulk_copies = None if traits.vectorized else "rows are not aligned to 16 bytes"
        asked = traits_of_delta(traits, gradients) if family == "delta" else traits
        choices = [choose(family, asked, limits, rows, no_bulk_copies=no_bulk_copies)]
        if tuned.enabled():
            # The sizes that decide which of them a call takes are not known yet.
            choices += tuned.choices(family, traits, device_key(device), limits)
        for choice in choices:
            load(get_cubin(choice.config, choice.traits, limits), device)
        choice = choices[0]
        if family == "forward" and choice.has_geometry:
            blocks = -(-seqlen_q // choice.config.block_rows)
            num_sms, _ = multiprocessors(device)
            if num_splits(choice.config, traits, limits, num_sms, blocks, seqlen_k) > 1:
                split = replace(choice.config, num_splits=2)
                combine = choose("combine", traits, limits)
                for each in (replace(choice, config=split), combine):
                    load(get_cubin(each.config, each.traits, limits), device)


def _warm_up_fp8(dtype, q_size, v_size, features: tuple, device: int, options) -> None:
    """Make calls ready from shapes alone, without arrays."""
    kind = AutoForward if options.precision == "auto" else Fp8Forward
    sizes = {"q": q_size, "k": (v_size[0], q_size[1]), "v": v_size}
    # One head may be split over its keys, many are not.
    for batch in (1, _MANY):
        views = {}
        for name, (seqlen, columns) in sizes.items():
            shape = (batch, seqlen, 1, columns)
            views[name] = ArrayView(0, shape, contiguous_strides(shape), dtype, device)
        asked = {}
        for row in rows_of(features):
            value = row.example(1)
            if row.is_array:
                strides = contiguous_strides(value.shape)
                views[row.option] = ArrayView(0, value.shape, strides, "float32", device)
            else:
                asked[row.option] = value
        kind(views, options._replace(**asked))
