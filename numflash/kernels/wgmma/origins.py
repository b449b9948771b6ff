"""Where sequences begin in the tensor maps of Q, K, V and the result.

A map of arrays in which all sequences are of one length has a dimension of batch entries, and a
row of a sequence is a row of the map. Where they have lengths of their own the maps are ragged:
`problem.tensor_maps` says what x and y are. Where keys lie in pages, each page is a sequence of
such a map, which may end before the page does.
"""

from typing import NamedTuple

from numflash.configs import Traits
from numflash.ptx import device_function, i32
from numflash.tiles.pages import column_of_key


class Origin(NamedTuple):
    """Coordinates of a sequence in a map.

    Attributes:
        row: the row coordinate of its first row; in a ragged map that is x.
        entry: the coordinate of its batch entry; in a ragged map that is y.
    """

    row: i32
    entry: i32


class Origins(NamedTuple):
    """The `Origin` of a sequence in each array that a backward fetches."""

    q: Origin
    k: Origin
    v: Origin
    do: Origin


class KeysInPages(NamedTuple):
    """The keys of a sequence whose boxes have coordinates of their own, by `box_in_pages`.

    Attributes:
        seqlen: how many keys it has.
        entry: its row of the table of pages.
    """

    seqlen: i32
    entry: i32


@device_function
def _of_entry(batch):
    return Origin(i32(0), batch)


@device_function
def _of_ragged(bound, first, seqlen, batch, between):
    """`between` are the rows from one batch entry to the next."""
    return Origin(i32(bound - seqlen), i32(first + seqlen + batch * between))


@device_function
def box_in_pages(key, keys, pages):
    """(x, y, page): the coordinates of the box from `key` on, all in one page; of `KeysInPages`.

    What is behind the end of the sequence lies outside the map, and arrives as zeros.
    """
    column = column_of_key(key, pages)
    first, page = i32(column * pages.size), i32(0)
    x, y = pages.size, i32(0)
    if key < keys.seqlen:
        y = i32(min(pages.size, keys.seqlen - first))
        x = i32(pages.size - y + key - first)
        page = pages.table[keys.entry * pages.pitch + column]
    return x, y, page


def make_origins(traits: Traits):
    """(origins_of_inputs, origin_of_out), functions of (place, sequence, shape, layout)

    The `Origin` of a place's sequence in Q, K and V, and in the result. Where keys lie in pages,
    it is `KeysInPages` of K and V.
    """
    if not traits.ragged:

        @device_function
        def origins_of_inputs(place, sequence, shape, layout):
            origin = _of_entry(place.batch)
            return origin, origin, origin

        @device_function
        def origin_of_out(place, sequence, shape, layout):
            return _of_entry(place.batch)

        return origins_of_inputs, origin_of_out

    paged = traits.paged

    @device_function
    def origins_of_inputs(place, sequence, shape, layout):
        between, batch = layout.between, place.batch
        queries = shape.seqlen_q, sequence.first_q, sequence.seqlen_q, batch
        if paged:
            keys = KeysInPages(sequence.seqlen_k, batch)
            return _of_ragged(*queries, between.q), keys, keys
        keys = shape.seqlen_k, sequence.first_k, sequence.seqlen_k, batch
        return (
            _of_ragged(*queries, between.q),
            _of_ragged(*keys, between.k),
            _of_ragged(*keys, between.v),
        )

    @device_function
    def origin_of_out(place, sequence, shape, layout):
        first, seqlen = sequence.first_q, sequence.seqlen_q
        return _of_ragged(shape.seqlen_q, first, seqlen, place.batch, layout.between.out)

    return origins_of_inputs, origin_of_out


def make_origins_of_gradients(traits: Traits):
    """origins_of(place, sequence, shape): the `Origins` of a place's sequence in a backward.

    `shape` is a record of `kernels.arguments.mapped_shape_of`.
    """
    if not traits.ragged:

        @device_function
        def origins_of(place, sequence, shape):
            origin = _of_entry(place.batch)
            return Origins(origin, origin, origin, origin)

        return origins_of

    @device_function
    def ragged_origins_of(place, sequence, shape):
        between, batch = shape.between, place.batch
        queries = shape.seqlen_q, sequence.first_q, sequence.seqlen_q, batch
        keys = shape.seqlen_k, sequence.first_k, sequence.seqlen_k, batch
        return Origins(
            _of_ragged(*queries, between.q),
            _of_ragged(*keys, between.k),
            _of_ragged(*keys, between.v),
            _of_ragged(*queries, between.out),
        )

    return ragged_origins_of


@device_function
def _pages_of(shape):
    return shape.pages


@device_function
def _no_pages(shape):
    return 0


def make_pages_of(traits: Traits):
    """pages_of(shape): the record `Pages` of a kernel's sizes; nothing where there are none."""
    return _pages_of if traits.paged else _no_pages
