"""`numflash.explain` and `explain_dispatch`: the kernels that a call runs, and why not the others.

The page that `explain` writes is made by the tuner's package, which knows the offline model. It is
found through the entry point `numflash.explain`: numflash never imports the tuner.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike

from numflash.api.block_masks import with_own_block_mask
from numflash.api.pages import page_writer
from numflash.calls.arguments import Request, request_of
from numflash.calls.backward import Backward, views_of_results
from numflash.calls.forward import selection_of
from numflash.calls.fp8_forward import auto_requests_of, fp8_request_of
from numflash.calls.fp8_options import (
    expect_recipe_is_used,
    has_fp8,
    refuse_backward,
    take_apart,
    with_budget,
)
from numflash.problem.options import AttentionOptions, GradientOptions, options_of
from numflash.problem.problem import AttentionProblem
from numflash.runtime.arrays import library_of, metadata
from numflash.runtime.driver import Machine, machine_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.gpus import Gpu, find
from numflash.runtime.torch_tensors import without_gradient
from numflash.runtime.views import ArrayView
from numflash.selection.choice import Purpose, Selection, split_configs
from numflash.selection.rules import Choice

_AS_FLOAT16 = (
    "  codes are multiplied as float16: mma.sync of e4m3 is an instruction on sm_89, sm_120 and "
    "sm_121 only"
)
_NO_BACKWARD = "backward: none, there is no backward on 8-bit floats; take gradients in 16 bits"
_NO_BACKWARD_OF_PAGES = "backward: none, keys in pages of a cache have no gradients"


@dataclass(frozen=True)
class Explanation(Selection):
    """The kernels of one problem; `print` shows them with the reasons.

    Attributes:
        forward: the kernel of `attention`.
        geometry: how the forward is laid over the machine; all ones for a portable kernel, but
            for the blocks of its grid.
        combine: the kernel that puts the parts of split keys together; None without splits.
        delta: the kernel that runs before those of the backward; None where there is none.
        backward: the kernels of `attention_backward`, by family; none on 8-bit floats and pages.
        arrays: by the array's name, the kernels that begin its gradient.
        of_backward: all that `attention_backward` runs, by name and in order: delta, those of
            `backward` and `arrays`, and what adds up their shares.
        in_16_bits: with precision="auto", the kernel for the heads that `forward` leaves out.
        gpu: the GPU that was asked about, where it need not be here.
        problem: the call in numbers.
        machine: the GPU as the choice of kernels sees it.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((2, 4096, 16, 64), "float16")
        >>> explanation = numflash.explain_dispatch(x, x, x, arch="sm_80")
        >>> explanation.forward.family, sorted(explanation.backward)
        ('forward', ['backward-dkdv', 'backward-dq'])
    """

    of_backward: Mapping[str, Choice] = field(default_factory=dict)
    in_16_bits: Choice | None = None
    gpu: Gpu | None = None
    problem: AttentionProblem | None = None
    machine: Machine | None = None

    def __str__(self) -> str:
        lines = [str(self.forward)] if self.gpu is None else [f"on {self.gpu}", str(self.forward)]
        traits = self.forward.traits
        if traits.fp8 and not self.forward.config.multiplies_codes:
            lines.append(_AS_FLOAT16)
        if traits.ragged:
            lines.append("  a kernel before it lists the tiles that the sequences have")
        if self.geometry.pack > 1:
            lines.append(
                f"  {self.geometry.pack} query heads of a group are packed into the rows of a tile"
            )
        if self.geometry.num_splits > 1:
            lines.append(f"  the keys are split over {self.geometry.num_splits} blocks")
        if (cluster := self.forward.config.cluster) > 1:
            lines.append(f"  the {cluster} blocks of a cluster fetch K and V for each other")
        others = [x for x in (self.combine, self.in_16_bits) if x is not None]
        lines += map(str, others)
        # Of an empty problem none runs.
        for name, choice in (self.of_backward or self.backward).items():
            lines.append(name + str(choice).removeprefix(choice.family))
        lines += [_NO_BACKWARD] if traits.fp8 else [_NO_BACKWARD_OF_PAGES] if traits.paged else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Question:
    """A call that a page explains.

    Attributes:
        arrays: the caller's q, k and v.
        options: the caller's, as they were given.
        gpu: the GPU that was asked about; None for the arrays' own.
        data: whether the elements of arrays may be read.
        to: the file to write; None if nobody asked for a page.
        answer: the kernels; None if none runs this call.
        refusal: the reason why none does; None if some run.
    """

    arrays: Mapping[str, object]
    options: Mapping[str, object]
    gpu: str | None
    data: bool
    to: str | PathLike | None
    answer: Explanation | None = None
    refusal: UnsupportedError | None = None


def explain(
    q,
    k,
    v,
    *,
    gpu: str | None = None,
    to: str | PathLike | None = None,
    data: bool = True,
    **options,
) -> Explanation:
    """Say which kernels a call would run, and write a page that shows what they do.

    The page is one file without scripts: why these kernels, the mask over tiles, blocks over
    multiprocessors in time, one multiprocessor clock by clock, where the time goes, bytes and
    memory, errors, and scales of 8-bit floats. Times are those of the offline model, unless the
    page says that they were measured.

    Args:
        q, k, v: as for `numflash.attention`.
        gpu: answer for a GPU that need not be here, as `arch` of `explain_dispatch`.
        to: the page to write, an HTML file; None writes none.
        data: whether the page may read elements of the arrays, for errors, scales and the lists of
            a block mask. False reads their metadata only; the page then shows samples of its own,
            takes all blocks of a mask as kept, and says so.
        options: as for `explain_dispatch`.

    Returns:
        The chosen kernels, as `explain_dispatch` returns them.

    Raises:
        TypeError, ValueError: as `explain_dispatch`; a gpu that is none.
        UnsupportedError: no kernel runs this call. The page is written, and says why.
        OSError: the page cannot be written.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((1, 512, 4, 64), "float16")
        >>> numflash.explain(x, x, x, causal=True, gpu="H200").forward.family
        'forward'
    """
    if not isinstance(data, bool):
        raise TypeError(f"data must be True or False, got {data!r} ({type(data).__name__})")
    if to is not None and not isinstance(to, str | PathLike):
        raise TypeError(f"to must be a path or None, got {to!r} ({type(to).__name__})")
    asked_gpu = None if gpu is None else find(gpu, "gpu")
    write, arrays = None if to is None else page_writer(), {"q": q, "k": k, "v": v}
    question = Question(arrays, options, gpu, data, to)
    try:
        answer = _answer("explain", ("gpu", "to", "data"), arrays, asked_gpu, dict(options))
    except UnsupportedError as error:
        if write is not None:
            write(replace(question, refusal=error))
        raise
    if write is not None:
        write(replace(question, answer=answer))
    return answer


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
        options: the options of `numflash.attention`, without out, stream and return_lse, and those
            of `numflash.attention_backward`: dlse, delta, wrt and grad_dtype. `config` may be a
            dictionary that also names configs for the backward, by family.

    Returns:
        The chosen kernels. `str` lists, below each, every other candidate and why it will not run.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`; an arch that is none.

    Nothing is compiled or launched. On 8-bit floats there is no backward: `backward` is empty, and
    options of gradients are refused.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((2, 4096, 16, 64), "float16")
        >>> print(numflash.explain_dispatch(x, x, x, arch="NVIDIA H200"))  # doctest: +ELLIPSIS
        on NVIDIA H200...
        forward: sm90-...
        >>> bias = np.empty((16, 1, 4096), "float16")
        >>> asked = numflash.explain_dispatch(x, x, x, bias=bias, wrt=("bias",), arch="sm_80")
        >>> list(asked.of_backward)
        ['delta', 'backward-columns of bias, 0', 'array-sums of bias, 1']
    """
    gpu = None if arch is None else find(arch)
    return _answer("explain_dispatch", ("arch",), {"q": q, "k": k, "v": v}, gpu, options)


