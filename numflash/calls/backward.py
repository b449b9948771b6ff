"""The backward made ready: a problem checked, its kernels chosen, built and bound.

`ready` keeps one `Backward` for each distinct problem; the tuner binds its kernels one by one.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

from numflash.calls.arguments import (
    arguments_of,
    copy_all_rows,
    lse_shape,
    mask_record,
    of_each_query,
    traits_of,
    with_contiguous_rows,
)
from numflash.calls.array_gradients import kernels_of_array, sums_of_heads
from numflash.calls.forward import Launches
from numflash.calls.launch import Launcher
from numflash.kernels.arguments import Tensor as TensorRecord
from numflash.problem.array_gradients import ArrayGradient, array_gradients
from numflash.problem.gradients import Gradients
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import (
    AttentionProblem,
    as_tensor,
    describe,
    expect_like,
    expect_out_dtype,
)
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import machine_of
from numflash.runtime.views import ArrayView, Operand, fresh
from numflash.selection.choice import FUSED, select
from numflash.selection.rules import Choice

_OPERANDS = ("q", "k", "v")
# The caller's product of dO and O, among the operands; "delta" is the workspace of its kernel.
_GIVEN_DELTA = "given_delta"


class Allocated(NamedTuple):
    """An array that a call allocates."""

    shape: tuple[int, ...]
    dtype: str


class Backward:
    """A backward problem with its kernels bound to everything but addresses.

    Attributes:
        device: of the arrays.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        wrt: tuple[str, ...] | None = None,
        grad_dtype: str | None = None,
    ):
        """Check, choose and build. Raises as `numflash.attention_backward`.

        Args:
            views: of q, k, v, dout and lse; out, or delta in its place; dlse where lse has a
                gradient; the options that are arrays.
            options: of the call.
            wrt: what gradients are of; None is the default.
            grad_dtype: of dq, dk and dv; None is that of q. With float32 that of arrays, too.
        """
        results = tuple(name for name in ("dout", "out") if name in views)
        rows, self._copied = with_contiguous_rows(views, (*_OPERANDS, *results))
        problem, tensors = describe(rows, options)
        q, layout = rows["q"], options.layout
        grad_dtype = expect_out_dtype("grad_dtype", grad_dtype, q.dtype)
        in_float32 = grad_dtype != q.dtype
        arrays = {} if wrt is None else array_gradients(problem, rows, options, in_float32)
        out_is_longer = "out" in views and rows["out"].dtype == "float32" != q.dtype
        gradients = Gradients.of(
            problem.feature_names,
            wrt,
            arrays,
            dlse="dlse" in views,
            delta="delta" in views,
            float32_out=out_is_longer,
            in_float32=in_float32,
        )
        out_shape = (*q.shape[:-1], problem.head_dim_v)
        for name in results:
            dtype = "float32" if name == "out" and out_is_longer else q.dtype
            expect_like(name, rows[name], out_shape, dtype, q.device)
            tensors["do" if name == "dout" else name] = as_tensor(name, rows[name], layout)
        expect_like("lse", rows["lse"], lse_shape(problem, q), "float32", q.device)
        if not rows["lse"].is_contiguous:
            raise ValueError(
                f"lse must be contiguous, as `attention` returns it, got strides "
                f"{rows['lse'].strides} for shape {rows['lse'].shape}"
            )
        given = {
            name: of_each_query(name, rows[name], problem, q)
            for name in ("dlse", "delta")
            if name in views
        }
        if gradients.delta:
            given["delta"] = given["delta"]._replace(data=_GIVEN_DELTA)
        for name in _OPERANDS:
            gradient = fresh(rows[name].shape, grad_dtype, q.device)
            tensors["d" + name] = as_tensor("d" + name, gradient, layout)
        self.device, self._gradients = q.device, gradients
        self._arguments = arguments_of(problem, tensors)
        self._arguments["of_rows"] = SimpleNamespace(**given, plain="plain_delta")
        self._arguments.setdefault("out", TensorRecord(None, 0, 0, 0))
        queries = (problem.batch * problem.num_heads_q * problem.seqlen_q,)
        self._of_queries = Allocated(queries, "float32")
        self._workspaces = dict.fromkeys(("delta", "lse_log2"), self._of_queries)
        # Of options the shape: a number for each head, or for each head of each batch entry.
        self._shapes = {
            name: rows[name].shape for name in gradients.wrt if name not in (*_OPERANDS, *arrays)
        }
        # Parts of workspaces: (workspace, from, to).
        self._parts: dict[str, tuple[str, int, int]] = {}
        self._launchers: dict[str, Launcher] = {}
        selection = select(
            problem,
            traits_of(problem, tensors),
            machine_of(q.device),
            options.config,
            passes=("backward",),
            gradients=gradients,
        )
        # One kernel makes dk and dv, or all three, whichever are wanted.
        made = {"q"} & {*gradients.wrt}
        if selection.backward.keys() & {FUSED, "backward-dkdv"}:
            made |= {"k", "v"}
        self._results = {f"d{name}": Allocated(rows[name].shape, grad_dtype) for name in made}
        if selection.delta.traits.plain_delta:
            self._workspaces["plain_delta"] = self._of_queries
        self._add(problem, "delta", selection.delta)
        for family, choice in selection.backward.items():
            add = self._add_fused if family == FUSED else self._add
            add(problem, family, choice)
        for gradient in gradients.arrays:
            self._add_array(problem, gradient, selection.arrays[gradient.name])
        for launcher in self._launchers.values():
            launcher.build()

    def _add(self, problem: AttentionProblem, family: str, choice: Choice) -> None:
        """A kernel, and what adds up the shares of rows that it leaves for gradients of options.

        Kernels without a row of their own to write are not launched.
        """
        arguments = self._arguments
        options = self._gradients.options_of(family, problem.feature_names)
        for option in options:
            shares = f"row_gradients of {option}"
            self._workspaces[shares] = self._of_queries
            arguments = arguments | {"row_gradients": shares}
        rows, heads = problem.seqlen_q, problem.num_heads_q
        if family == "backward-dkdv":
            rows, heads = problem.seqlen_k, problem.num_heads_kv
            arguments = arguments | {"mask": mask_record(problem, by_keys=True)}
        if getattr(choice.config, "apart", False):
            heads *= 2
        if problem.batch and rows:
            blocks = problem.num_blocks(rows, heads, choice.config.block_rows)
            self._launchers[family] = self._launcher(choice, blocks, arguments)
        for option in options:
            self._add_head_sums(problem, option)

    def _add_head_sums(self, problem: AttentionProblem, option: str) -> None:
        """The gradient of what heads have: the shares of rows, added up."""
        self._results[f"d{option}"] = Allocated(self._shapes[option], "float32")
        launches = sums_of_heads(problem, option, self._shapes[option], self._arguments)
        for choice, blocks, arguments in launches:
            if blocks:
                launcher = self._launcher(choice, blocks, self._arguments | arguments)
                self._launchers[f"{choice.family} of {option}"] = launcher

    def _add_fused(self, problem: AttentionProblem, family: str, choice: Choice) -> None:
        """The one kernel for dq, dk and dv, and the one that adds up its parts of dQ."""
        config = choice.config
        arguments = self._arguments | {"num_splits": config.num_splits}
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.num_heads_q * problem.batch
        part = tiles * config.tile_m * choice.traits.head_dim
        self._workspaces["dq_parts"] = Allocated((config.num_splits * part,), "float32")
        if problem.batch and problem.seqlen_k:
            blocks = problem.num_blocks(1, problem.num_heads_kv * config.num_splits, 1)
            self._launchers[family] = self._launcher(choice, blocks, arguments)
        if tiles and "q" in self._gradients.wrt:
            reduction = replace(choice, config=config.reduction())
            launcher = self._launcher(reduction, tiles, arguments)
            self._launchers[reduction.config.family] = launcher

    def _add_array(
        self, problem: AttentionProblem, gradient: ArrayGradient, choices: tuple[Choice, ...]
    ) -> None:
        """The kernels for the gradient of an array that scores read."""
        self._results[f"d{gradient.name}"] = Allocated(gradient.shape, gradient.dtype)
        if not math.prod(gradient.shape):
            return
        made = kernels_of_array(problem, gradient, choices, self._arguments)
        self._workspaces |= {n: Allocated(*each) for n, each in made.workspaces.items()}
        self._parts |= made.parts
        for number, (choice, blocks, arguments) in enumerate(made.launches):
            if blocks:
                own = "plain_statistics_log2" if choice.has_geometry else "plain_statistics"
                of_tiles = {"tile_statistics": self._arguments[own], **arguments}
                launcher = self._launcher(choice, blocks, self._arguments | of_tiles)
                self._launchers[f"{choice.family} of {gradient.name}, {number}"] = launcher

    def _launcher(self, choice: Choice, num_blocks: int, arguments: dict) -> Launcher:
        """A kernel for the problem, with all but addresses bound."""
        return Launcher(choice.config, choice.traits, self.device, num_blocks, arguments)

    def __call__(self, operands: dict[str, Operand], library: ArrayLibrary, stream: int):
        """Allocate and launch; the gradients."""
        gradients, launches = self.bind(operands, library)
        for launch in launches.values():
            launch(stream)
        return gradients

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary) -> tuple[list, Launches]:
        """Allocate; the gradients, and by family, in order, functions that launch."""
        operands = dict(operands)
        copy_all_rows(self._copied, operands)
        if self._gradients.delta:
            operands[_GIVEN_DELTA] = operands["delta"]
        arrays = {}
        for name, (shape, dtype) in (self._workspaces | self._results).items():
            arrays[name] = library.empty(shape, dtype, self.device)
            operands[name] = library.operand(arrays[name])
        for name, (whole, first, end) in self._parts.items():
            operands[name] = library.operand(arrays[whole][first:end])
        launches = {family: each.bind(operands) for family, each in self._launchers.items()}
        return [arrays["d" + name] for name in self._gradients.wrt], launches
