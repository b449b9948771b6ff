"""Decoding over a cache whose tokens are spread over ranks, and whose pages are whose."""

import math
from typing import Any

from numflash.api.attention import attention
from numflash.api.kvcache import attention_with_kvcache
from numflash.api.merge import merge_partials
from numflash.distributed.agreement import Shard, agree
from numflash.distributed.arrays import Arrays
from numflash.problem.options import expect_bool, expect_one_of
from numflash.runtime.errors import UnsupportedError

_NO_POSITIONS = (
    "a rank knows the rows of its shard, not the positions of its tokens. A mask_mod or score_mod "
    "that computes them (numflash.distributed.shard_positions) can say the same"
)
_REFUSED = {
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "causal_align": "bottom_right",
    "shift": 0,
    "origin": None,
    "bias": None,
    "mask": None,
    "dropout_p": 0.0,
}
"""Options of attention that a shard has no positions for, and what says that they are off."""
_SHARED = "softmax_scale", "softcap", "precision"
"""Options that all ranks share; functions, aux and configs may be a rank's own."""


def decode(
    q,
    k_shard,
    v_shard,
    *,
    comm,
    seqlens_k=None,
    page_table=None,
    k_descale=None,
    v_descale=None,
    sinks=None,
    scatter_heads: bool = False,
    return_lse: bool = False,
    out_dtype: str | None = None,
    **options,
):
    """Attention of new queries over a cache whose tokens are spread over ranks.

    Each rank attends to its own tokens; the parts, float32 with their lse, are gathered in one
    message and merged in rank order on every rank, which gives all ranks the same bits.

    Args:
        q: (batch, tokens, heads, head_dim), float16, bfloat16 or float32, the same on all ranks.
            Every query sees every key of its sequence.
        k_shard: keys of this rank: (batch, rows, heads_kv, head_dim), or with page_table
            (pages, page_size, heads_kv, head_dim). rows may be 0, and another number on each rank.
        v_shard: likewise, with head_dim_v. Both may be e4m3 codes, as of
            `numflash.attention_with_kvcache`.
        comm: a communicator; each rank calls this with its own.
        seqlens_k: (batch,) int32 on the device: rows of each sequence that this rank has, of 0 on;
            None, without page_table, is all rows. `shard_lengths` computes them.
        page_table: (batch, pages of a sequence on this rank) int32 on the device: row r of a
            sequence is row r % page_size of page page_table[b, r // page_size]. Needs seqlens_k.
        k_descale, v_descale: as of `numflash.attention_with_kvcache`, of this rank's codes.
        sinks: (heads,) float32, the same on all ranks; they count once.
        scatter_heads: each rank gets only heads rank * h to (rank + 1) * h, h = heads / ranks: an
            exchange takes the place of the gathering, and sends that many times less.
        return_lse: also return the log-sum-exp.
        out_dtype: "float32" leaves the result in float32; None is the dtype of q.
        options: of `numflash.attention`, the same on all ranks: softmax_scale, softcap, score_mod,
            mask_mod, aux, precision, config, batch_invariant, num_splits. kv_idx, of score_mod and
            mask_mod, is the row of the shard; `shard_positions` gives the token's position.

    Returns:
        out: (batch, tokens, heads or heads / ranks, head_dim_v). A sequence without a key on any
            rank gives 0.
        lse: with return_lse, (batch, heads or heads / ranks, tokens) float32; -inf without a key.

    Raises:
        TypeError, ValueError: as `numflash.attention_with_kvcache`; ValueError: heads that do not
            divide, or ranks that call it with different shapes or options (on all ranks, before
            anything is sent).
        UnsupportedError: options that need positions (window_size, alibi_slopes, causal with more
            than one query, ...), and as `numflash.attention_with_kvcache`.
        CommunicatorError: a rank is gone, or did not come within the group's deadline.

    Of B batch entries, T queries and h heads (all, or with scatter_heads heads / ranks) a rank
    sends (ranks - 1) * B * T * h * (head_dim_v + 1) * 4 bytes, whatever the number of keys.
    Nothing waits on the host, but for what comm waits for.

    Example:
        >>> import numpy as np
        >>> from numflash.distributed import decode, local, shard_lengths, token_owner
        >>> (comm,), page_size = local(1), 16
        >>> caches = np.zeros((2, 4, page_size, 1, 16), "float16")  # of keys and of values
        >>> table = np.array([[2, 0]], "int32")  # page p of the sequence: rank p % comm.size
        >>> rng = np.random.default_rng(0)
        >>> for seqlen in range(18):
        ...     q, k, v = rng.standard_normal((3, 1, 1, 1, 16)).astype("float16")
        ...     if token_owner(seqlen, page_size, comm.size) == comm.rank:
        ...         row = shard_lengths(seqlen, page_size, comm.rank, comm.size)
        ...         page = table[0, row // page_size]
        ...         caches[0, page, row % page_size], caches[1, page, row % page_size] = k, v
        >>> mine = shard_lengths(np.array([18], "int32"), page_size, comm.rank, comm.size)
        >>> out = decode(q, *caches, comm=comm, seqlens_k=mine, page_table=table)
        >>> out.shape
        (1, 1, 1, 16)
    """
    of_shard = {"seqlens_k": seqlens_k, "page_table": page_table}
    of_shard |= {"k_descale": k_descale, "v_descale": v_descale, "sinks": sinks}

    def compute() -> tuple[Any, Any, str]:
        expect_bool("scatter_heads", scatter_heads)
        asked = _checked(q, k_shard, options, of_shard, comm.size if scatter_heads else 1)
        of_q = Arrays.of(q, "q").dtype_of(q)
        if out_dtype is not None:
            expect_one_of("out_dtype", out_dtype, (of_q, "float32"))
        part = _part(q, k_shard, v_shard, of_shard, asked, comm.rank)
        return *part, out_dtype or of_q

    axis = 1 if page_table is None else 0
    shared = {"q": q, "k_shard": Shard(k_shard, axis), "v_shard": Shard(v_shard, axis)}
    shared |= {"sinks": sinks, "scatter_heads": scatter_heads, "out_dtype": out_dtype}
    shared |= {name: options.get(name) for name in _SHARED}
    # Attention to the shard is among the checks: what it refuses, all ranks raise.
    out, lse, dtype = agree(comm, "decode", shared, compute)
    groups = comm.size if scatter_heads else 1
    mine = _packed(out, lse, groups)
    if scatter_heads:
        parts = _exchanged(mine, comm)
    else:
        parts = comm.all_gather(mine[0], "decoding, parts of all heads")
    batch, tokens, heads, head_dim_v = out.shape
    shape = batch, tokens, heads // groups, head_dim_v
    result = _merged(parts, shape, dtype)
    return result if return_lse else result[0]


