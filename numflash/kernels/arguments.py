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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, get_args, get_origin

from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64


@dataclass(frozen=True)
class Pointer:
    """The address of elements of type `element` in global memory.

    In a kernel it is indexed like an array, `q[offset]`, with a 64-bit element offset.
    """

    element: type


class Element:
    """Stands in a record for the type in brackets: the `storage` of `Tensor[storage]`."""


class Tensor(NamedTuple):
    """A (batch, row, head, column) array: the strides in elements; columns are neighbours."""

    data: Pointer(Element)
    batch: i64
    row: i64
    head: i64


class Part(NamedTuple):
    """A `Tensor` for each split of the keys, `split` elements apart; 0 without splits."""

    data: Pointer(Element)
    split: i64
    batch: i64
    row: i64
    head: i64


class Statistics(NamedTuple):
    """What the backward knows of each query, both (batch, num_heads_q, seqlen_q), contiguous.

    `lse` is the forward's, or `delta`'s in base 2; `delta` is softmax_scale rowsum(O * dO).
    """

    lse: Pointer(f32)
    delta: Pointer(f32)


class Shape(NamedTuple):
    """The sizes of an attention problem; `group_size` query heads share a key-value head."""

    seqlen_q: i32
    seqlen_k: i32
    num_heads_q: i32
    group_size: i32
    head_dim: i32
    head_dim_v: i32
    batch_size: i32


class Mask(NamedTuple):
    """A band: query i sees the keys j with lo <= j - i <= hi."""

    lo: i32
    hi: i32


class Alibi(NamedTuple):
    """Slopes (batch, num_heads_q) and their strides; the distance is |i + shift - j|."""

    slopes: Pointer(f32)
    batch: i64
    head: i64
    shift: i32


class Scores(NamedTuple):
    """From products Q K^T to scores.

    `scale` is softmax_scale, with softcap divided by `softcap`: the argument of tanh.
    """

    scale: f32
    softcap: f32
    softmax_scale: f32
    alibi: Alibi


class Layout(NamedTuple):
    """How a forward is laid out over blocks.

    `pack` query heads of a token are neighbouring rows; keys are split over `num_splits` blocks;
    `heads_in_flight` heads go together, because their K and V fit the L2 cache.
    """

    pack: i32
    num_splits: i32
    heads_in_flight: i32


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
    """What the compiler makes of a kernel's parameters: path, as in "q.row" -> type, in order."""
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