def _answer(
    function: str, others: tuple[str, ...], arrays: dict, gpu: Gpu | None, options: dict
) -> Explanation:
    """What a function that was asked has to say; `others` are options that only it takes."""
    q, k, v = arrays.values()
    descales = tuple(options.pop(f"{name}_descale", None) for name in "qkv")
    options, asked = options_of(function, options, others)
    # A number in an array's place is no array.
    options.numbers()
    options = with_own_block_mask(options)
    if options.max_rel_error is not None:
        options = with_budget(options)
    is_fp8 = options.precision in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        if asked != GradientOptions():
            refuse_backward(q, k, v, options.precision or "fp8")
        return _explain_fp8(arrays, descales, options, gpu)
    expect_recipe_is_used(options)
    views = _views(arrays | asked.arrays(), options, gpu)
    of_forward, of_backward = split_configs(options.config)
    request = request_of(views, options)
    forward = selection_of(request, of_forward, Purpose.QUESTION)
    found = vars(forward) | _about(request, gpu)
    if request.problem.pages is not None and asked == GradientOptions() and not of_backward:
        return Explanation(**found)
    views |= views_of_results(request, views)
    options = options.of_backward(of_backward)
    backward = Backward(views, options, asked, Purpose.QUESTION)
    found |= {name: getattr(backward.selection, name) for name in ("delta", "backward", "arrays")}
    return Explanation(**found, of_backward=backward.kernels)


def _about(request: Request, gpu: Gpu | None) -> dict[str, object]:
    """What an explanation says of the call itself."""
    return {"gpu": gpu, "problem": request.problem, "machine": machine_of(request.device)}


def _explain_fp8(arrays: dict, descales, options: AttentionOptions, gpu) -> Explanation:
    arrays, options, described = take_apart(arrays, descales, options)
    views = _views(arrays, options, gpu)
    if options.precision != "auto":
        request, _ = fp8_request_of(views, options, described)
        found = selection_of(request, options.config, Purpose.QUESTION)
        return Explanation(**vars(found), **_about(request, gpu))
    request, _, other = auto_requests_of(views, with_budget(options), described)
    in_8_bits = selection_of(request, options.config, Purpose.QUESTION)
    in_16_bits = selection_of(other, None, Purpose.QUESTION).forward
    return Explanation(**vars(in_8_bits), **_about(request, gpu), in_16_bits=in_16_bits)


def _views(arrays: dict, options: AttentionOptions, gpu: Gpu | None) -> dict[str, ArrayView]:
    arrays = arrays | options.arrays()
    arrays = {name: without_gradient(array) for name, array in arrays.items()}
    if gpu is None:
        return {n: library_of(x, n).view(x, n) for n, x in arrays.items()}
    return {n: replace(metadata(x, n), device=gpu) for n, x in arrays.items()}