def token_owner(position, page_size: int, ranks: int):
    """The rank that has the token at a position, and appends it: page p is rank p % ranks's.

    Args:
        position: of the token in its sequence; the next token's is the sequence's length. An
            integer, or an array of them, also on the device.
        page_size: tokens of a page.
        ranks: how many.

    Example:
        >>> from numflash.distributed import token_owner
        >>> [token_owner(position, page_size=2, ranks=3) for position in range(8)]
        [0, 0, 1, 1, 2, 2, 0, 0]
    """
    return position // page_size % ranks


def shard_lengths(seqlens, page_size: int, rank: int, ranks: int):
    """How many tokens of sequences a rank has, where page p is rank p % ranks's.

    On its owner it is also the row at which the next token is appended.

    Args:
        seqlens: of the whole sequences: an integer, or an array of them, also on the device, whose
            kind and dtype the result has.
        page_size: tokens of a page.
        rank: whose.
        ranks: how many.

    Example:
        >>> from numflash.distributed import shard_lengths
        >>> [shard_lengths(9, page_size=2, rank=rank, ranks=3) for rank in range(3)]
        [4, 3, 2]
    """
    pages = seqlens // page_size
    whole = (pages + (ranks - 1 - rank)) // ranks * page_size
    return whole + (pages % ranks == rank) * (seqlens % page_size)


