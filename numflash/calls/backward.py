"""The backward made ready: a problem checked, its kernels chosen, built and bound.

`ready` keeps one `Backward` for each distinct problem; the tuner binds its kernels one by one.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

from numflash.calls.arguments import (
    Request,
    arguments_of,
    copy_all_rows,
    lse_shape,
    mask_record,
    of_each_query,
    seen_by_bulk_copies,
    shape_of_list,
    traits_of,
    with_contiguous_rows,
)
from numflash.calls.array_gradients import kernels_of_array, sums_of_heads
from numflash.calls.forward import Launches
from numflash.calls.launch import Fill, Launcher, Mapped
from numflash.calls.sequences import ScheduleKernel
from numflash.configs import Config, implementation_of
from numflash.kernels.arguments import (
    Between,
    BlockMaskInTurn,
    BundledShape,
    MappedShape,
    Statistics,
    TurnsShape,
)
from numflash.kernels.arguments import Tensor as TensorRecord
from numflash.kernels.kernel import Kernel
from numflash.problem.array_gradients import ArrayGradient, array_gradients
from numflash.problem.gradients import Gradients
from numflash.problem.options import AttentionOptions, GradientOptions
from numflash.problem.problem import (
    AttentionProblem,
    as_tensor,
    describe,
    expect_like,
    expect_out_dtype,
)
from numflash.problem.sequences import ListShape, most_records
from numflash.problem.tensor_maps import TensorLayout, rows_between_entries
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import machine_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, Operand, fresh
from numflash.selection.choice import FUSED, Purpose, select
from numflash.selection.geometry import (
    blocks_at_once,
    blocks_of,
    heads_of_backward,
    resident_blocks,
    tiles_listed,
)
from numflash.selection.rules import Choice

_OPERANDS = ("q", "k", "v")
_MAPPED = ("q", "k", "v", "do")
_DEFAULT = GradientOptions()
# The caller's product of dO and O, among the operands; "delta" is the workspace of its kernel.
_GIVEN_DELTA = "given_delta"


def views_of_results(request: Request, views: Mapping[str, ArrayView]) -> dict[str, ArrayView]:
    """What a backward gets from a forward that has not run: views of out, lse and dout.

    Args:
        request: the forward.
        views: of the call; with delta the backward has no out.
    """
    device, dtype = request.device, request.problem.dtype
    found = {
        "dout": fresh(request.out_shape, dtype, device),
        "lse": fresh(request.lse_shape, "float32", device),
    }
    if "delta" not in views:
        found["out"] = request.tensors["out"].view
    return found


class Allocated(NamedTuple):
    """An array that a call allocates."""

    shape: tuple[int, ...]
    dtype: str


class Backward:
    """A backward problem with its kernels bound to everything but addresses.

    Attributes:
        device: of the arrays.
        lengths: of sequences that have lengths of their own, else None.
        selection: the kernels that were chosen.
        kernels: those that run, by name and in order: the selection's, and what adds up their
            shares and parts. What lists the tiles of sequences is not among them.
        kernel: their names.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        asked: GradientOptions = _DEFAULT,
        purpose: Purpose = Purpose.CALL,
    ):
        """Check, choose, and unless it is for a question build.

        Raises as `numflash.attention_backward`.

        Args:
            views: of q, k, v, dout and lse; out, or delta in its place; dlse where lse has a
                gradient; the options that are arrays.
            options: of the call.
            asked: which gradients, and their dtype; its arrays are among the views.
            purpose: what it is for.
        """
        if "page_table" in views:
            raise UnsupportedError(
                "page_table does not go with a backward: keys in pages have no gradients"
            )
        results = tuple(name for name in ("dout", "out") if name in views)
        rows, self._copied = with_contiguous_rows(views, (*_OPERANDS, *results))
        problem, tensors = describe(rows, options)
        q, layout = rows["q"], options.layout
        grad_dtype = expect_out_dtype("grad_dtype", asked.grad_dtype, q.dtype)
        in_float32 = grad_dtype != q.dtype
        arrays = {}
        if asked.wrt is not None:
            arrays = array_gradients(problem, rows, options, in_float32)
        out_is_longer = "out" in views and rows["out"].dtype == "float32" != q.dtype
        gradients = Gradients.of(
            problem.feature_names,
            asked.wrt,
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
        problem = seen_by_bulk_copies(problem, tensors, names=_MAPPED)
        self.device, self._gradients, self._tensors = q.device, gradients, tensors
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
        if problem.lengths is not None and problem.lengths.packed:
            _refuse_sums_of_sequences(self._shapes)
        # Parts of workspaces: (workspace, from, to).
        self._parts: dict[str, tuple[str, int, int]] = {}
        self.kernels: dict[str, Choice] = {}
        self._launchers: dict[str, Launcher] = {}
        # Workspaces that must be 0 where kernels do not write.
        self._cleared: list[str] = []
        # Of sequences with lengths of their own, the lists of tiles by name.
        self._lists: dict[str, ListShape] = {}
        self.lengths = problem.lengths
        self.selection = selection = select(
            problem,
            traits_of(problem, tensors),
            machine_of(q.device),
            options.config,
            passes=("backward",),
            gradients=gradients,
            purpose=purpose,
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
        self.kernel = ", ".join(self.kernels)
        self._schedule = None
        if self._lists:
            shapes = list(self._lists.values())
            self._schedule = ScheduleKernel(problem.lengths, shapes, self.device)
        if purpose is not Purpose.QUESTION:
            self._build()

    def _add(self, problem: AttentionProblem, family: str, choice: Choice) -> None:
        """A kernel, and what adds up the shares of rows that it leaves for gradients of options.

        Kernels without a row of their own to write are not launched.
        """
        arguments = self._arguments
        options = self._gradients.options_of(family, problem.feature_names)
        for option in options:
            shares = f"row_gradients of {option}"
            self._workspaces[shares] = self._of_queries
            if choice.traits.ragged:
                self._cleared.append(shares)
            arguments = arguments | {"row_gradients": shares}
        rows, heads = problem.seqlen_q, problem.num_heads_q
        by_keys = family == "backward-dkdv"
        if by_keys:
            rows, heads = problem.seqlen_k, problem.num_heads_kv
            arguments = arguments | {"mask": mask_record(problem, by_keys=True)}
        if getattr(choice.config, "apart", False):
            heads *= 2
        arguments = self._with_list(problem, choice, arguments, by_keys)
        if problem.batch and rows:
            if choice.traits.ragged:
                blocks = blocks_of(problem, choice.config, heads, by_keys=by_keys)
            else:
                blocks = problem.num_blocks(rows, heads, choice.config.block_rows)
            self._launch(family, choice, blocks, arguments)
        for option in options:
            self._add_sums(problem, option)

    def _with_list(
        self, problem: AttentionProblem, choice: Choice, arguments: dict, by_keys: bool = False
    ) -> dict:
        """The arguments of a kernel, with the list of tiles that it goes through, if it does."""
        if not choice.traits.ragged:
            return arguments
        listed = tiles_listed(problem, choice.config, by_keys=by_keys)
        self._lists[listed.name] = listed
        shape = shape_of_list(problem, arguments["shape"], listed)
        if implementation_of(choice.config).needs_maps:
            shape = MappedShape(*shape, self._between())
        return arguments | {"shape": shape}

    def _add_sums(self, problem: AttentionProblem, option: str) -> None:
        """The gradient of what heads have: the shares of rows, added up."""
        self._results[f"d{option}"] = Allocated(self._shapes[option], "float32")
        launches = sums_of_heads(problem, option, self._shapes[option])
        for choice, blocks, arguments in launches:
            if blocks:
                name = f"{choice.family} of {option}"
                self._launch(name, choice, blocks, self._arguments | arguments)

    def _add_fused(self, problem: AttentionProblem, family: str, choice: Choice) -> None:
        """The one kernel for dq, dk and dv, and the one that makes dq of what it leaves."""
        config = choice.config
        arguments = self._arguments | {"num_splits": config.num_splits}
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.num_heads_q * problem.batch
        of_keys = of_queries = arguments["shape"]
        in_turn, blocks = implementation_of(config).needs_maps, 0
        if in_turn and choice.traits.ragged:
            of_keys, of_queries, tiles = self._shapes_in_turn(problem, config)
            blocks = blocks_of(problem, config, problem.num_heads_kv, by_keys=True)
        elif in_turn:
            in_flight = heads_of_backward(problem, machine_of(self.device).l2_bytes)
            of_keys = of_queries = BundledShape(*of_keys, in_flight)
            blocks = problem.num_blocks(problem.seqlen_k, problem.num_heads_kv, config.tile_n)
        elif problem.seqlen_k:
            blocks = problem.num_blocks(1, problem.num_heads_kv * config.num_splits, 1)
        if in_turn and config.persistent:
            machine = machine_of(self.device)
            room = resident_blocks(config, choice.traits, machine.limits)
            blocks = min(blocks, blocks_at_once(config, machine.num_sms, room))
        part = tiles * config.tile_m * choice.traits.head_dim
        if in_turn:
            # Blocks add to the same sums.
            self._workspaces["dq_sums"] = Allocated((part,), "float32")
            # And the number of places that blocks have drawn.
            self._workspaces["turns"] = Allocated((1 + tiles,), "int32")
            self._cleared.append("turns")
        else:
            self._workspaces["dq_parts"] = Allocated((config.num_splits * part,), "float32")
        if problem.batch and blocks:
            arguments = arguments | {"mask": _mask_in_turn(problem), "shape": of_keys}
            self._launch(family, choice, blocks, arguments)
        if tiles and "q" in self._gradients.wrt:
            config = config.reduction()
            reduction = Choice(config.family, config, choice.traits, "with its parts of dQ", ())
            arguments = arguments | {"mask": mask_record(problem), "shape": of_queries}
            self._launch(config.family, reduction, tiles, arguments)

    def _shapes_in_turn(
        self, problem: AttentionProblem, config: Config
    ) -> tuple[TurnsShape, TurnsShape, int]:
        """The sizes of the kernel that goes by keys, of that by queries; tiles of queries."""
        of_keys, of_queries = (
            tiles_listed(problem, config, by_keys=by_keys, in_turn=True)
            for by_keys in (True, False)
        )
        self._lists |= {listed.name: listed for listed in (of_keys, of_queries)}
        most = most_records(problem.lengths, of_queries)
        places = of_queries.tiles_before, most
        shapes = (
            TurnsShape(
                *shape_of_list(problem, self._arguments["shape"], listed),
                self._between(),
                *places,
            )
            for listed in (of_keys, of_queries)
        )
        return *shapes, most * problem.num_heads_q

    def _add_array(
        self, problem: AttentionProblem, gradient: ArrayGradient, choices: tuple[Choice, ...]
    ) -> None:
        """The kernels for the gradient of an array that scores read."""
        self._results[f"d{gradient.name}"] = Allocated(gradient.shape, gradient.dtype)
        if not math.prod(gradient.shape):
            return
        made = kernels_of_array(problem, gradient, choices)
        self._workspaces |= {n: Allocated(*each) for n, each in made.workspaces.items()}
        self._parts |= made.parts
        if self.lengths is not None:
            self._cleared += made.cleared
        for number, (choice, blocks, arguments) in enumerate(made.launches):
            if blocks:
                arguments = self._with_list(problem, choice, self._arguments | arguments)
                name = f"{choice.family} of {gradient.name}, {number}"
                self._launch(name, choice, blocks, arguments)

    def _launch(self, name: str, choice: Choice, num_blocks: int, arguments: dict) -> None:
        """Have a kernel run after those before, with all but addresses bound."""
        # Tensor cores take lse in base 2.
        lse = "lse_log2" if implementation_of(choice.config).has_tensor_cores else "lse"
        arguments = arguments | {"tile_statistics": Statistics(lse, "plain_delta")}
        if implementation_of(choice.config).needs_maps:
            arguments |= self._tensor_maps(choice.config)
        self.kernels[name] = choice
        self._launchers[name] = Launcher(
            choice.config, choice.traits, self.device, num_blocks, arguments
        )

    def _tensor_maps(self, config) -> dict[str, Mapped]:
        """The tensor maps of a kernel by parameter name."""
        rows = {"q": config.tile_m, "do": config.tile_m, "k": config.tile_n, "v": config.tile_n}
        described = TensorLayout.of_keys if self.lengths is None else TensorLayout.of_ragged_keys
        return {
            f"{name}_map": Mapped(tensor.name, described(tensor, rows[name]))
            for name, tensor in ((name, self._tensors[name]) for name in _MAPPED)
        }

    def _between(self) -> Between:
        """What ragged tensor maps do not say of a padded batch."""
        return Between(*(rows_between_entries(self._tensors[name]) for name in _MAPPED))

    def _build(self) -> None:
        if self._schedule is not None:
            self._schedule.build()
        for launcher in self._launchers.values():
            launcher.build()

    def replace(self, name: str, make: Callable[[dict[str, object]], Kernel]) -> None:
        """Have another kernel run in the place of one of `kernels`: see `Launcher.replace`."""
        self._launchers[name].replace(make)

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
        launches = {}
        if self.lengths is not None:
            # Rows that no sequence has.
            for name in self._results:
                launches[f"fill {name}"] = Fill(operands[name], 0.0, self.device)
        for name in self._cleared:
            launches[f"fill {name}"] = Fill(operands[name], 0.0, self.device)
        if self._schedule is not None:
            launches |= self._schedule.bind_or_find(operands, library)
        launches |= {family: each.bind(operands) for family, each in self._launchers.items()}
        return [arrays["d" + name] for name in self._gradients.wrt], launches


def _mask_in_turn(problem: AttentionProblem) -> NamedTuple:
    """The record of `turns_mask_of` for a problem."""
    if problem.blocks is None:
        return mask_record(problem)
    return BlockMaskInTurn(*mask_record(problem, by_keys=True), mask_record(problem).lists)


def _refuse_sums_of_sequences(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UnsupportedError for gradients that are sums over each packed sequence by itself."""
    for name, shape in shapes.items():
        if len(shape) == 2:
            raise UnsupportedError(
                f"wrt names {name!r} of shape {shape}, and sequences are packed: gradients of "
                f"what each sequence has by itself are made in padded batches, with seqlens_q and "
                f"seqlens_k; give {name} of shape ({shape[1]},)"
            )
