"""Forward and backward: a problem checked, its kernels chosen and bound to all but addresses.

`ready` keeps one `Forward` or `Backward` for each distinct problem and calls it again and again;
the tuner binds the kernels of a `Backward` one by one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numflash.calls.launch import Launcher, Mapped
from numflash.configs import Sm90ForwardConfig, Traits
from numflash.configs.features import FEATURES, Features, rows_of
from numflash.kernels import arguments as records
from numflash.kernels.arguments import Layout, Mask, Part, Scores, Shape, Statistics
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import (
    AttentionProblem,
    Tensor,
    as_tensor,
    describe,
    expect_like,
    expect_writeable,
)
from numflash.problem.tensor_maps import TensorLayout, misfit
from numflash.runtime.arrays import ArrayLibrary, copy_rows
from numflash.runtime.driver import limits_of_device, multiprocessors
from numflash.runtime.views import ArrayView, Operand, contiguous_strides, overlap
from numflash.selection.choice import (
    FUSED,
    backward_choices,
    backward_configs,
    combine_choice,
    forward_choice,
    forward_configs,
)
from numflash.selection.geometry import Geometry, resident_blocks
from numflash.selection.rules import Choice, choose


def problem_of(
    views: dict[str, ArrayView], options: AttentionOptions
) -> tuple[AttentionProblem, Traits, int]:
    """The problem of a call, the traits of its kernels and its device. Raises as `attention`."""
    rows, _ = _with_contiguous_rows(views, ("q", "k", "v"))
    problem, tensors = describe(rows, options)
    q = rows["q"]
    out = _fresh((*q.shape[:-1], problem.head_dim_v), q)
    tensors["out"] = as_tensor("out", out, options.layout)
    return seen_by_bulk_copies(problem, tensors), _traits(problem, tensors), q.device


class Forward:
    """A forward problem with its kernel bound to everything but addresses."""

    def __init__(self, views: dict[str, ArrayView], options: AttentionOptions):
        rows, copied = _with_contiguous_rows(views, ("q", "k", "v"))
        self._prepare(views, rows, options, copied)

    def _prepare(
        self,
        views: dict[str, ArrayView],
        rows: dict[str, ArrayView],
        options: AttentionOptions,
        copied: list[str] = (),
    ):
        """Check all, and choose kernels.

        `rows` are the arrays that are attended to; `copied` are those made of the caller's.
        """
        problem, tensors = describe(rows, options)
        q, self.copied = rows["q"], copied
        self.views, self.dtype, self.device = views, problem.dtype, q.device
        self.out_shape = (*q.shape[:-1], problem.head_dim_v)
        self.lse_shape = _lse_shape(problem, q)
        self.is_given_out = "out" in views
        if self.is_given_out:
            expect_like("out", views["out"], self.out_shape, q.dtype, q.device)
            expect_writeable("out", views["out"])
            self.spans = {name: view.span() for name, view in views.items()}
            self._refuse_overlap({name: view.pointer for name, view in views.items()})
        out = views.get("out") or _fresh(self.out_shape, q)
        tensors["out"] = as_tensor("out", out, options.layout)
        self.problem = problem = self._seen_by_bulk_copies(problem, tensors)
        self.launchers, self.workspaces, self.kernel = [], {}, "none: the result is empty"
        if problem.batch * problem.seqlen_q:
            self._choose_launchers(problem, tensors, options.config)
            self.kernel = str(self.launchers[0])

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, dict[str, Callable[[int], None]]]:
        """Allocate; (out, lse, and by family, in order, functions that launch on a stream)."""
        out, lse = self._allocate(operands, library)
        return out, lse, self._launches(operands, library)

    def _allocate(self, operands: dict[str, Operand], library: ArrayLibrary) -> tuple[Any, Any]:
        """The results, also put into `operands`."""
        if self.is_given_out:
            self._refuse_overlap({name: o.pointer for name, o in operands.items()})
            out = operands["out"].array
        else:
            out = library.empty(self.out_shape, self.dtype, self.device)
            operands["out"] = library.operand(out)
        lse = library.empty(self.lse_shape, "float32", self.device)
        operands["lse"] = library.operand(lse)
        return out, lse

    def _launches(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> dict[str, Callable[[int], None]]:
        """By family, in order, functions that launch."""
        operands = dict(operands)
        _copy_rows(self.copied, operands)
        for name, size in self.workspaces.items():
            operands[name] = library.operand(library.empty((size,), "float32", self.device))
        families = "forward", "combine"
        return {f: each.bind(operands) for f, each in zip(families, self.launchers, strict=False)}

    def _choose_launchers(self, problem, tensors: dict[str, Tensor], config) -> None:
        """The forward, and where it splits the keys the kernel that puts the parts together."""
        device = self.device
        traits = self._traits(problem, tensors)
        configs = forward_configs(config)
        choice, geometry = self._choose(problem, traits, configs.get("forward"))
        arguments = self._arguments(problem, tensors) | {
            "out": Part("out", 0, *tensors["out"].strides[:3]),
            "layout": Layout(geometry.pack, geometry.num_splits, geometry.heads_in_flight),
            "num_splits": geometry.num_splits,
        }
        rows, heads = problem.seqlen_q * geometry.pack, problem.num_heads_q // geometry.pack
        num_blocks = problem.num_blocks(
            rows, heads * geometry.num_splits, choice.config.block_rows
        )
        if isinstance(choice.config, Sm90ForwardConfig):
            l2_bytes = choice.config.l2_bytes
            for name, mapped in self._tensor_maps(tensors, choice.config, geometry).items():
                layout = replace(mapped.layout, l2_bytes=l2_bytes)
                arguments[name] = mapped._replace(layout=layout)
            if choice.config.persistent:
                room = resident_blocks(choice.config, choice.traits, limits_of_device(device))
                num_blocks = min(num_blocks, multiprocessors(device)[0] * room)
        if geometry.num_splits == 1:
            launcher = Launcher(choice.config, choice.traits, device, num_blocks, arguments)
            self.launchers = [launcher]
            return
        row = traits.head_dim_v
        rows = problem.batch * problem.seqlen_q * problem.num_heads_q
        self.workspaces = {
            "parts": geometry.num_splits * rows * row,
            "part_lses": geometry.num_splits * rows,
        }
        heads = problem.num_heads_q * row
        into_parts = {
            "out": Part("parts", rows * row, problem.seqlen_q * heads, heads, row),
            "lse": "part_lses",
        }
        combine = combine_choice(problem, traits, device, configs.get("combine"))
        blocks = problem.num_blocks(
            problem.seqlen_q, problem.num_heads_q, combine.config.block_rows
        )
        self.launchers = [
            Launcher(choice.config, choice.traits, device, num_blocks, arguments | into_parts),
            Launcher(combine.config, combine.traits, device, blocks, arguments),
        ]

    def _traits(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> Traits:
        return _traits(problem, tensors)

    def _seen_by_bulk_copies(
        self, problem: AttentionProblem, tensors: dict[str, Tensor]
    ) -> AttentionProblem:
        return seen_by_bulk_copies(problem, tensors)

    def _tensor_maps(
        self, tensors: dict[str, Tensor], config: Sm90ForwardConfig, geometry: Geometry
    ) -> dict[str, Mapped]:
        v = TensorLayout.of_keys(tensors["v"], config.stage_n)
        return tensor_maps(tensors, config, geometry) | {"v_map": Mapped("v", v)}

    def _choose(
        self, problem: AttentionProblem, traits: Traits, config
    ) -> tuple[Choice, Geometry]:
        return forward_choice(problem, traits, self.device, config)

    def _arguments(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict:
        return arguments_of(problem, tensors)

    def _refuse_overlap(self, pointers: dict[str, int]) -> None:
        """Raise ValueError if `out` shares memory with an input, all at these addresses."""
        first, end = (pointers["out"] + offset for offset in self.spans["out"])
        for name, (low, high) in self.spans.items():
            # Most arrays lie apart, which is quick to see; those that interleave need a proof.
            apart = pointers[name] + high <= first or end <= pointers[name] + low
            if name != "out" and not apart:
                out = replace(self.views["out"], pointer=pointers["out"])
                if overlap(out, replace(self.views[name], pointer=pointers[name])):
                    raise ValueError(f"out must not overlap {name}, but they share memory")


class Backward:
    """A backward problem with its kernels bound to everything but addresses."""

    def __init__(self, views: dict[str, ArrayView], options: AttentionOptions):
        rows, self.copied = _with_contiguous_rows(views, ("q", "k", "v", "dout", "out"))
        problem, tensors = describe(rows, options)
        q, layout = rows["q"], options.layout
        out_shape = (*q.shape[:-1], problem.head_dim_v)
        expect_like("dout", rows["dout"], out_shape, q.dtype, q.device)
        expect_like("out", rows["out"], out_shape, q.dtype, q.device)
        expect_like("lse", rows["lse"], _lse_shape(problem, q), "float32", q.device)
        if not rows["lse"].is_contiguous:
            raise ValueError(
                f"lse must be contiguous, as `attention` returns it, got strides "
                f"{rows['lse'].strides} for shape {rows['lse'].shape}"
            )
        tensors["do"] = as_tensor("dout", rows["dout"], layout)
        tensors["out"] = as_tensor("out", rows["out"], layout)
        for name in ("q", "k", "v"):
            tensors["d" + name] = as_tensor("d" + name, _fresh(rows[name].shape, q), layout)
        self.shapes = {"d" + name: rows[name].shape for name in ("q", "k", "v")}
        self.dtype, self.device = problem.dtype, q.device
        self.delta_size = (problem.batch * problem.num_heads_q * problem.seqlen_q,)
        self.workspaces = dict.fromkeys(("delta", "lse_log2"), self.delta_size)
        # All are chosen before one is compiled: a wrong config must not cost a wait.
        forced, traits = backward_configs(options.config), _traits(problem, tensors)
        choices = {
            "delta": choose("delta", traits, limits_of_device(q.device), problem.seqlen_q),
            **backward_choices(problem, traits, q.device, forced),
        }
        rows = {"delta": problem.seqlen_q, "backward-dkdv": problem.seqlen_k}
        self.launchers = {}
        for family, choice in choices.items():
            if family == FUSED:
                self._add_fused(problem, tensors, choice)
            elif problem.batch and rows.get(family, problem.seqlen_q):
                self.launchers[family] = _launcher(choice, problem, tensors, q.device)

    def _add_fused(self, problem, tensors: dict[str, Tensor], choice: Choice) -> None:
        """The one kernel for all gradients, and the one that adds up its parts of dQ."""
        config = choice.config
        arguments = arguments_of(problem, tensors) | {"num_splits": config.num_splits}
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.num_heads_q * problem.batch
        part = tiles * config.tile_m * choice.traits.head_dim
        self.workspaces["dq_parts"] = (config.num_splits * part,)
        if problem.batch and problem.seqlen_k:
            blocks = problem.num_blocks(1, problem.num_heads_kv * config.num_splits, 1)
            launcher = Launcher(config, choice.traits, self.device, blocks, arguments)
            self.launchers[FUSED] = launcher
        if tiles:
            reduction = config.reduction()
            launcher = Launcher(reduction, choice.traits, self.device, tiles, arguments)
            self.launchers[reduction.family] = launcher

    def __call__(self, operands: dict[str, Operand], library: ArrayLibrary, stream: int):
        """Allocate and launch; the three gradients."""
        gradients, launches = self.bind(operands, library)
        for launch in launches.values():
            launch(stream)
        return gradients

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[list, dict[str, Callable[[int], None]]]:
        """Allocate; the three gradients, and by family, in order, functions that launch."""
        _copy_rows(self.copied, operands)
        for name, shape in self.workspaces.items():
            operands[name] = library.operand(library.empty(shape, "float32", self.device))
        gradients = []
        for name, shape in self.shapes.items():
            gradients.append(library.empty(shape, self.dtype, self.device))
            operands[name] = library.operand(gradients[-1])
        launches = {family: each.bind(operands) for family, each in self.launchers.items()}
        return gradients, launches


def _launcher(choice: Choice, problem, tensors: dict[str, Tensor], device: int) -> Launcher:
    """A backward kernel for a problem, with all but addresses bound."""
    rows, heads = problem.seqlen_q, problem.num_heads_q
    if choice.family == "backward-dkdv":
        rows, heads = problem.seqlen_k, problem.num_heads_kv
    if getattr(choice.config, "apart", False):
        heads *= 2
    num_blocks = problem.num_blocks(rows, heads, choice.config.block_rows)
    arguments = arguments_of(problem, tensors)
    return Launcher(choice.config, choice.traits, device, num_blocks, arguments)


def _traits(problem, tensors: dict[str, Tensor]) -> Traits:
    """What the kernels for a problem with these tensors are compiled for."""
    return problem.traits(all(tensor.is_vectorizable for tensor in tensors.values()))


def arguments_of(problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Arguments of any kernel of attention, by parameter name: its records and numbers."""
    scale, asked = problem.softmax_scale, zip(FEATURES, problem.features, strict=True)
    features = Features(*(row.absent if record is None else record for row, record in asked))
    for row in rows_of(problem.feature_names):
        scale /= row.unit(getattr(features, row.name))
    return {
        **{name: records.Tensor(each.name, *each.strides[:3]) for name, each in tensors.items()},
        "shape": Shape(
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            num_heads_q=problem.num_heads_q,
            group_size=problem.group_size,
            head_dim=problem.head_dim,
            head_dim_v=problem.head_dim_v,
            batch_size=problem.batch,
        ),
        "mask": Mask(problem.band_lo, problem.band_hi),
        "scores": Scores(scale, problem.softmax_scale, problem.shift, features),
        "softmax_scale": problem.softmax_scale,
        "statistics": Statistics("lse", "delta"),
        "statistics_log2": Statistics("lse_log2", "delta"),
        "in_fp8": None,
    }