def shard_positions(rows, page_size: int, rank: int, ranks: int):
    """The positions in their sequence of rows of a rank's shard; page p is rank p % ranks's.

    Args:
        rows: of the shard, from a sequence's first on: an integer, an array, or the kv_idx of a
            mask_mod or score_mod.
        page_size: tokens of a page.
        rank: whose.
        ranks: how many.

    Example:
        >>> from numflash.distributed import shard_positions
        >>> [shard_positions(row, page_size=2, rank=1, ranks=3) for row in range(4)]
        [2, 3, 8, 9]
    """
    return (rows // page_size * ranks + rank) * page_size + rows % page_size


def _checked(q, k_shard, options, of_shard, groups: int) -> dict[str, Any]:
    """The options that attention gets. Raises TypeError, ValueError, UnsupportedError."""
    options = dict(options)
    if len(q.shape) != 4 or len(k_shard.shape) != 4:
        raise ValueError(
            "q and k_shard must have 4 dimensions (batch, tokens, heads, head_dim), got shapes "
            f"{tuple(q.shape)} and {tuple(k_shard.shape)}"
        )
    tokens, heads = q.shape[1:3]
    for name, off in _REFUSED.items():
        given = options.pop(name, off)
        if name == "window_size" and isinstance(given, tuple | list):
            given = tuple(-1 if side is None else side for side in given)
        if given is not None and (off is None or given != off):
            raise UnsupportedError(f"decode has no {name}: {_NO_POSITIONS}")
    if options.pop("causal", False) and tokens > 1:
        raise UnsupportedError(f"decode has no causal with {tokens} queries: {_NO_POSITIONS}")
    if of_shard["page_table"] is not None and of_shard["seqlens_k"] is None:
        raise ValueError("page_table needs seqlens_k: how many rows each sequence has here")
    if heads % groups:
        raise ValueError(f"scatter_heads gives each of {groups} ranks as many heads, got {heads}")
    return options


def _part(q, k_shard, v_shard, of_shard, options, rank: int) -> tuple[Any, Any]:
    """Attention to this rank's tokens, float32, and its lse."""
    more = options | {"return_lse": True}
    if Arrays.of(q, "q").dtype_of(q) != "float32":
        more["out_dtype"] = "float32"
    if of_shard["sinks"] is not None and rank == 0:
        more["sinks"] = of_shard["sinks"]
    of_cache = {x: of_shard[x] for x in ("page_table", "k_descale", "v_descale")}
    seqlens_k = of_shard["seqlens_k"]
    if seqlens_k is None and all(x is None for x in of_cache.values()):
        return attention(q, k_shard, v_shard, **more)
    lengths = k_shard.shape[1] if seqlens_k is None else seqlens_k
    return attention_with_kvcache(q, k_shard, v_shard, cache_seqlens=lengths, **of_cache, **more)


def _packed(out, lse, groups: int):
    """(groups, numbers): for each group of heads its part of out, and its lse behind it."""
    batch, tokens, heads, head_dim_v = out.shape
    each = heads // groups
    rows = batch * tokens * each
    whole = Arrays.of(out, "out").empty((groups, rows * (head_dim_v + 1)), "float32")
    outs, lses = _views(whole, (batch, tokens, each, head_dim_v))
    for group in range(groups):
        mine = slice(group * each, (group + 1) * each)
        outs[group][...] = out[:, :, mine]
        lses[group][...] = lse[:, mine]
    return whole


def _views(parts, shape: tuple[int, ...]) -> tuple[list, list]:
    """out, of a shape, and lse of each of some parts."""
    batch, tokens, heads, _ = shape
    split = math.prod(shape)
    outs = [part[:split].reshape(shape) for part in parts]
    lses = [part[split:].reshape(batch, heads, tokens) for part in parts]
    return outs, lses


def _exchanged(mine, comm):
    """(ranks, numbers): what each rank has of this rank's heads."""
    arrays = Arrays.of(mine, "parts")
    parts = arrays.empty(tuple(mine.shape), "float32")
    parts[comm.rank] = mine[comm.rank]
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sends = [(arrays.as_bytes(mine[rank]), rank) for rank in others]
    receives = [(arrays.as_bytes(parts[rank]), rank) for rank in others]
    comm.exchange(sends, receives, "decoding, parts of each rank's heads")()
    return parts


def _merged(parts, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    """out in a dtype, and lse, of parts in rank order."""
    outs, lses = _views(parts, shape)
    return merge_partials(outs, lses, dtype=dtype)
