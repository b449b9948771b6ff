"""The forward made ready: checked, its kernels chosen, built and bound to all but addresses.

`ready` keeps one `Forward` for each distinct problem and calls it again and again.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numflash.calls.arguments import Request, copy_all_rows, request_of
from numflash.calls.launch import Launcher, Mapped
from numflash.configs import implementation_of
from numflash.kernels.arguments import Layout, Part
from numflash.problem.options import AttentionOptions
from numflash.problem.tensor_maps import TensorLayout
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import machine_of
from numflash.runtime.views import ArrayView, Operand, overlap
from numflash.selection.choice import Selection, select
from numflash.selection.geometry import Geometry

Launches = dict[str, Callable[[int], None]]
"""By family, in order: functions that launch on a stream."""


class Forward:
    """A forward problem with its kernels bound to everything but addresses.

    Attributes:
        device: where.
        kernel: which kernel computes the result.
    """

    def __init__(self, views: dict[str, ArrayView], options: AttentionOptions):
        """Check, choose and build. Raises as `numflash.attention`."""
        request = request_of(views, options)
        self.device, self._results = request.device, Results(views, request)
        self._kernels = kernels_of(request, options.config)
        self._kernels.build()
        self.kernel = self._kernels.name

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, Launches]:
        """Allocate; (out, lse, and by family, in order, functions that launch on a stream)."""
        out, lse = self._results.allocate(operands, library)
        return out, lse, self._kernels.bind(operands, library)


class Results:
    """The results of a forward call: out, which may be the caller's, and lse."""

    def __init__(self, views: dict[str, ArrayView], request: Request):
        """Check that an `out` of the caller's overlaps no input. Raises ValueError."""
        self._request, self._views = request, views
        self._is_given = "out" in views
        if self._is_given:
            self._spans = {name: view.span() for name, view in views.items()}
            self._refuse_overlap({name: view.pointer for name, view in views.items()})

    def allocate(self, operands: dict[str, Operand], library: ArrayLibrary) -> tuple[Any, Any]:
        """(out, lse), also put into `operands`."""
        request = self._request
        if self._is_given:
            self._refuse_overlap({name: operands[name].pointer for name in self._spans})
            out = operands["out"].array
        else:
            dtype = request.tensors["out"].view.dtype
            out = library.empty(request.out_shape, dtype, request.device)
            operands["out"] = library.operand(out)
        lse = library.empty(request.lse_shape, "float32", request.device)
        operands["lse"] = library.operand(lse)
        return out, lse

    def _refuse_overlap(self, pointers: dict[str, int]) -> None:
        """Raise ValueError if `out` shares memory with an input, all at these addresses."""
        first, end = (pointers["out"] + offset for offset in self._spans["out"])
        for name, (low, high) in self._spans.items():
            # Most arrays lie apart, which is quick to see; those that interleave need a proof.
            apart = pointers[name] + high <= first or end <= pointers[name] + low
            if name != "out" and not apart:
                out = replace(self._views["out"], pointer=pointers["out"])
                if overlap(out, replace(self._views[name], pointer=pointers[name])):
                    raise ValueError(f"out must not overlap {name}, but they share memory")


class ForwardKernels:
    """The kernels of a forward: the one for attention, and the one that combines its parts.

    Attributes:
        name: which kernel computes the result.
    """

    def __init__(
        self, request: Request, launchers: dict[str, Launcher], workspaces: dict[str, int]
    ):
        self._device, self._copied = request.device, request.copied
        self._launchers, self._workspaces = launchers, workspaces
        self.name = str(launchers.get("forward", "none: the result is empty"))

    def build(self) -> None:
        """Compile and load them."""
        for launcher in self._launchers.values():
            launcher.build()

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary) -> Launches:
        """Allocate workspaces; by family, in order, functions that launch."""
        operands = dict(operands)
        copy_all_rows(self._copied, operands)
        for name, size in self._workspaces.items():
            operands[name] = library.operand(library.empty((size,), "float32", self._device))
        return {family: each.bind(operands) for family, each in self._launchers.items()}


def selection_of(request: Request, config, runs: bool = True) -> Selection:
    """The kernels of a request: see `select`, as for `config` and `runs`."""
    return select(
        request.problem,
        request.traits,
        machine_of(request.device),
        config,
        tokens_per_scale=request.tokens_per_scale,
        runs=runs,
    )


def kernels_of(request: Request, config) -> ForwardKernels:
    """The kernels of a request, chosen and bound to all but addresses; none if it is empty."""
    if request.is_empty:
        return ForwardKernels(request, {}, {})
    return _laid_out(request, selection_of(request, config))


def _laid_out(request: Request, selection: Selection) -> ForwardKernels:
    problem, choice, geometry = request.problem, selection.forward, selection.geometry
    num_splits = geometry.num_splits
    arguments = {
        **request.arguments,
        "out": Part("out", 0, *request.tensors["out"].strides[:3]),
        "layout": Layout(geometry.pack, num_splits, geometry.heads_in_flight),
        "num_splits": num_splits,
    }
    if implementation_of(choice.config).needs_maps:
        arguments |= _tensor_maps(request, choice.config, geometry)
    workspaces, combine, into = {}, {}, {}
    if num_splits > 1:
        row = choice.traits.head_dim_v
        heads = problem.num_heads_q * row
        rows = problem.batch * problem.seqlen_q * problem.num_heads_q
        workspaces = {"parts": num_splits * rows * row, "part_lses": num_splits * rows}
        into = {
            "out": Part("parts", rows * row, problem.seqlen_q * heads, heads, row),
            "lse": "part_lses",
        }
        combine = {"combine": _combine(request, selection, arguments)}
    forward = Launcher(
        choice.config, choice.traits, request.device, geometry.blocks, arguments | into
    )
    return ForwardKernels(request, {"forward": forward, **combine}, workspaces)


def _combine(request: Request, selection: Selection, arguments: dict) -> Launcher:
    choice, problem = selection.combine, request.problem
    blocks = problem.num_blocks(problem.seqlen_q, problem.num_heads_q, choice.config.block_rows)
    return Launcher(choice.config, choice.traits, request.device, blocks, arguments)


def _tensor_maps(request: Request, config, geometry: Geometry) -> Mapping[str, Mapped]:
    """The tensor maps of a forward by parameter name."""
    tensors = request.tensors
    # Float32 is written without bulk copies: the map is that of any tensor, and never used.
    out = "q" if geometry.num_splits > 1 or request.traits.float32_out else "out"
    layouts = {
        "q": TensorLayout.of_queries(tensors["q"], geometry.pack),
        "out": TensorLayout.of_queries(tensors[out], geometry.pack),
        "k": TensorLayout.of_keys(tensors["k"], config.stage_n),
        "v": TensorLayout.of_transposed_values(tensors["v"])
        if request.traits.fp8
        else TensorLayout.of_keys(tensors["v"], config.stage_n),
    }
    operands = {"q": "q", "out": out, "k": "k", "v": "v"}
    return {
        f"{name}_map": Mapped(operands[name], replace(layout, l2_bytes=config.l2_bytes))
        for name, layout in layouts.items()
    }
