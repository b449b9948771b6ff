"""The arguments of kernels: one record for each idea, shared by all of them.

    def forward(q: Tensor[storage], ..., lse: Pointer(f32), shape: Shape, mask: Mask): ...

A parameter of a kernel is a scalar, a `Pointer`, a `TensorMap` (`numflash.ptx`) or a record: a
NamedTuple of such fields and of further records. `Tensor[storage]` is a `Tensor` whose elements
are `storage`. The compiler passes each field as a parameter of its own; `leaves` names them.
Tensor maps stand beside the records: the hardware wants their address, and a field has none.

The host makes the same records with Python numbers. A pointer then is the name of an operand,
whose address is filled in when arrays are bound, or None where nothing is read. The simulator
makes them of its own pointers. No Numba is imported here: a launch with a warm cache needs none.
"""

from collections.abc import Callable, Iterator
from functools import cache, reduce
from typing import NamedTuple, get_args, get_origin

from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint8 as u8
from numpy import uint16 as u16

from numflash.configs.features import Features
from numflash.configs.traits import Traits
from numflash.functions.program import Program
from numflash.runtime.views import Pointer

STORAGE = {
    "float16": u16,
    "bfloat16": u16,
    "float32": f32,
    "int32": i32,
    "int64": i64,
    "bool": u8,
    "uint8": u8,
}
"""dtype of an array that a program reads -> the scalar type in memory."""


class Element:
    """Stands in a record for the type in brackets: the `storage` of `Tensor[storage]`."""


def extends(record: type) -> Callable[[type], type]:
    """Makes a class of annotations a record: the fields of `record`, and behind them its own."""

    def extended(fields: type) -> type:
        declared = record.__annotations__ | fields.__annotations__
        made = NamedTuple(fields.__name__, list(declared.items()))
        made.__doc__, made.__module__ = fields.__doc__, fields.__module__
        return made

    return extended


class Tensor(NamedTuple):
    """A (batch, row, head, column) array: the strides in elements; columns are neighbours."""

    data: Pointer(Element)
    batch: i64
    row: i64
    head: i64


class CodedKeys(NamedTuple):
    """A `Tensor` of e4m3 codes of K or V, which stand for numbers by a factor.

    It is descale[entry * descale_entry + head * descale_head] of sequence `entry`, or 1 where
    `has_descale` is 0.
    """

    data: Pointer(u8)
    batch: i64
    row: i64
    head: i64
    descale: Pointer(f32)
    descale_entry: i64
    descale_head: i64
    has_descale: i32


def kv_of(traits: Traits, storage) -> type:
    """The record of K and V."""
    return CodedKeys if traits.codes else Tensor[storage]


class Part(NamedTuple):
    """A `Tensor` for each split of the keys, `split` elements apart; 0 without splits."""

    data: Pointer(Element)
    split: i64
    batch: i64
    row: i64
    head: i64


class Statistics(NamedTuple):
    """The forward's statistics of each query, both (batch, num_heads_q, seqlen_q), contiguous.

    `lse` is the forward's, or `delta`'s in base 2; `delta` is softmax_scale rowsum(O * dO), or
    that unscaled.
    """

    lse: Pointer(f32)
    delta: Pointer(f32)


@cache
def of_rows(traits: Traits) -> type:
    """The record of more that `shared.delta` reads and writes of each query, as traits ask for.

    The caller's, (batch, num_heads_q, seqlen_q) with any strides: `dlse`, the gradient of lse, and
    `delta`, rowsum(O * dO). And `plain`, where delta goes to unscaled.
    """
    asked = {
        "dlse": (traits.dlse, Tensor[f32]),
        "delta": (traits.given_delta, Tensor[f32]),
        "plain": (traits.plain_delta, Pointer(f32)),
    }
    found = [(name, kind) for name, (is_asked, kind) in asked.items() if is_asked]
    return NamedTuple("OfRows", found)


class Shape(NamedTuple):
    """The sizes of an attention problem; `group_size` query heads share a key-value head."""

    seqlen_q: i32
    seqlen_k: i32
    num_heads_q: i32
    group_size: i32
    head_dim: i32
    head_dim_v: i32
    batch_size: i32


@extends(Shape)
class BundledShape:
    """A `Shape`, and how many key-value heads have their blocks in turn.

    See `tiles.wgmma.turns_of_blocks`.
    """

    heads_in_flight: i32


