"""The backward made ready: a problem checked, its kernels chosen, built and bound.

`ready` keeps one `Backward` for each distinct problem; the tuner binds its kernels one by one.
"""

from numflash.calls.arguments import (
    arguments_of,
    copy_all_rows,
    lse_shape,
    traits_of,
    with_contiguous_rows,
)
from numflash.calls.forward import Launches
from numflash.calls.launch import Launcher
from numflash.configs import HeadSumsConfig
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import AttentionProblem, Tensor, as_tensor, describe, expect_like
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import machine_of
from numflash.runtime.views import ArrayView, Operand, fresh
from numflash.selection.choice import FUSED, select
from numflash.selection.rules import Choice


class Backward:
    """A backward problem with its kernels bound to everything but addresses.

    Attributes:
        device: of the arrays.
    """

    def __init__(self, views: dict[str, ArrayView], options: AttentionOptions):
        """Check, choose and build. Raises as `numflash.attention_backward`."""
        rows, self._copied = with_contiguous_rows(views, ("q", "k", "v", "dout", "out"))
        problem, tensors = describe(rows, options)
        q, layout = rows["q"], options.layout
        out_shape = (*q.shape[:-1], problem.head_dim_v)
        expect_like("dout", rows["dout"], out_shape, q.dtype, q.device)
        expect_like("out", rows["out"], out_shape, q.dtype, q.device)
        expect_like("lse", rows["lse"], lse_shape(problem, q), "float32", q.device)
        if not rows["lse"].is_contiguous:
            raise ValueError(
                f"lse must be contiguous, as `attention` returns it, got strides "
                f"{rows['lse'].strides} for shape {rows['lse'].shape}"
            )
        tensors["do"] = as_tensor("dout", rows["dout"], layout)
        tensors["out"] = as_tensor("out", rows["out"], layout)
        for name in ("q", "k", "v"):
            gradient = fresh(rows[name].shape, q.dtype, q.device)
            tensors["d" + name] = as_tensor("d" + name, gradient, layout)
        self.device, self._dtype = q.device, problem.dtype
        self._shapes = {"d" + name: rows[name].shape for name in ("q", "k", "v")}
        self._float32: dict[str, tuple[int, ...]] = {}
        queries = problem.batch * problem.num_heads_q * problem.seqlen_q
        self._workspaces = dict.fromkeys(("delta", "lse_log2"), (queries,))
        selection = select(
            problem,
            traits_of(problem, tensors),
            machine_of(q.device),
            options.config,
            passes=("backward",),
        )
        rows = {"delta": problem.seqlen_q, "backward-dkdv": problem.seqlen_k}
        self._launchers: dict[str, Launcher] = {}
        for family, choice in {"delta": selection.delta, **selection.backward}.items():
            if family == FUSED:
                self._add_fused(problem, tensors, choice)
            elif problem.batch and rows.get(family, problem.seqlen_q):
                self._launchers[family] = _launcher(choice, problem, tensors, q.device)
        for name in problem.gradients:
            self._add_head_sums(problem, tensors, selection.delta, name)
        for launcher in self._launchers.values():
            launcher.build()

    def _add_head_sums(
        self, problem: AttentionProblem, tensors: dict[str, Tensor], delta: Choice, name: str
    ) -> None:
        """The gradient of what heads have: what `delta` leaves of each row, added up."""
        self._float32[f"d{name}"] = (problem.num_heads_q,)
        self._workspaces["row_gradients"] = self._workspaces["delta"]
        arguments = arguments_of(problem, tensors) | {"sums": f"d{name}"}
        heads = problem.num_heads_q
        launcher = Launcher(HeadSumsConfig(), delta.traits, self.device, heads, arguments)
        self._launchers[HeadSumsConfig.family] = launcher

    def _add_fused(
        self, problem: AttentionProblem, tensors: dict[str, Tensor], choice: Choice
    ) -> None:
        """The one kernel for all gradients, and the one that adds up its parts of dQ."""
        config = choice.config
        arguments = arguments_of(problem, tensors) | {"num_splits": config.num_splits}
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.num_heads_q * problem.batch
        part = tiles * config.tile_m * choice.traits.head_dim
        self._workspaces["dq_parts"] = (config.num_splits * part,)
        if problem.batch and problem.seqlen_k:
            blocks = problem.num_blocks(1, problem.num_heads_kv * config.num_splits, 1)
            launcher = Launcher(config, choice.traits, self.device, blocks, arguments)
            self._launchers[FUSED] = launcher
        if tiles:
            reduction = config.reduction()
            launcher = Launcher(reduction, choice.traits, self.device, tiles, arguments)
            self._launchers[reduction.family] = launcher

    def __call__(self, operands: dict[str, Operand], library: ArrayLibrary, stream: int):
        """Allocate and launch; the gradients."""
        gradients, launches = self.bind(operands, library)
        for launch in launches.values():
            launch(stream)
        return gradients

    def bind(self, operands: dict[str, Operand], library: ArrayLibrary) -> tuple[list, Launches]:
        """Allocate; the gradients, and by family, in order, functions that launch."""
        copy_all_rows(self._copied, operands)
        for name, shape in self._workspaces.items():
            operands[name] = library.operand(library.empty(shape, "float32", self.device))
        gradients = []
        for name, shape in self._shapes.items():
            gradients.append(library.empty(shape, self._dtype, self.device))
            operands[name] = library.operand(gradients[-1])
        for name, shape in self._float32.items():
            gradients.append(library.empty(shape, "float32", self.device))
            operands[name] = library.operand(gradients[-1])
        launches = {family: each.bind(operands) for family, each in self._launchers.items()}
        return gradients, launches


def _launcher(
    choice: Choice, problem: AttentionProblem, tensors: dict[str, Tensor], device: int
) -> Launcher:
    """A backward kernel for a problem, with all but addresses bound."""
    rows, heads = problem.seqlen_q, problem.num_heads_q
    if choice.family == "backward-dkdv":
        rows, heads = problem.seqlen_k, problem.num_heads_kv
    if getattr(choice.config, "apart", False):
        heads *= 2
    num_blocks = problem.num_blocks(rows, heads, choice.config.block_rows)
    arguments = arguments_of(problem, tensors)
    return Launcher(choice.config, choice.traits, device, num_blocks, arguments)