def seen_by_bulk_copies(
    problem: AttentionProblem, tensors: dict[str, Tensor], transposed_v: bool = False
) -> AttentionProblem:
    """The problem, which then knows whether bulk copies can be told of its tensors."""
    for name in ("q", "k", "v", "out"):
        if (why := misfit(tensors[name], transposed_v and name == "v")) is not None:
            why = f"{name} cannot be described to bulk copies: {why}"
            return replace(problem, no_tensor_maps=why)
    return problem


def tensor_maps(
    tensors: dict[str, Tensor], config: Sm90ForwardConfig, geometry: Geometry
) -> dict[str, Mapped]:
    """The Hopper forward's tensor maps but that of V, by parameter name."""
    # Parts are written without bulk copies: their map is that of any tensor, and never used.
    out = "q" if geometry.num_splits > 1 else "out"
    of_queries = {"q_map": "q", "out_map": out}
    maps = {
        parameter: Mapped(name, TensorLayout.of_queries(tensors[name], geometry.pack))
        for parameter, name in of_queries.items()
    }
    return maps | {"k_map": Mapped("k", TensorLayout.of_keys(tensors["k"], config.stage_n))}


def _lse_shape(problem: AttentionProblem, q: ArrayView) -> tuple[int, ...]:
    """(batch, heads, seqlen_q), without the axes that q does not have."""
    return (problem.batch, problem.num_heads_q, problem.seqlen_q)[4 - len(q.shape) :]


def _fresh(shape: tuple[int, ...], like: ArrayView) -> ArrayView:
    """The view of a contiguous array still to be allocated; allocators align to 16 bytes."""
    return ArrayView(0, shape, contiguous_strides(shape), like.dtype, like.device)


def _with_contiguous_rows(views: dict[str, ArrayView], names: tuple[str, ...]):
    """The views, with those of the copies of `names` that must be copied; and their names."""
    copied = [name for name in names if not views[name].has_contiguous_rows]
    return views | {name: _fresh(views[name].shape, views[name]) for name in copied}, copied


def _copy_rows(names: list[str], operands: dict[str, Operand]) -> None:
    """Replace these operands by copies whose last axis is contiguous."""
    for name in names:
        operands[name] = copy_rows(operands[name])
