"""The forward on 8-bit floats made ready: what makes codes and scales, and its kernels."""

from dataclasses import replace
from typing import Any

from numflash.calls.arguments import (
    Request,
    arguments_of,
    described_out,
    lse_shape,
    request_of,
    seen_by_bulk_copies,
)
from numflash.calls.forward import ForwardKernels, Launches, Results, kernels_of
from numflash.calls.fp8_sources import (
    SIXTEEN_BITS,
    AllDescribed,
    Source,
    make_sources,
    result_dtype,
)
from numflash.calls.launch import Launcher
from numflash.configs import FP8_STEP, EstimateConfig, Traits, padded_fp8_head_dim
from numflash.configs.features import rows_of
from numflash.kernels.arguments import Descales, QueryDescale
from numflash.kernels.quantize.arguments import Squares
from numflash.problem.options import ARRAY_OPTIONS, AttentionOptions
from numflash.problem.problem import AttentionProblem, Tensor, describe
from numflash.problem.sequences import NAMES as OF_SEQUENCES
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, Operand
from numflash.selection.choice import Purpose

Sources = dict[str, Source]
"""Makers of codes and scales of "q", "k" and "v"."""


class Fp8Forward:
    """A forward problem on 8-bit floats with its kernels bound to everything but addresses.

    Attributes:
        device: where.
        kernel: which kernel computes the result.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        described: AllDescribed = (),
        purpose: Purpose = Purpose.CALL,
    ):
        """Check, choose and build. Raises as `numflash.attention`."""
        request, self._sources = fp8_request_of(views, options, described)
        self.device, self._results = request.device, Results(views, request)
        self._kernels = kernels_of(request, options.config, purpose)
        self.kernel = self._kernels.name
        _build(*self._sources.values(), self._kernels)

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, Launches]:
        """As `Forward.bind`; what quantises comes first."""
        out, lse = self._results.allocate(operands, library)
        codes, launches = _quantise(self._sources, operands, library)
        return out, lse, launches | self._kernels.bind(codes, library)


class AutoForward:
    """A forward problem whose key-value heads are computed in 8 bits where that is exact enough.

    Nothing waits for the decision: it is made on the device, and both kernels run over all heads,
    each passing over those of the other.

    Attributes:
        device: where.
        kernel: which kernel computes heads in 8 bits.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        described: AllDescribed = (),
    ):
        """Check, choose and build. Raises as `numflash.attention`."""
        request, self._sources, in_16_bits = auto_requests_of(views, options, described)
        self.device, self._results = request.device, Results(views, request)
        self._decision_shape = request.problem.batch, request.problem.num_heads_kv
        self._kernels = kernels_of(request, options.config)
        self._in_16_bits = kernels_of(in_16_bits, None)
        self.kernel = self._kernels.name
        self._estimate = None
        if not request.is_empty and 0 not in self._decision_shape:
            self._estimate = _estimate(request, self._sources, options.max_rel_error)
            self._estimate.build()
        _build(*self._sources.values(), self._kernels, self._in_16_bits)

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, Launches]:
        """As `Forward.bind`; the decision is put into `operands`, "in_fp8" and "estimate"."""
        out, lse = self._results.allocate(operands, library)
        for name, dtype in (("in_fp8", "int32"), ("estimate", "float32")):
            array = library.empty(self._decision_shape, dtype, self.device)
            operands[name] = library.operand(array)
        codes, launches = _quantise(self._sources, operands, library)
        if self._estimate is not None:
            launches["estimate"] = self._estimate.bind(codes)
        launches |= self._kernels.bind(codes, library)
        others = self._in_16_bits.bind(operands, library)
        return out, lse, launches | {f"{name} in 16 bits": x for name, x in others.items()}