@extends(Shape)
class RaggedShape:
    """A `Shape` of sequences that have lengths of their own.

    Kernels' parameters name the axes of padded arrays. Packed arrays are (tokens, heads, head_dim)
    with the batch stride 0, and their statistics (num_heads_q, tokens): a sequence begins at its
    first query or key.

    seqlen_q and seqlen_k are the rows of a batch entry, or with pages of all pages that a sequence
    may have: no sequence has more. batch_size is 1 where arrays are packed. `records` is a list of
    tiles (`kernels.sequences.schedule`); for `shared.combine`, of the tiles that are split. The
    band of a sequence is that of the mask, moved by aligned * (seqlen_k - seqlen_q). The
    statistics of a head begin at element batch * statistics_batch + head * statistics_head.

    Where tiles are split, record n leaves its part in place slots[n] of `parts` and `part_lses`;
    slots[n] is -1 if it is the only record of its tile.
    """

    records: Pointer(i32)  # 8 words, then 8 for each record
    slots: Pointer(i32)  # (records,)
    parts: Pointer(f32)  # (slot, packed head, row of the tile, padded head_dim_v)
    part_lses: Pointer(f32)  # (slot, packed head, row of the tile)
    aligned: i32
    statistics_batch: i64
    statistics_head: i64


class Pages(NamedTuple):
    """The pages of a cache: key j of entry e is row j % size of page table[e * pitch + j // size].

    There are `count` pages. j // size is 2 j * factor, of 64 bits, shifted right by 32 + shift.
    """

    table: Pointer(i32)  # (entries, pages of an entry)
    pitch: i64
    count: i32
    size: i32
    factor: i32
    shift: i32


@extends(RaggedShape)
class PagedShape:
    """A `RaggedShape` of K and V in `pages`: `batch` of their `Tensor` is the stride of pages."""

    pages: Pages


def shape_of(traits: Traits) -> type:
    """The record of a kernel's sizes."""
    if traits.paged:
        return PagedShape
    return RaggedShape if traits.ragged else Shape


class Between(NamedTuple):
    """The rows from one batch entry to the next in ragged tensor maps; 0 if they are packed.

    `out` is of the result, or in a backward of its gradient.
    """

    q: i32
    k: i32
    v: i32
    out: i32


@extends(RaggedShape)
class MappedShape:
    """A `RaggedShape` of a backward whose tensor maps are ragged (`problem.tensor_maps`)."""

    between: Between


def mapped_shape_of(traits: Traits) -> type:
    """The record of the sizes of a backward that has tensor maps."""
    return MappedShape if traits.ragged else Shape


@extends(MappedShape)
class TurnsShape:
    """A `MappedShape` of a backward whose blocks add to dQ in turn.

    Tile n of a sequence's queries has the place tiles_before[sequence] + n among `most_tiles` of
    each query head. Where there is no such place, sequences overlap.
    """

    tiles_before: Pointer(i32)  # (sequences,)
    most_tiles: i32


def turns_shape_of(traits: Traits) -> type:
    """The record of the sizes of a backward whose blocks add to dQ in turn."""
    return TurnsShape if traits.ragged else BundledShape


class Mask(NamedTuple):
    """A band: query i sees the keys j with lo <= j - i <= hi."""

    lo: i32
    hi: i32


class BlockLists(NamedTuple):
    """The lists of a block mask: for each row of blocks those that are not empty, in order.

    An entry is 2 * block + is_full. Of rows of blocks of queries a list has blocks of keys, or the
    other way round. `batch` and `head` are the rows of blocks from one to the next, 0 where all
    share them; a list begins `pitch` entries after the one before.
    """

    entries: Pointer(i32)
    counts: Pointer(i32)
    batch: i32
    head: i32
    pitch: i32


@extends(Mask)
class BlockMask:
    """A `Mask` of which a row sees only the blocks of keys that its list has."""

    lists: BlockLists


@extends(BlockMask)
class BlockMaskInTurn:
    """A `BlockMask` by keys of a backward whose blocks add to dQ in turn.

    In the lists by queries a tile of queries has the blocks of keys that add to it.
    """

    lists_of_queries: BlockLists


def turns_mask_of(traits: Traits) -> type:
    """The record of the mask of a backward whose blocks add to dQ in turn."""
    return BlockMaskInTurn if traits.blocks else Mask


def mask_of(traits: Traits) -> type:
    """The record of a kernel's mask."""
    return BlockMask if traits.blocks else Mask


class Scores(NamedTuple):
    """From products Q K^T to scores.

    `scale` is softmax_scale over the unit of the first feature. Query i stands at key i + `shift`.
    """

    scale: f32
    softmax_scale: f32
    shift: i32
    features: Features


