"""A call in numbers: what its kernels are chosen and built from, and their arguments by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from numflash.configs import Traits
from numflash.configs.features import FEATURES, Features, rows_of
from numflash.kernels import arguments as records
from numflash.kernels.arguments import (
    Mask,
    PagedShape,
    Pages,
    RaggedShape,
    Scores,
    Shape,
    Statistics,
)
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import (
    AttentionProblem,
    Tensor,
    as_tensor,
    describe,
    expect_like,
    expect_writeable,
)
from numflash.problem.sequences import ListShape
from numflash.problem.tensor_maps import misfit, paged_misfit, ragged_misfit
from numflash.runtime.arrays import copy_rows
from numflash.runtime.views import ArrayView, Operand, fresh


@dataclass(frozen=True)
class Request:
    """A forward call, checked and in numbers: what kernels are chosen and built from.

    Attributes:
        problem: sizes, mask and features, and whether bulk copies can be told of its tensors.
        traits: what its kernels are compiled for.
        tensors: "q", "k", "v", as arrays or codes of 8 bits, and "out".
        arguments: of kernels by parameter name, but for what the choice of a kernel decides.
        device: the ordinal of the CUDA device, or a `Gpu` that is only asked about.
        out_shape, lse_shape: of the results, with the axes that q has.
        copied: of q, k and v those of which the kernel reads a copy.
        tokens_per_scale: with 8-bit floats, the fewest that share a scale of K or V.
    """

    problem: AttentionProblem
    traits: Traits
    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, object]
    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    copied: tuple[str, ...] = ()
    tokens_per_scale: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the results have no elements."""
        return not self.problem.batch * self.problem.seqlen_q

    def of_selected_heads(self) -> "Request":
        """The same call of the heads that a table on the device names."""
        traits = replace(self.traits, selected=True)
        return replace(self, traits=traits, arguments={**self.arguments, "in_fp8": "in_fp8"})


def request_of(views: dict[str, ArrayView], options: AttentionOptions) -> Request:
    """A forward call on arrays of 16 or 32 bits. Raises as `numflash.attention`."""
    rows, copied = with_contiguous_rows(views, ("q", "k", "v"))
    problem, tensors = describe(rows, options)
    tensors["out"] = out = described_out(views, rows["q"], problem, options)
    return Request(
        problem=seen_by_bulk_copies(problem, tensors),
        traits=traits_of(problem, tensors),
        tensors=tensors,
        arguments=arguments_of(problem, tensors),
        device=rows["q"].device,
        out_shape=out.view.shape,
        lse_shape=lse_shape(problem, rows["q"]),
        copied=copied,
    )


def described_out(
    views: dict[str, ArrayView], q: ArrayView, problem: AttentionProblem, options: AttentionOptions
) -> Tensor:
    """The result: the caller's `out`, checked, or one still to be allocated."""
    shape = (*q.shape[:-1], problem.head_dim_v)
    out, dtype = views.get("out"), options.out_dtype or q.dtype
    if out is None:
        out = fresh(shape, dtype, q.device)
    else:
        expect_like("out", out, shape, dtype, q.device)
        expect_writeable("out", out)
    return as_tensor("out", out, options.layout)


def traits_of(problem: AttentionProblem, tensors: Mapping[str, Tensor]) -> Traits:
    """The traits of the kernels for a problem with these tensors."""
    return problem.traits(all(tensor.is_vectorizable for tensor in tensors.values()))


