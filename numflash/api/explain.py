"""`numflash.explain_dispatch`: the kernels that a call runs, and why not the others."""

from dataclasses import dataclass, replace

from numflash.calls.forward import DEFAULTS, expect_known, problem_of
from numflash.calls.fp8_forward import AutoForward, Fp8Forward, SelectedForward
from numflash.calls.fp8_options import has_fp8, take_apart, with_budget
from numflash.problem.problem import as_tensor
from numflash.runtime.arrays import library_of, metadata
from numflash.runtime.gpus import Gpu, find
from numflash.runtime.views import ArrayView, contiguous_strides
from numflash.selection.choice import (
    backward_choices,
    combine_choice,
    forward_choice,
    forward_configs,
    split_configs,
)
from numflash.selection.geometry import Geometry
from numflash.selection.rules import Choice

_AS_FLOAT16 = (
    "  codes are multiplied as float16: mma.sync of e4m3 is an instruction on sm_89, sm_120 and "
    "sm_121 only"
)
_NO_BACKWARD = "backward: none, there is no backward on 8-bit floats; take gradients in 16 bits"


@dataclass(frozen=True)
class Explanation:
    """The kernels of one problem; `print` shows them with the reasons.

    Attributes:
        forward: the kernel of `attention`.
        geometry: how the forward is laid over the machine; all ones for a portable kernel.
        combine: the kernel that puts the parts of split keys together; None without splits.
        backward: the kernels of `attention_backward`, by family; none on 8-bit floats.
        in_16_bits: with precision="auto", the kernel for the heads that `forward` leaves out.
        gpu: the GPU that was asked about, where it need not be here.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((2, 4096, 16, 64), "float16")
        >>> explanation = numflash.explain_dispatch(x, x, x, arch="sm_80")
        >>> explanation.forward.family, sorted(explanation.backward)
        ('forward', ['backward-dkdv', 'backward-dq'])
    """

    forward: Choice
    geometry: Geometry
    combine: Choice | None
    backward: dict[str, Choice]
    in_16_bits: Choice | None = None
    gpu: Gpu | None = None

    def __str__(self) -> str:
        lines = [str(self.forward)] if self.gpu is None else [f"on {self.gpu}", str(self.forward)]
        traits = self.forward.traits
        if traits.fp8 and not self.forward.config.multiplies_codes:
            lines.append(_AS_FLOAT16)
        if self.geometry.pack > 1:
            lines.append(
                f"  {self.geometry.pack} query heads of a group are packed into the rows of a tile"
            )
        if self.geometry.num_splits > 1:
            lines.append(f"  the keys are split over {self.geometry.num_splits} blocks")
        others = [x for x in (self.combine, self.in_16_bits) if x is not None]
        lines += map(str, [*others, *self.backward.values()])
        return "\n".join([*lines, *([_NO_BACKWARD] if traits.fp8 else [])])