@cache
def given_of(program: str) -> type:
    """The record `Given` of a program: the leaves that its functions read, by `Program.fields`."""
    kinds = {"i64": i64, "i32": i32, "f32": f32}
    declared = [
        (name, kinds[kind] if kind in kinds else Pointer(STORAGE[kind.removeprefix("pointer:")]))
        for name, kind in Program.parse(program).fields
    ]
    return NamedTuple("Given", declared)


@cache
def scores_of(program: str) -> type:
    """The record `Scores` of kernels with this program: with what its functions read, `given`."""
    if not program:
        return Scores
    return NamedTuple("Scores", [*Scores.__annotations__.items(), ("given", given_of(program))])


class Axes(NamedTuple):
    """Numbers of batch entries, of query heads, and of queries or keys."""

    batch: i32
    heads: i32
    length: i32


class Reduced(NamedTuple):
    """How an array goes with scores: its axes, and those that share its elements.

    An array has `kept` elements along an axis of the scores, and `summed` neighbours share each;
    one of both is 1. `batch`, `head`, `row` and `column` are its strides, in elements, and `first`
    is the offset of the element of the first batch entry, head, query and key.
    """

    kept: Axes
    summed: Axes
    first: i64
    batch: i64
    head: i64
    row: i64
    column: i64


class Layout(NamedTuple):
    """The layout of a forward over blocks.

    `pack` query heads of a token are neighbouring rows; keys are split over `num_splits` blocks;
    `heads_in_flight` heads go together, because their K and V fit the L2 cache.
    """

    pack: i32
    num_splits: i32
    heads_in_flight: i32


@extends(Layout)
class RaggedLayout:
    """A `Layout` of a forward whose tensor maps are ragged (`problem.tensor_maps`)."""

    between: Between


def mapped_layout_of(traits: Traits) -> type:
    """The record of the layout of a forward that has tensor maps."""
    return RaggedLayout if traits.ragged else Layout


class SplitTiles(NamedTuple):
    """The split tiles that `shared.combine` puts together: `rows` rows of `pack` heads a token.

    1 and 1 where all sequences are of one length.
    """

    rows: i32
    pack: i32


class Transposed(NamedTuple):
    """Codes (batch, head, column, token) whose tokens are neighbours.

    `row` elements are from a column to the next, of which each has `length` tokens.
    """

    data: Pointer(u8)
    batch: i64
    row: i64
    head: i64
    length: i32


class Descale(NamedTuple):
    """Scales of codes, (batch, head, token); 2 ** `shift` tokens share one."""

    data: Pointer(f32)
    batch: i64
    head: i64
    shift: i32


class QueryDescale(NamedTuple):
    """Scales of Q: a `Descale` in which `group` query heads share one.

    The scales of packed heads, which are neighbouring rows, are `packed` elements apart.
    """

    data: Pointer(f32)
    batch: i64
    head: i64
    packed: i64
    group: i32
    shift: i32


class Descales(NamedTuple):
    """The factors of the codes of Q, K and V."""

    q: QueryDescale
    k: Descale
    v: Descale


def record_of(annotation) -> type:
    """The class of a record: that of `Tensor[storage]` is `Tensor`."""
    return get_origin(annotation) or annotation


def fields(annotation) -> dict[str, object] | None:
    """Field name -> annotation of a record; None for a parameter that is no record."""
    record = record_of(annotation)
    if not hasattr(record, "_fields"):
        return None
    of_any, given = Pointer(Element), [Pointer(element) for element in get_args(annotation)]
    return {
        name: given[0] if declared == of_any else declared
        for name, declared in record.__annotations__.items()
    }


def leaves(parameters: dict[str, object]) -> dict[str, object]:
    """A kernel's parameters as the compiler passes them: path, as in "q.row" -> type, in order."""
    found = {}
    for name, annotation in parameters.items():
        inner = fields(annotation)
        if inner is None:
            found[name] = annotation
        else:
            found |= leaves({f"{name}.{field}": declared for field, declared in inner.items()})
    return found


def value_at(arguments: dict[str, object], path: str):
    """The value of a leaf. A parameter that is not among the arguments is the operand so named."""
    name, *attributes = path.split(".")
    return reduce(getattr, attributes, arguments.get(name, name))


def assembled(annotation, values: Iterator):
    """The argument of a parameter, made of the values of its next leaves."""
    inner = fields(annotation)
    if inner is None:
        return next(values)
    return record_of(annotation)(*(assembled(declared, values) for declared in inner.values()))