def arguments_of(problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Arguments of any kernel of attention, by parameter name: its records and numbers."""
    scale, asked = problem.softmax_scale, zip(FEATURES, problem.features, strict=True)
    features = Features(*(row.absent if record is None else record for row, record in asked))
    for row in rows_of(problem.feature_names):
        scale /= row.unit(getattr(features, row.name))
    return {
        **{name: records.Tensor(each.name, *each.strides[:3]) for name, each in tensors.items()},
        **_codes(problem, tensors),
        "shape": Shape(
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            num_heads_q=problem.num_heads_q,
            group_size=problem.group_size,
            head_dim=problem.head_dim,
            head_dim_v=problem.head_dim_v,
            batch_size=problem.batch,
        ),
        "mask": mask_record(problem),
        "scores": _scores(problem, scale, features),
        "features": features,
        "row_gradients": None,
        "softmax_scale": problem.softmax_scale,
        "statistics": Statistics("lse", "delta"),
        "statistics_log2": Statistics("lse_log2", "delta"),
        "in_fp8": None,
    }


def _codes(problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict[str, NamedTuple]:
    """The records of K and V that are codes, by parameter name; none of others."""
    if problem.codes is None:
        return {}
    return {
        name: coded_keys(name, tensors[name].strides, f"{name}_descale", strides)
        for name, strides in problem.codes._asdict().items()
    }


def coded_keys(
    name: str, strides: tuple[int, ...], descale: str, of_descale: tuple[int, int] | None
) -> records.CodedKeys:
    """The record of codes, and of their factors; without strides those are 1."""
    if of_descale is None:
        return records.CodedKeys(name, *strides[:3], None, 0, 0, 0)
    return records.CodedKeys(name, *strides[:3], descale, *of_descale, 1)


def shape_of_list(
    problem: AttentionProblem, shape: Shape, listed: ListShape, of_parts: bool = False
) -> RaggedShape | PagedShape:
    """The `Shape` of kernels that go through a list of tiles, or of the tiles that have parts."""
    of_head = problem.seqlen_q
    of_batch = 0 if problem.lengths.packed else of_head * problem.num_heads_q
    where = problem.aligned, of_batch, of_head
    if of_parts:
        return RaggedShape(*shape, listed.split_tiles, None, None, None, *where)
    parts = (listed.slots, "parts", "part_lses") if listed.least else (None, None, None)
    ragged = RaggedShape(*shape, listed.name, *parts, *where)
    if problem.pages is None:
        return ragged
    pages = problem.pages
    signed = pages.factor - 2**32 if pages.factor >= 2**31 else pages.factor
    numbers = pages.pitch, pages.count, pages.size, signed, pages.shift
    return PagedShape(*ragged, Pages("page_table", *numbers))


def mask_record(problem: AttentionProblem, by_keys: bool = False) -> NamedTuple:
    """The record of `mask_of` for a problem; with `by_keys` for a kernel that owns keys."""
    band, blocks = (problem.band_lo, problem.band_hi), problem.blocks
    if blocks is None:
        return Mask(*band)
    rows, columns, suffix = blocks.rows, blocks.columns, ""
    if by_keys:
        rows, columns, suffix = columns, rows, "_of_keys"
    lists = records.BlockLists(
        f"block_entries{suffix}",
        f"block_counts{suffix}",
        batch=blocks.heads * rows if blocks.batch > 1 else 0,
        head=rows if blocks.heads > 1 else 0,
        pitch=columns,
    )
    return records.BlockMask(*band, lists)


def _scores(problem: AttentionProblem, scale: float, features: Features) -> NamedTuple:
    """The record of `scores_of` for a problem."""
    values = scale, problem.softmax_scale, problem.shift, features
    if not problem.program:
        return Scores(*values)
    given = records.given_of(problem.program)(*problem.given)
    return records.scores_of(problem.program)(*values, given)


def seen_by_bulk_copies(
    problem: AttentionProblem,
    tensors: Mapping[str, Tensor],
    transposed_v: bool = False,
    names: tuple[str, ...] = ("q", "k", "v", "out"),
) -> AttentionProblem:
    """The problem, which then knows whether bulk copies can be told of these tensors."""
    for name in names:
        if problem.pages is not None and name in ("k", "v"):
            why = paged_misfit(tensors[name], problem.lengths.given)
        elif problem.lengths is not None:
            why = ragged_misfit(tensors[name])
        else:
            why = misfit(tensors[name], transposed_v and name == "v")
        if why is not None:
            why = f"{name} cannot be described to bulk copies: {why}"
            return replace(problem, no_tensor_maps=why)
    return problem


def lse_shape(problem: AttentionProblem, q: ArrayView) -> tuple[int, ...]:
    """(batch, heads, seqlen_q), without the axes that q does not have."""
    return (problem.batch, problem.num_heads_q, problem.seqlen_q)[4 - len(q.shape) :]


def of_each_query(
    name: str, view: ArrayView, problem: AttentionProblem, q: ArrayView
) -> records.Tensor:
    """An array of the caller's that is shaped like lse, with any strides. Raises as `describe`."""
    expect_like(name, view, lse_shape(problem, q), "float32", q.device)
    batch, head, row = (0,) * (3 - len(view.strides)) + view.strides
    return records.Tensor(name, batch, row, head)


def with_contiguous_rows(
    views: dict[str, ArrayView], names: tuple[str, ...]
) -> tuple[dict[str, ArrayView], tuple[str, ...]]:
    """The views, with those of the copies of `names` that must be copied; and their names."""
    copied = tuple(name for name in names if not views[name].has_contiguous_rows)
    copies = {n: fresh(views[n].shape, views[n].dtype, views[n].device) for n in copied}
    return views | copies, copied


def copy_all_rows(names: tuple[str, ...], operands: dict[str, Operand]) -> None:
    """Replace these operands by copies whose last axis is contiguous."""
    for name in names:
        operands[name] = copy_rows(operands[name])
