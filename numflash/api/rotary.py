"""`apply_rotary` and `rotary_tables`: rotary position embeddings."""

from numbers import Integral

from numflash.calls.ready import remembered, run
from numflash.calls.rotary import Rotation
from numflash.problem.rotary import Scaling, make_tables
from numflash.runtime.arrays import (
    current_array,
    library_of,
    on_stream,
    stream_address,
)
from numflash.runtime.torch_tensors import without_gradient


def apply_rotary(
    x,
    cos,
    sin,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    offsets=0,
    cu_seqlens=None,
    layout: str = "bshd",
    out=None,
    stream=None,
):
    """Rows of x, as of queries or keys, rotated by the angles of their positions.

        (a, b) -> (a cos - b sin, b cos + a sin)     for each pair (a, b) of columns

    Args:
        x: (batch, seqlen, heads, head_dim), float16, bfloat16 or float32. With layout "bhsd" the
            two middle axes are swapped. Three dimensions mean one batch entry, two one head.
            Any strides; only a last axis that is not contiguous is copied.
        cos, sin: (positions, rotary_dim / 2), float32 or the dtype of x, as `rotary_tables` makes
            them. The first rotary_dim columns are rotated, at most head_dim; others are copied.
        interleaved: which columns are a pair: 2 c and 2 c + 1 (GPT-J) if True, c and
            c + rotary_dim / 2 (GPT-NeoX, Llama) if False.
        conjugate: rotate by the negative angles. This is the gradient: with `dout` of the result,
            `apply_rotary(dout, cos, sin, conjugate=True)`, and the same other options, is that
            of x. It is the inverse, too, unless a scaling makes the tables larger than 1.
        offsets: the position of each sequence's first token: an integer for all, or int32
            (batch,) on the device, one for each sequence.
        cu_seqlens: int32 (sequences + 1,) on the device: x is packed, (tokens, heads, head_dim),
            and sequence n has the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1, at the positions
            offsets[n] and following.
        layout: "bshd" or "bhsd", of x and out.
        out: an array to write the result to, which may be x itself, with contiguous rows; it must
            not overlap an input in another way.
        stream: a CUDA stream, or its address, to allocate and launch on; None is the current one
            of the array library of x.

    Returns:
        An array like x, computed in float32 and rounded once; `out` if given. A token whose
        position the tables do not have, or that is in no sequence, is copied as it is.

    Raises:
        TypeError: an argument of a wrong type or dtype, or not on a CUDA device.
        ValueError: shapes that do not fit, more columns of cos than half of head_dim, an integer
            offset with which the tables are too short, an `out` that cannot be written.
        UnsupportedError: head_dim above 256.

    Memory: that of the result, none with `out`.

    One kernel is enqueued, not waited for. It never reads outside the arrays, whatever lies in
    offsets and cu_seqlens, which are read on the device: a captured CUDA graph may be launched
    again with others. An integer offset that differs from call to call compiles nothing.

    Source: RoFormer, arXiv 2104.09864; the conventions are those of flash-attn's
    `apply_rotary_emb`.

    Example:
        >>> import numpy as np, numflash
        >>> q = np.random.default_rng(0).standard_normal((1, 16, 2, 32)).astype("float32")
        >>> cos, sin = numflash.rotary_tables(16, 32)
        >>> rotated = numflash.apply_rotary(q, cos, sin)
        >>> bool(np.allclose(numflash.apply_rotary(rotated, cos, sin, conjugate=True), q))
        True
    """
    arrays, offset = {"x": x, "cos": cos, "sin": sin}, 0
    if cu_seqlens is not None:
        arrays["cu_seqlens"] = cu_seqlens
    if isinstance(offsets, Integral):
        if isinstance(offsets, bool):
            raise TypeError(f"offsets must be an integer or an int32 array, got {offsets!r}")
        offset = int(offsets)
    else:
        arrays["offsets"] = offsets
    if out is not None:
        arrays["out"] = out
    if stream is not None:
        stream = stream_address(stream)
    options = interleaved, conjugate, layout
    key, operands = (Rotation, *options, type(interleaved), type(conjugate)), {}
    for name, array in arrays.items():
        operands[name], identity = library_of(array, name).glance(array)
        key = *key, name, identity

    def make() -> Rotation:
        views = {name: library_of(array, name).view(array, name) for name, array in arrays.items()}
        return Rotation(views, *options, offset)

    ready = remembered(key, make)
    made = run(ready, arrays, operands | {"offset": offset}, stream)
    return made[0] if made else out


def rotary_tables(
    seqlen: int,
    rotary_dim: int,
    base: float = 10000.0,
    *,
    scaling: Scaling | None = None,
    dtype: str = "float32",
    like=None,
    stream=None,
):
    """Cosines and sines of the angles of positions, as `apply_rotary` takes them.

        angle(position, pair) = position * base ** (-2 pair / rotary_dim)

    Args:
        seqlen: positions, from 0 on.
        rotary_dim: columns that are rotated, even, 2 to 256.
        base: above 1; "theta" of many models.
        scaling: how a model goes beyond the length that it was trained for: None,
            `LinearScaling`, `YarnScaling` or `Llama3Scaling`.
        dtype: "float32", "float16" or "bfloat16". In 16 bits a cosine is 2 ** -9 or less wrong,
            whatever the position.
        like: an array, as q, whose device and library the tables have; None: PyTorch's or CuPy's
            current device.
        stream: a CUDA stream, or its address, to allocate and copy on; None is the current one of
            that library.

    Returns:
        cos, sin: (seqlen, rotary_dim / 2). Computed in float64 on the host, rounded and copied:
        the angles of positions beyond 2 ** 17 are as exact as those before. YaRN's factor of
        scores is in both.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an odd rotary_dim, numbers out of range.
        UnsupportedError: rotary_dim above 256; no array library.

    Source: RoFormer, arXiv 2104.09864.

    Example:
        >>> import numflash
        >>> cos, sin = numflash.rotary_tables(16, 8)
        >>> cos.shape, float(cos[0, 0]), float(sin[0, 0])
        ((16, 4), 1.0, 0.0)
    """
    tables = make_tables(seqlen, rotary_dim, base, scaling, dtype)
    if like is None:
        like = current_array("rotary_tables needs like=, an array as q")
    like = without_gradient(like)
    library = library_of(like, "like")
    operand, _ = library.glance(like)
    device = library.view(like, "like").device

    def work(stream: int) -> tuple:
        made = [library.from_host(table, device) for table in tables]
        return tuple(library.hand_back(table, like, stream) for table in made)

    address = None if stream is None else stream_address(stream)
    return on_stream(work, address, device, {"like": like}, {"like": operand})
