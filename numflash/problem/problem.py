"""AttentionProblem: one attention call, checked and in numbers.

The only place that interprets the user's arrays and options. A call that passes here can run;
every message names the argument, its value, and the rule.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from numflash.configs import DTYPES, MAX_HEAD_DIM, Traits, padded_head_dim
from numflash.configs.features import FEATURES, NO_FEATURES, Asked, Features
from numflash.problem.block_masks import Blocks, expect_blocks
from numflash.problem.lengths import expect_lengths, lengths_asked
from numflash.problem.options import (
    PACKED,
    PRECISIONS,
    AttentionOptions,
    expect_one_of,
    kind_of,
)
from numflash.problem.pages import PageTable, page_table_of
from numflash.problem.programs import Extent, most_rows, program_of
from numflash.problem.sequences import NO_LIMIT, Lengths, ListShape
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView

# Token indices, and their differences, are 32-bit in kernels.
_MAX_SEQLEN = 2**30
_MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Tensor:
    """One array as (batch, seqlen, heads, head_dim), whatever its layout: strides in elements."""

    name: str
    view: ArrayView
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    @property
    def is_vectorizable(self) -> bool:
        """Whether every row can be read 16 bytes at a time."""
        vector = 16 // self.view.itemsize
        steps = [s for s, n in zip(self.strides[:3], self.shape[:3], strict=True) if n > 1]
        return (
            self.view.pointer % 16 == 0
            and self.shape[3] % vector == 0
            and all(step % vector == 0 for step in steps)
        )


class Origin(NamedTuple):
    """The numbers that features see of a call's first query, first key and first query head."""

    row: int
    column: int
    head: int


WHOLE = Origin(0, 0, 0)


class Descales(NamedTuple):
    """The factors of K and V that are e4m3 codes: strides (sequence, head) in elements.

    None where all are 1.
    """

    k: tuple[int, int] | None
    v: tuple[int, int] | None


