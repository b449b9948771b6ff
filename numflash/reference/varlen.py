"""Calls whose sequences have lengths of their own, taken apart: each sequence as a call by itself.

So the specification of such a call is the one of dense calls, and knows nothing of lengths.
"""

from typing import Any, NamedTuple

import numpy as np

from numflash.reference.sequences import Extents, extents_of

_KINDS = "cu_seqlens", "seqlens", "starts"
_OF_LENGTHS = {f"{kind}_{side}" for kind in (*_KINDS, "max_seqlen") for side in ("q", "k")} | {
    "layout",
    "check_lengths",
}
_OF_PLACES = "bias", "mask"
PACKED = "thd"


class Alone(NamedTuple):
    """One sequence of a call.

    Attributes:
        rows: by name of an array of the call, the index of the sequence's rows in it: of "q", "k",
            "v", "out", "lse", their gradients, and of options with a part for each sequence.
        options: of a dense call of this sequence, with `entry`, its number.
    """

    rows: dict[str, tuple]
    options: dict[str, Any]


def has_lengths(options: dict) -> bool:
    """Whether a call with these options has sequences with lengths of their own."""
    names = (f"{kind}_{side}" for kind in _KINDS for side in "qk")
    return any(options.get(name) is not None for name in names)


def each_alone(q, k, options: dict) -> list[Alone]:
    """The sequences of a call, in order.

    Args:
        q, k: of the call, on the host: (tokens, heads, head_dim) with the layout "thd", else as
            `numflash.attention` takes them.
        options: of the call, on the host; among them dlse.

    Example:
        >>> import numpy as np
        >>> from numflash.reference.varlen import each_alone
        >>> x, ends = np.zeros((9, 2, 8)), np.array([0, 4, 9])
        >>> given = {"layout": "thd", "cu_seqlens_q": ends, "cu_seqlens_k": ends}
        >>> [alone.rows["q"] for alone in each_alone(x, x, given)]
        [(slice(0, 4, None),), (slice(4, 9, None),)]
    """
    layout = options.get("layout", "bshd")
    axis = 0 if layout == PACKED or np.ndim(q) == 2 else -2 if layout == "bhsd" else -3
    entries = _entries(q, options, layout)
    extents = []
    for side, x in (("q", q), ("k", k)):
        given = (options.get(f"{kind}_{side}") for kind in _KINDS)
        most = _most(options, side) if layout == PACKED else None
        extents.append(extents_of(x.shape[axis], entries, *given, most=most))
    found = []
    for entry in range(entries):
        of_q, of_k = (_rows(extent, entry) for extent in extents)
        of_batch = (entry,) if layout != PACKED and np.ndim(q) == 4 else ()
        heads = (slice(None),) * (np.ndim(q) > 2)
        before = of_batch + (heads if layout == "bhsd" else ())
        rows = dict.fromkeys(("q", "out", "dout", "dq"), (*before, of_q))
        rows |= dict.fromkeys(("k", "v", "dk", "dv"), (*before, of_k))
        rows |= dict.fromkeys(("lse", "dlse", "delta"), (*of_batch, *heads, of_q))
        sizes = of_q.stop - of_q.start, of_k.stop - of_k.start
        rows |= _rows_of_options(options, entry, sizes)
        given = {n: x for n, x in options.items() if n not in _OF_LENGTHS and x is not None}
        given |= {name: options[name][at] for name, at in rows.items() if name in given}
        given |= {"entry": entry, "layout": "bhsd" if layout == "bhsd" else "bshd"}
        found.append(Alone(rows, given))
    return found


def _rows(extent: Extents, entry: int) -> slice:
    return slice(int(extent.first[entry]), int(extent.first[entry] + extent.length[entry]))


def _most(options: dict, side: str) -> int | None:
    """The rows of a sequence that a bias or a mask has, at most."""
    axis, (row, column, _) = -2 if side == "q" else -1, options.get("origin") or (0, 0, 0)
    shapes = (np.shape(options[name]) for name in _OF_PLACES if options.get(name) is not None)
    sizes = [shape[axis] for shape in shapes if len(shape) >= -axis and shape[axis] != 1]
    return min(sizes) - (row if side == "q" else column) if sizes else None


def _entries(q, options: dict, layout: str) -> int:
    if layout != PACKED:
        return q.shape[0] if np.ndim(q) == 4 else 1
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqlens_q"):
        if options.get(name) is not None:
            return len(options[name]) - name.startswith("cu")
    raise ValueError("packed sequences need cu_seqlens_q")


def _rows_of_options(options: dict, entry: int, sizes: tuple[int, int]) -> dict[str, tuple]:
    """Of options with a part for each sequence the index of this one's."""
    rows, slopes = {}, options.get("alibi_slopes")
    if slopes is not None and np.ndim(slopes) == 2:
        rows["alibi_slopes"] = (entry,)
    for name in _OF_PLACES:
        if options.get(name) is None:
            continue
        shape = np.shape(options[name])
        parts = slice(entry, entry + 1), slice(None), *(slice(n) for n in sizes)
        own = zip(shape, parts[4 - len(shape) :], strict=True)
        rows[name] = tuple(slice(None) if n == 1 else part for n, part in own)
    return rows