def fp8_request_of(
    views: dict[str, ArrayView],
    options: AttentionOptions,
    described: AllDescribed = (),
    statistics: bool = False,
) -> tuple[Request, Sources]:
    """A forward call on 8-bit floats, and what makes them; with statistics sums of squares, too.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    if given := [name for name in OF_SEQUENCES if name in views]:
        # Of V the tokens are innermost: bulk copies could not end at a sequence's end.
        raise UnsupportedError(
            f'precision="fp8" or "auto" and arrays of 8-bit floats do not go with {given[0]}: '
            "kernels on 8-bit floats know one length for all sequences"
        )
    sources = make_sources(views, options, dict(described), statistics)
    like = {name: source.view for name, source in sources.items()}
    # The result is of q's type; k and v may have been quantised from others.
    dtype = like["q"].dtype
    if dtype not in SIXTEEN_BITS:
        dtype = result_dtype(like["q"].device)
    like = {name: replace(view, dtype=dtype) for name, view in like.items()}
    q, options = like["q"], options._replace(precision=None)
    # Of a call that is made ready ahead only the views are there.
    names = {*ARRAY_OPTIONS, *options.arrays()}
    rest = {name: views[name] for name in names if name in views}
    problem, _ = describe(like | rest, options)
    for row in rows_of(problem.feature_names):
        if not row.in_8_bits:
            raise UnsupportedError(
                f'{row.option} goes with 16 and 32 bits, not with precision="fp8" or "auto" and '
                f"arrays of 8-bit floats; got {row.option} {getattr(options, row.option)}"
            )
    out = described_out(views, q, problem, options)
    tensors = {name: _codes(name, source) for name, source in sources.items()} | {"out": out}
    request = Request(
        problem=seen_by_bulk_copies(problem, tensors, transposed_v=True),
        traits=fp8_traits_of(problem, out.is_vectorizable),
        tensors=tensors,
        arguments=_arguments(problem, out, sources),
        device=q.device,
        out_shape=out.view.shape,
        lse_shape=lse_shape(problem, q),
        tokens_per_scale=min(2 ** sources[name].tokens_shift for name in "kv"),
    )
    return request, sources


def fp8_traits_of(problem: AttentionProblem, vectorized: bool) -> Traits:
    """The traits of a forward on 8-bit floats; `vectorized`: rows of out are aligned."""
    return replace(
        problem.traits(vectorized),
        head_dim=padded_fp8_head_dim(problem.head_dim),
        head_dim_v=padded_fp8_head_dim(problem.head_dim_v),
        fp8=True,
    )


def auto_requests_of(
    views: dict[str, ArrayView], options: AttentionOptions, described: AllDescribed = ()
) -> tuple[Request, Sources, Request]:
    """A call with precision="auto" in 8 bits, what makes these, and the call in 16 bits.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    if described or any(f"{name}_descale" in views for name in "qkv"):
        raise TypeError('precision="auto" chooses between 8 and 16 bits: q, k and v need 16')
    request, sources = fp8_request_of(views, options, statistics=True)
    in_16_bits = request_of(views, options._replace(precision=None))
    return request.of_selected_heads(), sources, in_16_bits.of_selected_heads()


def _build(*parts: Source | ForwardKernels) -> None:
    """Compile and load, which takes a while: only when all kernels are chosen."""
    for part in parts:
        part.build()


def _quantise(
    sources: Sources, operands: dict[str, Operand], library: ArrayLibrary
) -> tuple[dict[str, Operand], Launches]:
    """The operands with codes and scales in the place of arrays; what makes them, by name."""
    codes, launches = dict(operands), {}
    for source in sources.values():
        launches |= source.bind(codes, library)
    return codes, launches


def _codes(name: str, source: Source) -> Tensor:
    """The codes that the kernel reads; V has tokens innermost."""
    view = replace(source.data, dtype="uint8")
    return Tensor(name, view, view.shape, view.strides)


def _arguments(problem: AttentionProblem, out: Tensor, sources: Sources) -> dict[str, object]:
    for name, source in sources.items():
        _expect_heads(problem, name, source)
    q, k, v = (sources[name] for name in "qkv")
    per_head = q.descale_shape[1] in (1, problem.num_heads_q)
    scales = q.descale()
    of_q = QueryDescale(
        scales.data,
        scales.batch,
        scales.head,
        packed=scales.head if per_head else 0,
        group=1 if per_head else problem.group_size,
        shift=scales.shift,
    )
    return arguments_of(problem, {"out": out}) | {
        **{name: source.codes() for name, source in sources.items()},
        "descales": Descales(of_q, k.descale(), v.descale()),
    }


def _expect_heads(problem: AttentionProblem, name: str, source: Source) -> None:
    allowed = {1, problem.num_heads_kv}
    if name == "q" and source.rotation is not None:
        allowed = {1, problem.num_heads_q}
    elif name == "q":
        allowed |= {problem.num_heads_q}
    if source.descale_shape[1] not in allowed:
        raise ValueError(
            f"{name}_descale must have {problem.num_heads_kv} heads, as many as k, got "
            f"{source.descale_shape[1]}"
        )


def _estimate(request: Request, sources: Sources, max_rel_error: float) -> Launcher:
    """The kernel that decides which heads keep within an error in 8 bits."""
    problem, q = request.problem, sources["q"]
    arguments = arguments_of(problem, {}) | {
        **{
            name: Squares(f"{name}_statistics", source.statistics_tokens)
            for name, source in sources.items()
        },
        "in_fp8": "in_fp8",
        "rotated_dims": problem.head_dim if q.rotation is None else q.data.shape[3],
        "max_rel_error": max_rel_error,
    }
    traits = Traits(problem.dtype, FP8_STEP, FP8_STEP)
    blocks = problem.batch * problem.num_heads_kv
    return Launcher(EstimateConfig(), traits, request.device, blocks, arguments)
