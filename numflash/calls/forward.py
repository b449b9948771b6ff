"""The forward made ready: checked, its kernels chosen, built and bound to all but addresses.

`ready` keeps one `Forward` for each distinct problem and calls it again and again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numflash.calls.arguments import Request, copy_all_rows, request_of, shape_of_list
from numflash.calls.launch import Fill, Launcher, Mapped
from numflash.calls.sequences import Beside, ScheduleKernel
from numflash.configs import implementation_of
from numflash.kernels.arguments import Between, Layout, Part, RaggedLayout, SplitTiles
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import Tensor, num_blocks
from numflash.problem.sequences import room_of
from numflash.problem.tensor_maps import TensorLayout, rows_between_entries
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import machine_of
from numflash.runtime.views import Apart, ArrayView, Operand
from numflash.selection.choice import Purpose, Selection, select
from numflash.selection.geometry import Geometry

Launches = dict[str, Callable[[int], None]]
"""By family, in order: functions that launch on a stream."""


class Forward:
    """A forward problem with its kernels bound to everything but addresses.

    Attributes:
        device: where.
        lengths: of sequences that have lengths of their own, else None.
        kernel: which kernel computes the result.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        purpose: Purpose = Purpose.CALL,
        beside: Beside | None = None,
    ):
        """Check, choose and build; `beside` as for `ScheduleKernel`.

        Raises as `numflash.attention`.
        """
        request = request_of(views, options)
        self.device, self._results = request.device, Results(views, request)
        self.lengths = request.problem.lengths
        self._kernels = kernels_of(request, options.config, purpose, beside)
        self._kernels.build()
        self.kernel = self._kernels.name

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, Launches]:
        """Allocate; (out, lse, and by family, in order, functions that launch on a stream)."""
        out, lse = self._results.allocate(operands, library)
        launches = self._results.fills(operands) | self._kernels.bind(operands, library)
        return out, lse, launches


class Results:
    """The results of a forward call: out, which may be the caller's, and lse."""

    def __init__(self, views: dict[str, ArrayView], request: Request):
        """Check that an `out` of the caller's overlaps no input. Raises ValueError."""
        self._request, self._names = request, tuple(views)
        self._apart = Apart(views) if "out" in views else None
        if self._apart:
            self._apart.expect({name: view.pointer for name, view in views.items()})

    def allocate(self, operands: dict[str, Operand], library: ArrayLibrary) -> tuple[Any, Any]:
        """(out, lse), also put into `operands`."""
        request = self._request
        if self._apart:
            self._apart.expect({name: operands[name].pointer for name in self._names})
            out = operands["out"].array
        else:
            dtype = request.tensors["out"].view.dtype
            out = library.empty(request.out_shape, dtype, request.device)
            operands["out"] = library.operand(out)
        lse = library.empty(request.lse_shape, "float32", request.device)
        operands["lse"] = library.operand(lse)
        return out, lse

    def fills(self, operands: dict[str, Operand]) -> Launches:
        """What fills results whose rows no sequence may have: 0, and lse -inf."""
        lengths = self._request.problem.lengths
        if lengths is None or not any(name.endswith("_q") for name in lengths.given):
            return {}
        filled = {"lse": -math.inf} | ({} if self._apart else {"out": 0.0})
        device = self._request.device
        return {f"fill {n}": Fill(operands[n], x, device) for n, x in filled.items()}


class ForwardKernels:
    """The kernels of a forward: the one for attention, and the one that combines its parts.

    Attributes:
        name: which kernel computes the result.
    """

    def __init__(
        self,
        request: Request,
        launchers: dict[str, Launcher],
        workspaces: dict[str, int],
        schedule: ScheduleKernel | None = None,
    ):
        self._device, self._copied = request.device, request.copied
        self._launchers, self._workspaces, self._schedule = launchers, workspaces, schedule
        self.name = str(launchers.get("forward", "none: the result is empty"))

    def build(self) -> None:
        """Compile and load them."""
        for launcher in self._launchers.values():
            launcher.build()
        if self._schedule is not None:
            self._schedule.build()

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary) -> Launches:
        """Allocate workspaces; by family, in order, functions that launch."""
        operands, first = dict(operands), {}
        copy_all_rows(self._copied, operands)
        if self._schedule is not None:
            first = self._schedule.bind_or_find(operands, library)
        for name, size in self._workspaces.items():
            operands[name] = library.operand(library.empty((size,), "float32", self._device))
        bound = {family: each.bind(operands) for family, each in self._launchers.items()}
        return first | bound


def selection_of(request: Request, config, purpose: Purpose = Purpose.CALL) -> Selection:
    """The kernels of a request: see `select`, as for `config` and `purpose`."""
    return select(
        request.problem,
        request.traits,
        machine_of(request.device),
        config,
        tokens_per_scale=request.tokens_per_scale,
        purpose=purpose,
    )