@dataclass(frozen=True)
class AttentionProblem:
    """Sizes, scale, mask and features of one attention call.

    Attributes:
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v: sizes. Of
            packed sequences batch is 1, and the seqlens are the tokens of all.
        dtype: of q, k and v.
        softmax_scale: factor of Q K^T.
        band_lo, band_hi: query i sees the keys j with band_lo <= j - i <= band_hi.
        shift: query i stands at key i + shift; with `lengths` that much further than `aligned`
            says.
        features: the arguments of each feature, by name; None of one that is not asked for.
        origin: of a part of a larger problem, the numbers of its first row, column and head.
        program: the text of the caller's functions, bias and mask; "" without.
        given: what they read: the values of `Program.fields`; of a pointer the operand's name.
        blocks: of the block mask; None without one.
        lengths: of sequences that have lengths of their own, else None.
        pages: of a cache that K and V lie in; None without.
        codes: of K and V in a cache that are e4m3 codes; None of those that have q's dtype.
        batch_invariant: whether a row's sums depend on nothing but its own sequence.
        num_splits: with `lengths` the most parts that a sequence's keys are dealt out to; 0: the
            rules find it.
        aligned: with `lengths` 1 where the last query stands at the last key, else 0.
        tf32: whether float32 may be multiplied as tf32.
        float32_out: whether the result is float32 where q, k and v have fewer bits.
        no_tensor_maps: why q, k, v and out cannot be described to bulk copies; None if they can.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str
    softmax_scale: float
    band_lo: int
    band_hi: int
    shift: int
    features: Features = NO_FEATURES
    origin: Origin = WHOLE
    program: str = ""
    given: tuple = ()
    blocks: Blocks | None = None
    lengths: Lengths | None = None
    pages: PageTable | None = None
    codes: Descales | None = None
    batch_invariant: bool = False
    num_splits: int = 0
    aligned: int = 0
    tf32: bool = False
    float32_out: bool = False
    no_tensor_maps: str | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Of the features that are asked for."""
        asked = self.features._asdict().items()
        return tuple(name for name, record in asked if record is not None)

    def traits(self, vectorized: bool) -> Traits:
        """The traits that kernels for this problem are compiled for."""
        return Traits(
            self.dtype,
            padded_head_dim(self.head_dim),
            padded_head_dim(self.head_dim_v),
            self.feature_names,
            vectorized=vectorized,
            tf32=self.tf32,
            float32_out=self.float32_out,
            program=self.program,
            blocks=self.blocks.size if self.blocks else (),
            ragged=self.lengths is not None,
            paged=self.pages is not None,
            codes=self.codes is not None,
        )

    @property
    def entries(self) -> int:
        """Sequences."""
        return self.batch if self.lengths is None else self.lengths.entries

    @property
    def tokens_q(self) -> int:
        """Queries of a sequence: all, or of packed sequences the mean."""
        if self.lengths is None or not self.lengths.packed:
            return self.seqlen_q
        return -(-self.seqlen_q // max(1, self.lengths.entries))

    @property
    def tokens_k(self) -> int:
        """Keys of a sequence: all, or of packed sequences the mean."""
        if self.lengths is None or not self.lengths.packed or self.pages is not None:
            return self.seqlen_k
        return -(-self.seqlen_k // max(1, self.lengths.entries))

    def list_shape(self, tile: int, stage: int, pack: int = 1, by_keys: bool = False) -> ListShape:
        """The list of the tiles of sequences that have lengths of their own."""
        band = self.band_lo, self.band_hi
        return ListShape(tile, stage, pack, by_keys, *band, self.aligned)

    def num_blocks(self, rows: int, heads: int, block_rows: int) -> int:
        """The grid of a kernel whose blocks own `block_rows` rows of `rows` x heads x batch.

        Raises:
            UnsupportedError: more blocks than a grid can have.
        """
        return num_blocks("the problem", rows, heads * self.batch, block_rows)


def num_blocks(what: str, rows: int, heads: int, block_rows: int) -> int:
    """The grid of a kernel whose blocks own `block_rows` of the `rows` rows of a head.

    Raises:
        UnsupportedError: more blocks than a grid can have; `what` is the subject of the message.
    """
    blocks = -(-rows // block_rows) * heads
    if blocks > _MAX_BLOCKS:
        raise UnsupportedError(
            f"{what} needs {blocks} thread blocks; a grid has at most {_MAX_BLOCKS}"
        )
    return blocks


def describe(
    views: dict[str, ArrayView], options: AttentionOptions
) -> tuple[AttentionProblem, dict[str, Tensor]]:
    """Check q, k, v and the options of a call.

    Args:
        views: of q, k and v, and of the options that are arrays, by name.
        options: of the call.

    Returns:
        The problem, and the three arrays by name as `Tensor`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention` documents.
    """
    options.check()
    q, layout = views["q"], options.layout
    if q.dtype not in DTYPES:
        raise TypeError(f"q must have one of the dtypes {', '.join(DTYPES)}, got {q.dtype}")
    tensors, paged, codes = {}, "page_table" in views, _codes(views, options)
    for name in ("q", "k", "v"):
        view = views[name]
        if view.dtype != q.dtype and (codes is None or name == "q"):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {view.dtype}")
        if view.device != q.device:
            raise ValueError(
                f"{name} must lie on the device of q, {q.device}, got device {view.device}"
            )
        if paged and name != "q":
            tensors[name] = as_page(name, view)
            continue
        if len(view.shape) != len(q.shape):
            raise ValueError(
                f"{name} must have as many dimensions as q, {len(q.shape)}, got {len(view.shape)}"
            )
        tensors[name] = as_tensor(name, view, layout)
    batch, seqlen_q, num_heads_q, head_dim = tensors["q"].shape
    _, seqlen_k, num_heads_kv, _ = tensors["k"].shape
    head_dim_v = tensors["v"].shape[3]
    if paged:
        _expect("v", "pages", tensors["v"].shape[0], "k", tensors["k"].shape[0])
    else:
        _expect("k", "batch", tensors["k"].shape[0], "q", batch)
        _expect("v", "batch", tensors["v"].shape[0], "q", batch)
    _expect("k", "head_dim", tensors["k"].shape[3], "q", head_dim)
    _expect("v", "seqlen", tensors["v"].shape[1], "k", seqlen_k)
    _expect("v", "heads", tensors["v"].shape[2], "k", num_heads_kv)
    for name, value in (("head_dim of q and k", head_dim), ("head_dim of v", head_dim_v)):
        expect_head_dim(name, value)
    if num_heads_kv == 0 or num_heads_q == 0 or num_heads_q % num_heads_kv:
        raise ValueError(
            "heads of q must be a positive multiple of the heads of k and v, got "
            f"{num_heads_q} and {num_heads_kv}"
        )
    for name, value in (("seqlen of q", seqlen_q), ("seqlen of k", seqlen_k)):
        if value >= _MAX_SEQLEN:
            raise UnsupportedError(f"{name} must be below {_MAX_SEQLEN}, got {value}")

    pages, entries = None, batch
    if paged:
        pages = page_table_of(views["page_table"], tensors["k"].shape, q.device)
        seqlen_k = pages.width * pages.size
    lengths = lengths_asked(views, layout, batch, (seqlen_q, seqlen_k))
    expect_lengths(lengths, pages, options)
    origin = None if options.origin is None else Origin(*map(int, options.origin))
    longest, packed = (seqlen_q, seqlen_k), lengths is not None and lengths.packed
    if lengths is not None:
        lengths = lengths._replace(added_k=int(options.appended), with_start_k=options.cached)
        entries = lengths.entries
    if packed:
        most = most_rows(views, origin)
        longest = tuple(n if m is None else min(n, m) for n, m in zip(longest, most, strict=True))
        lengths = lengths._replace(most_q=longest[0], most_k=longest[1])
    if options.num_splits and options.batch_invariant:
        raise ValueError(
            "num_splits and batch_invariant=True cannot be given together: each says where keys "
            f"are split, got num_splits {options.num_splits}"
        )
    scale = float(head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale)
    shift, aligned = int(options.shift), options.causal_align == "bottom_right"
    # Differences j - i lie between -seqlen_q and seqlen_k: wider bands are the same.
    least, most = -seqlen_q, seqlen_k
    if lengths is not None:
        least, most = -NO_LIMIT, NO_LIMIT
    elif aligned:
        shift += seqlen_k - seqlen_q
    left, right = (None if side in (None, -1) else int(side) for side in options.window_size)
    expect_precision(options.precision, q.dtype)
    if options.causal:
        right = 0
    asked = Asked(entries, num_heads_q, scale, q.device, views, origin)
    extent = Extent(entries, num_heads_q, *longest, q.device, origin, packed)
    program, given = program_of(views, options, extent)
    blocks = None
    if options.block_mask is not None:
        if origin is not None:
            raise ValueError(
                "block_mask is made for the rows, columns and heads of a call, and origin says "
                "that they are others; give mask_mod with origin, or block_mask without"
            )
        blocks = expect_blocks(options.block_mask, views, extent[:4], q.device)
    problem = AttentionProblem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=q.dtype,
        softmax_scale=scale,
        band_lo=least if left is None else min(most, max(least, shift - left)),
        band_hi=most if right is None else max(least, min(most, shift + right)),
        shift=shift,
        features=_features(views, options, asked),
        origin=origin or WHOLE,
        program=program,
        given=given,
        blocks=blocks,
        lengths=lengths,
        pages=pages,
        codes=codes,
        batch_invariant=options.batch_invariant,
        num_splits=int(options.num_splits or 0),
        aligned=int(aligned),
        tf32=options.precision == "tf32",
        float32_out=expect_out_dtype("out_dtype", options.out_dtype, q.dtype) != q.dtype,
    )
    return problem, tensors


def _codes(views: dict[str, ArrayView], options: AttentionOptions) -> Descales | None:
    """What is to know of a cache of codes, which `problem.caches` has checked; None of others."""
    if not options.cached or (views["k"].dtype, views["v"].dtype) != ("uint8", "uint8"):
        return None
    factors = (views.get(f"{name}_descale") for name in "kv")
    return Descales(*(None if view is None else view.strides for view in factors))


def as_page(name: str, view: ArrayView) -> Tensor:
    """An array of pages (pages, page_size, heads, head_dim). Raises ValueError."""
    if len(view.shape) != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (pages, page_size, heads, head_dim) with page_table, "
            f"got {len(view.shape)}"
        )
    return Tensor(name, view, view.shape, view.strides)


def as_tensor(name: str, view: ArrayView, layout: str) -> Tensor:
    """An array of two to four dimensions as (batch, seqlen, heads, head_dim).

    Raises:
        ValueError: it has another number of dimensions.
    """
    shape, strides = view.shape, view.strides
    if layout == PACKED and len(shape) != 3:
        raise ValueError(
            f"{name} must have 3 dimensions (tokens, heads, head_dim), got {len(shape)}"
        )
    if len(shape) == 2:
        shape, strides = (1, shape[0], 1, shape[1]), (0, strides[0], 0, strides[1])
    elif len(shape) in (3, 4):
        if len(shape) == 3:
            shape, strides = (1, *shape), (0, *strides)
        if layout == "bhsd":
            shape = (shape[0], shape[2], shape[1], shape[3])
            strides = (strides[0], strides[2], strides[1], strides[3])
    else:
        raise ValueError(
            f"{name} must have 2 dimensions (seqlen, head_dim), 3 (one batch entry) or 4 "
            f"({layout}), got {len(shape)}"
        )
    return Tensor(name, view, shape, strides)


def expect_head_dim(name: str, value: int) -> None:
    """Check a head_dim.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
        UnsupportedError: above what kernels are made for.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind_of(value)})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > MAX_HEAD_DIM:
        raise UnsupportedError(f"{name} must be at most {MAX_HEAD_DIM}, got {value}")


def expect_out_dtype(name: str, dtype: str | None, of_q: str) -> str:
    """The dtype of results that a caller asks for. Raises TypeError, ValueError."""
    if dtype is None:
        return of_q
    if not isinstance(dtype, str):
        raise TypeError(f"{name} must be a string, got {dtype!r} ({kind_of(dtype)})")
    if dtype not in (of_q, "float32"):
        choices = dict.fromkeys((of_q, "float32"))
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {dtype!r}")
    return dtype


def expect_precision(precision: str | None, dtype: str) -> None:
    """Check a precision. Raises TypeError, ValueError."""
    if precision is not None:
        expect_one_of("precision", precision, PRECISIONS)
        if precision == "tf32" and dtype != "float32":
            raise ValueError(
                f'precision="tf32" is a way to multiply float32; q, k and v are {dtype}'
            )


def expect_like(
    name: str, view: ArrayView, shape: tuple, dtype: str, device: int, of: str = "q"
) -> None:
    """Check an argument whose shape, dtype and device are given by the others.

    `of` names the argument that it must lie on the device of.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if view.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {view.dtype}")
    if tuple(view.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(view.shape)}")
    if view.device != device:
        raise ValueError(
            f"{name} must lie on the device of {of}, {device}, got device {view.device}"
        )


def expect_contiguous_rows(name: str, view: ArrayView) -> None:
    """Check an argument that cannot be copied. Raises ValueError."""
    if not view.has_contiguous_rows:
        raise ValueError(
            f"{name} must have a contiguous last axis, stride 1, got stride {view.strides[-1]}"
        )


def expect_writeable(name: str, view: ArrayView) -> None:
    """Check an argument that is written to. Raises ValueError."""
    expect_contiguous_rows(name, view)
    if not view.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    axes = zip(view.shape, view.strides, strict=True)
    if 0 not in view.shape and any(step == 0 and n > 1 for n, step in axes):
        raise ValueError(
            f"{name} must not be a broadcast view, whose elements share memory, got strides "
            f"{view.strides}"
        )


def _expect(name: str, axis: str, value: int, other: str, wanted: int) -> None:
    if value != wanted:
        raise ValueError(f"{name} must have the {axis} of {other}, {wanted}, got {value}")


def _features(views: dict[str, ArrayView], options: AttentionOptions, asked: Asked) -> Features:
    """The records of the features that a call asks for. Raises TypeError, ValueError."""
    found = []
    for row in FEATURES:
        value = views.get(row.option) if row.is_array else getattr(options, row.option)
        found.append(row.read(value, asked) if row.is_asked(value) else None)
    return Features(*found)
