"""`numflash.explain_dispatch`: the kernels that a call runs, and why not the others."""

from dataclasses import dataclass, replace

from numflash.api.block_masks import with_own_block_mask
from numflash.calls.arguments import request_of
from numflash.calls.forward import selection_of
from numflash.calls.fp8_forward import auto_requests_of, fp8_request_of
from numflash.calls.fp8_options import has_fp8, take_apart, with_budget
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import library_of, metadata
from numflash.runtime.driver import machine_of
from numflash.runtime.gpus import Gpu, find
from numflash.runtime.views import ArrayView
from numflash.selection.choice import Selection, select
from numflash.selection.rules import Choice

_AS_FLOAT16 = (
    "  codes are multiplied as float16: mma.sync of e4m3 is an instruction on sm_89, sm_120 and "
    "sm_121 only"
)
_NO_BACKWARD = "backward: none, there is no backward on 8-bit floats; take gradients in 16 bits"


@dataclass(frozen=True)
class Explanation(Selection):
    """The kernels of one problem; `print` shows them with the reasons.

    Attributes:
        forward: the kernel of `attention`.
        geometry: how the forward is laid over the machine; all ones for a portable kernel, but
            for the blocks of its grid.
        combine: the kernel that puts the parts of split keys together; None without splits.
        delta: the kernel that runs before those of the backward; None on 8-bit floats.
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

    Nothing is compiled or launched. On 8-bit floats there is no backward: `backward` is empty.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.empty((2, 4096, 16, 64), "float16")
        >>> print(numflash.explain_dispatch(x, x, x, arch="NVIDIA H200"))  # doctest: +ELLIPSIS
        on NVIDIA H200...
        forward: sm90-...
    """
    gpu = None if arch is None else find(arch)
    descales = tuple(options.pop(f"{name}_descale", None) for name in "qkv")
    options = AttentionOptions.of("explain_dispatch", options, ("arch",))
    # A number in an array's place is no array.
    options.numbers()
    options = with_own_block_mask(options)
    if options.max_rel_error is not None:
        options = with_budget(options)
    is_fp8 = options.precision in ("fp8", "auto") or any(x is not None for x in descales)
    if is_fp8 or has_fp8(q, k, v):
        return _explain_fp8({"q": q, "k": k, "v": v}, descales, options, gpu)
    if options.fp8 is not None:
        raise ValueError(f'fp8 goes with precision="fp8", precision is {options.precision!r}')
    request = request_of(_views({"q": q, "k": k, "v": v}, options, gpu), options)
    found = select(
        request.problem,
        request.traits,
        machine_of(request.device),
        options.config,
        passes=("forward", "backward"),
        runs=False,
    )
    return Explanation(**vars(found), gpu=gpu)


def _explain_fp8(arrays: dict, descales, options: AttentionOptions, gpu) -> Explanation:
    arrays, options, described = take_apart(arrays, descales, options)
    views = _views(arrays, options, gpu)
    if options.precision != "auto":
        request, _ = fp8_request_of(views, options, described)
        return Explanation(**vars(selection_of(request, options.config, runs=False)), gpu=gpu)
    request, _, other = auto_requests_of(views, with_budget(options), described)
    in_8_bits = selection_of(request, options.config, runs=False)
    in_16_bits = selection_of(other, None, runs=False).forward
    return Explanation(**vars(in_8_bits), in_16_bits=in_16_bits, gpu=gpu)


def _views(arrays: dict, options: AttentionOptions, gpu: Gpu | None) -> dict[str, ArrayView]:
    arrays = arrays | options.arrays()
    if gpu is None:
        return {n: library_of(x, n).view(x, n) for n, x in arrays.items()}
    return {n: replace(metadata(x, n), device=gpu) for n, x in arrays.items()}