def kernels_of(
    request: Request, config, purpose: Purpose = Purpose.CALL, beside: Beside | None = None
) -> ForwardKernels:
    """The kernels of a request, chosen and bound to all but addresses; none if it is empty."""
    if request.is_empty:
        return ForwardKernels(request, {}, {})
    return _laid_out(request, selection_of(request, config, purpose), beside)


def _laid_out(request: Request, selection: Selection, beside: Beside | None) -> ForwardKernels:
    problem, choice, geometry = request.problem, selection.forward, selection.geometry
    num_splits = geometry.num_splits
    arguments = {
        **request.arguments,
        "out": Part("out", 0, *request.tensors["out"].strides[:3]),
        "layout": Layout(geometry.pack, num_splits, geometry.heads_in_flight),
        "num_splits": num_splits,
        "tiles": SplitTiles(1, 1),
    }
    if implementation_of(choice.config).needs_maps:
        arguments |= _tensor_maps(request, choice.config, geometry)
        if problem.lengths is not None:
            between = _between(request.tensors, problem.pages is not None)
            arguments["layout"] = RaggedLayout(*arguments["layout"], between)
    schedule = None
    if problem.lengths is not None:
        listed, shape = geometry.listed, arguments["shape"]
        schedule = ScheduleKernel(problem.lengths, [listed], request.device, beside=beside)
        arguments["shape"] = shape_of_list(problem, shape, listed)
    workspaces, combine, into = {}, {}, {}
    if num_splits > 1 and schedule is not None:
        room, tile = room_of(problem.lengths, listed), listed.tile
        heads = problem.num_heads_q // geometry.pack
        rows = room.slots * heads * tile
        workspaces = {"parts": rows * choice.traits.head_dim_v, "part_lses": rows}
        of_parts = {
            "shape": shape_of_list(problem, shape, listed, of_parts=True),
            "tiles": SplitTiles(tile, geometry.pack),
        }
        blocks = num_blocks("the problem", room.split_tiles * tile, heads, 1)
        combine = {"combine": _combine(request, selection, arguments | of_parts, blocks)}
    elif num_splits > 1:
        row = choice.traits.head_dim_v
        heads = problem.num_heads_q * row
        rows = problem.batch * problem.seqlen_q * problem.num_heads_q
        workspaces = {"parts": num_splits * rows * row, "part_lses": num_splits * rows}
        into = {
            "out": Part("parts", rows * row, problem.seqlen_q * heads, heads, row),
            "lse": "part_lses",
        }
        rows, heads = problem.seqlen_q, problem.num_heads_q
        blocks = problem.num_blocks(rows, heads, selection.combine.config.block_rows)
        combine = {"combine": _combine(request, selection, arguments, blocks)}
    forward = Launcher(
        choice.config, choice.traits, request.device, geometry.blocks, arguments | into
    )
    return ForwardKernels(request, {"forward": forward, **combine}, workspaces, schedule)


def _combine(request: Request, selection: Selection, arguments: dict, blocks: int) -> Launcher:
    choice = selection.combine
    return Launcher(choice.config, choice.traits, request.device, blocks, arguments)


def _tensor_maps(request: Request, config, geometry: Geometry) -> Mapping[str, Mapped]:
    """The tensor maps of a forward by parameter name."""
    tensors = request.tensors
    # Float32 is written without bulk copies: the map is that of any tensor, and never used.
    out = "q" if geometry.num_splits > 1 or request.traits.float32_out else "out"
    of_queries, of_keys, rows = TensorLayout.of_queries, TensorLayout.of_keys, config.box_n
    if request.problem.lengths is not None:
        of_queries, of_keys = TensorLayout.of_ragged_queries, TensorLayout.of_ragged_keys
    if request.problem.pages is not None:
        of_keys, rows = TensorLayout.of_pages, min(rows, request.problem.pages.size)
    layouts = {
        "q": of_queries(tensors["q"], geometry.pack),
        "out": of_queries(tensors[out], geometry.pack),
        "k": of_keys(tensors["k"], rows),
        "v": TensorLayout.of_transposed_values(tensors["v"], config.cluster)
        if request.traits.fp8
        else of_keys(tensors["v"], rows),
    }
    operands = {"q": "q", "out": out, "k": "k", "v": "v"}
    return {
        f"{name}_map": Mapped(operands[name], replace(layout, l2_bytes=config.l2_bytes))
        for name, layout in layouts.items()
    }


def _between(tensors: Mapping[str, Tensor], is_paged: bool) -> Between:
    """What ragged tensor maps do not say of a padded batch; of pages it is never used."""
    of_rows = [name for name in Between._fields if not (is_paged and name in ("k", "v"))]
    found = {name: rows_between_entries(tensors[name]) for name in of_rows}
    return Between(*(found.get(name, 0) for name in Between._fields))
