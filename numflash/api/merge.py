"""`merge_partials`, `merge_onto`: attention over all keys from attention over parts of them."""

from numflash.calls.merging import Merge, MergeOnto, parts_of
from numflash.calls.ready import remembered, run
from numflash.runtime.arrays import library_of


def merge_partials(outs, lses, *, layout: str = "bshd", dtype: str | None = None, stream=None):
    """Attention over all keys, from attention over disjoint parts of them.

        lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

    The step that joins what several GPUs, or several calls, have computed of the same queries:
    ring attention, context parallelism, a prefix that is cached apart.

    Args:
        outs: the parts' results in a list, tuple or array: each as `attention` returns it,
            (batch, seqlen_q, num_heads_q, head_dim_v), of float16, bfloat16 or float32. With
            layout "bhsd" the two middle axes are swapped. Three dimensions mean one batch entry,
            two one head. Any strides.
        lses: as many, each as `attention(..., return_lse=True)` returns it,
            (batch, num_heads_q, seqlen_q) float32, -inf where a query sees none of a part's keys.
        layout: "bshd" or "bhsd", of outs and the result.
        dtype: of the result; None is that of outs.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of outs.

    Returns:
        out, lse: as of one call of `attention` that sees the keys of all parts. A query that sees
            no key in any of them gives 0 and -inf. The same parts in the same order give the same
            bits.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: no parts, not as many lses as outs, shapes that do not fit together.
        UnsupportedError: head_dim_v above 256.

    Parts are copied next to each other as float32 first, unless outs and lses are contiguous
    float32 arrays with head_dim_v a multiple of 32 and layout "bshd". The kernel is enqueued, not
    waited for. `merge_onto` merges one part in place.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 1, 16)).astype("float16")
        >>> q, halves = q[:, :4], (slice(0, 16), slice(16, 32))
        >>> parts = [numflash.attention(q, k[:, s], v[:, s], return_lse=True) for s in halves]
        >>> outs, lses = zip(*parts)
        >>> out, lse = numflash.merge_partials(outs, lses)
        >>> bool(np.allclose(out, numflash.attention(q, k, v), atol=2e-3))
        True

    Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding.
    """
    if not hasattr(outs, "__len__") or not hasattr(lses, "__len__"):
        kinds = type(outs).__name__, type(lses).__name__
        raise TypeError(
            f"outs and lses must be lists or arrays of parts, got {kinds[0]}, {kinds[1]}"
        )
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must have as many parts, one or more, got {len(outs)} and {len(lses)}"
        )
    are_stacked = not isinstance(outs, list | tuple) and not isinstance(lses, list | tuple)
    if are_stacked:
        arrays = {"outs": outs, "lses": lses}
    else:
        arrays = {f"outs[{i}]": part for i, part in enumerate(outs)}
        arrays |= {f"lses[{i}]": part for i, part in enumerate(lses)}
    key, operands = (Merge, are_stacked, layout, dtype), {}
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key = *key, identity

    def make() -> Merge:
        views = [library_of(array, name).view(array, name) for name, array in arrays.items()]
        if are_stacked:
            return Merge(*map(parts_of, views), layout, dtype, stacked=tuple(views))
        return Merge(views[: len(outs)], views[len(outs) :], layout, dtype)

    out, lse = run(remembered(key, make), arrays, operands, stream)
    return out, lse


def merge_onto(out, lse, part, part_lse, *, layout: str = "bshd", stream=None) -> None:
    """Merge a part of attention onto what other keys gave, in place.

        lse' = log(exp(lse) + exp(part_lse))
        out' = exp(lse - lse') out + exp(part_lse - lse') part

    What `merge_partials` does with two parts, in one pass over memory and without more of it: the
    step of a ring, where parts come one after the other.

    Args:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) float32, with contiguous rows; written. It
            may be some rows of a larger array. With layout "bhsd" the two middle axes are
            swapped. Three dimensions mean one batch entry, two one head.
        lse: (batch, num_heads_q, seqlen_q) float32, with a contiguous last axis; written. -inf
            where a query has seen no key yet: what out holds there does not matter.
        part: shaped like out, of float16, bfloat16 or float32, with contiguous rows, in memory of
            its own: attention of the same queries over other keys.
        part_lse: shaped like lse, float32, any strides: -inf where a query sees none of them.
        layout: "bshd" or "bhsd", of out and part.
        stream: a CUDA stream, or its address, to launch on; None is the current one of the array
            library of out.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: shapes that do not fit together, an array that cannot be written, rows that
            are not contiguous, a part that shares memory with out.
        UnsupportedError: head_dim_v above 256.

    A query that sees no key so far and none of the part's gets 0 and -inf. Where a part weighs
    nothing its rows are not read. Nothing is allocated. The kernel is enqueued, not waited for.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 1, 16)).astype("float32")
        >>> out, lse = numflash.attention(q, k[:, :16], v[:, :16], return_lse=True)
        >>> part = numflash.attention(q, k[:, 16:], v[:, 16:], return_lse=True)
        >>> numflash.merge_onto(out, lse, *part)
        >>> bool(np.allclose(out, numflash.attention(q, k, v), atol=1e-6))
        True
    """
    arrays = {"out": out, "lse": lse, "part": part, "part_lse": part_lse}
    key, operands = (MergeOnto, layout), {}
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key = *key, identity

    def make() -> MergeOnto:
        views = {name: library_of(array, name).view(array, name) for name, array in arrays.items()}
        return MergeOnto(views, layout)

    run(remembered(key, make), arrays, operands, stream)