def explain_dispatch(q, k, v, *, arch: str | None = None, **options) -> Explanation:
    """Say which kernels and configs `attention` and `attention_backward` would run.

    Args:
        q, k, v: as for `numflash.attention`; only their metadata matters. With arch they may also
            be NumPy arrays or tensors on any device.
        arch: answer for a GPU that need not be here: its name, "NVIDIA H200" or "h200", or an
            architecture, "sm_90". The number of SMs and the size of the L2 cache, which decide
            splits and the order of blocks, are those of a table (`numflash.runtime.gpus`). For an
            architecture by itself they are assumed to be those of its GPU in that table, or of
            the newest before it: A100 80 GB SXM for sm_80, H100 SXM for sm_90, RTX 4090 for
            sm_89; `str` says which. Tuned configs are those that this machine has for that GPU,
            else those shipped. None answers for the device that the arrays lie on.
        options: the options of `numflash.attention`, without out, stream and return_lse. `config`
            may be a dictionary that also names configs for the backward, by family.

    Returns:
        The chosen kernels. `str` lists, below each, every other candidate and why it will not run.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`; an arch that is none.

    With precision="fp8" the kernels that quantise are compiled on the way, as the call does,
    except with arch. On 8-bit floats there is no backward: `backward` is empty.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((2, 4096, 16, 64), "float16")
        >>> print(numflash.explain_dispatch(x, x, x, arch="NVIDIA H200"))  # doctest: +ELLIPSIS
        on NVIDIA H200...
        forward: sm90-...
    """
    gpu = None if arch is None else find(arch)
    descales = tuple(options.pop(f"{name}_descale", None) for name in "qkv")
    expect_known("explain_dispatch", options, ("arch",))
    options = {**DEFAULTS, **options}
    if options["max_rel_error"] is not None:
        options = with_budget(options)
    is_fp8 = options["precision"] in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        return _explain_fp8({"q": q, "k": k, "v": v}, descales, options, gpu)
    if options["fp8"] is not None:
        raise ValueError(f'fp8 goes with precision="fp8", precision is {options["precision"]!r}')
    forward_configs, backward_configs = split_configs(options["config"])
    views = _views({"q": q, "k": k, "v": v}, options, gpu)
    problem, traits, device = problem_of(views, options)
    forward, geometry = forward_choice(
        problem, traits, device, forward_configs.get("forward"), runs=False
    )
    combine = None
    if geometry.num_splits > 1:
        combine = combine_choice(
            problem, traits, device, forward_configs.get("combine"), runs=False
        )
    backward = backward_choices(problem, traits, device, backward_configs, runs=False)
    return Explanation(forward, geometry, combine, backward, gpu=gpu)


def _explain_fp8(arrays: dict, descales: tuple, options: dict, gpu: Gpu | None) -> Explanation:
    arrays, options = take_apart(arrays, descales, options)
    views = _views(arrays, options, gpu)
    if options["precision"] != "auto":
        asked = _AskedFp8(views, options)
        return Explanation(asked.choice, asked.geometry, asked.combine, {}, gpu=gpu)
    asked = _AskedAuto(views, with_budget(options))
    in_16_bits = _AskedSelected(views, options | {"precision": None})
    return Explanation(asked.choice, asked.geometry, None, {}, in_16_bits.choice, gpu)


class _Asked:
    """A forward that is asked about: checked and chosen, and not compiled."""

    def _prepare(self, views, rows, options, copied=()):
        problem, _, self.device = problem_of(rows, options)
        q = rows["q"]
        shape = (*q.shape[:-1], problem.head_dim_v)
        out = ArrayView(0, shape, contiguous_strides(shape), q.dtype, q.device)
        all_rows = {**{name: rows[name] for name in "qkv"}, "out": out}
        tensors = {n: as_tensor(n, x, options["layout"]) for n, x in all_rows.items()}
        problem = self._seen_by_bulk_copies(replace(problem, no_tensor_maps=None), tensors)
        traits, configs = self._traits(problem, tensors), forward_configs(options["config"])
        self._arguments(problem, tensors)  # raises for scales that do not fit
        self.choice, self.geometry = self._choose(problem, traits, configs.get("forward"))
        self.combine = None
        if self.geometry.num_splits > 1:
            self.combine = combine_choice(
                problem, traits, self.device, configs.get("combine"), runs=False
            )


class _AskedFp8(_Asked, Fp8Forward):
    pass


class _AskedAuto(_Asked, AutoForward):
    def __init__(self, views, options):
        Fp8Forward.__init__(self, views, options, statistics=True)


class _AskedSelected(_Asked, SelectedForward):
    pass


def _views(arrays: dict, options: dict, gpu: Gpu | None) -> dict[str, ArrayView]:
    if options["alibi_slopes"] is not None:
        arrays = {**arrays, "alibi_slopes": options["alibi_slopes"]}
    if gpu is None:
        return {n: library_of(x, n).view(x, n) for n, x in arrays.items()}
    return {n: replace(metadata(x, n), device=gpu) for n, x in arrays.items()}
