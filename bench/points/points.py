"""Points to measure: the FlashAttention papers' grid, decoding and GPT-2 medium.

The grid is that of `benchmarks/benchmark_flash_attention.py` of the papers: 16k tokens in all,
hidden size 2,048, seqlen 512 to 16k; so batch = 16384 // seqlen and heads = 2048 // head_dim.
Sequences that lie one after another have those lengths, or are drawn from a long-tailed
distribution, as the tuner's are; decoding is over caches of many sizes, in pages or not.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import prod

from tuner.lengths import long_tailed

TOKENS = 16384
HIDDEN = 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")
DIRECTIONS = ("forward", "backward")

# Points that a short visit to a GPU measures, and a long one measures first.
QUICK_SEQLENS = (1024, 4096, 16384)
QUICK_HEAD_DIMS = (64, 128)
QUICK_DTYPES = ("bfloat16",)

_DECODE_KEYS = 65536
KVCACHE, VARLEN = "kvcache", "varlen"
"""Kinds of points: queries over a cache, and sequences that lie one after another."""
CACHE_QUERIES = (1, 4, 16)
CACHE_KEYS = (1024, 4096, 16384, 65536, 131072)
CACHE_BATCHES = (1, 4, 16, 64)
PAGE_SIZES = (0, 16, 256)
"""Keys of a page; 0: the cache has none."""
_MOST_CACHE_BYTES = 2**34
_DRAWN = ((16, 1024), (64, 256), (300, 512))
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Point:
    """One call that every method is timed on.

    Attributes:
        direction: "forward" or "backward".
        kind: "grid", "decode" (one query token), "gpt2-medium" (the first paper's table),
            KVCACHE or VARLEN.
        dtype: of the inputs.
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim: sizes.
        causal: each query sees the keys up to its own position.
        page_size: of a KVCACHE, keys of a page; 0: it has none.
        draw: of VARLEN, the seed of the lengths, whose mean is seqlen_q; None: all are equal.
    """

    direction: str
    kind: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool
    page_size: int = 0
    draw: int | None = None

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {self.direction!r}")
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                f"num_heads_kv = {self.num_heads_kv} must divide num_heads_q = {self.num_heads_q}"
            )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def is_packed(self) -> bool:
        """Whether arrays are (tokens, heads, head_dim)."""
        return self.kind == VARLEN

    @cached_property
    def seqlens(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        if self.draw is None:
            return (self.seqlen_k,) * self.batch
        return long_tailed(self.batch, self.seqlen_k, self.draw)

    @property
    def q_shape(self) -> tuple[int, ...]:
        """(batch, seqlen_q, num_heads_q, head_dim); packed (tokens, num_heads_q, head_dim)."""
        sizes = (sum(self.seqlens),) if self.is_packed else (self.batch, self.seqlen_q)
        return *sizes, self.num_heads_q, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """(batch, seqlen_k, num_heads_kv, head_dim); packed (tokens, num_heads_kv, head_dim)."""
        sizes = (sum(self.seqlens),) if self.is_packed else (self.batch, self.seqlen_k)
        return *sizes, self.num_heads_kv, self.head_dim

    def as_dict(self) -> dict:
        """The point as JSON holds it; without what only sequences and caches have."""
        found = asdict(self)
        defaults = {field.name: field.default for field in fields(self)}
        absent = [name for name in ("page_size", "draw") if found[name] == defaults[name]]
        return {name: value for name, value in found.items() if name not in absent}

    @classmethod
    def from_dict(cls, values: dict) -> "Point":
        """The inverse of `as_dict`; ignores what else a record says about the point."""
        known = [field.name for field in fields(cls) if field.name in values]
        return cls(**{name: values[name] for name in known})

    def __str__(self) -> str:
        heads = f"h{self.num_heads_q}"
        if self.group_size > 1:
            heads += f"/{self.num_heads_kv}"
        seqlen = f"s{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            seqlen += f"x{self.seqlen_k}"
        parts = [self.direction, self.dtype, f"b{self.batch}", seqlen, heads, f"d{self.head_dim}"]
        parts += ["causal"] * self.causal
        if self.page_size:
            parts.append(f"pages of {self.page_size}")
        if self.draw is not None:
            parts.append(f"long-tailed {self.draw}")
        return " ".join(parts)


def grid(
    direction: str,
    seqlens: tuple[int, ...] = SEQLENS,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    dtypes: tuple[str, ...] = DTYPES,
) -> list[Point]:
    """The papers' grid, those points first that a quick run keeps."""
    points = [
        Point(
            direction,
            "grid",
            dtype,
            TOKENS // seqlen,
            seqlen,
            seqlen,
            HIDDEN // head_dim,
            HIDDEN // head_dim,
            head_dim,
            causal,
        )
        for dtype in dtypes
        for head_dim in head_dims
        for causal in (False, True)
        for seqlen in seqlens
    ]
    return sorted(points, key=lambda point: not is_quick(point))


def is_quick(point: Point) -> bool:
    """Whether a quick run measures this point of the grid."""
    return (
        point.seqlen_q in QUICK_SEQLENS
        and point.head_dim in QUICK_HEAD_DIMS
        and point.dtype in QUICK_DTYPES
    )


def decode() -> list[Point]:
    """One query token and 64k keys: 16 heads, and 32 query heads that share 8."""
    return [
        Point("forward", "decode", "bfloat16", 1, 1, _DECODE_KEYS, heads_q, heads_kv, 128, False)
        for heads_q, heads_kv in ((16, 16), (32, 8))
    ]


def caches(quick: bool = False) -> list[Point]:
    """Queries over a cache, bfloat16, 32 heads on 8: what fits 16 GiB; quick ones first.

    Several queries are those of a sequence's last tokens, with their causal mask.
    """
    found = [
        Point(
            "forward",
            KVCACHE,
            "bfloat16",
            batch,
            queries,
            keys,
            32,
            8,
            128,
            queries > 1,
            page_size,
        )
        for page_size in PAGE_SIZES
        for queries in CACHE_QUERIES
        for batch in CACHE_BATCHES
        for keys in CACHE_KEYS
    ]
    found = [p for p in found if 2 * p.dtype_bytes * prod(p.kv_shape) <= _MOST_CACHE_BYTES]
    return _quick_ones_first(found, _is_quick_cache, quick)


def _quick_ones_first(found: list[Point], is_quick: Callable, alone: bool) -> list[Point]:
    """The quick points before the others, or without them."""
    ordered = sorted(found, key=lambda point: not is_quick(point))
    return [point for point in ordered if is_quick(point)] if alone else ordered


def _is_quick_cache(point: Point) -> bool:
    sizes = (point.batch, point.seqlen_k) in ((1, 65536), (16, 4096), (64, 4096))
    return sizes and point.seqlen_q in (1, 4)


def sequences(direction: str, quick: bool = False) -> list[Point]:
    """Sequences one after another, causal: the papers' lengths, and long-tailed draws.

    bfloat16, head_dim 128 and 64, quick ones first.
    """
    found = []
    for head_dim in QUICK_HEAD_DIMS:
        alike = grid(direction, SEQLENS, (head_dim,), QUICK_DTYPES)
        alike = [replace(point, kind=VARLEN) for point in alike if point.causal]
        drawn = [
            replace(alike[0], batch=batch, seqlen_q=mean, seqlen_k=mean, draw=draw)
            for batch, mean in _DRAWN
            for draw in (0, 1)
        ]
        found += [*alike, *drawn]
    return _quick_ones_first(found, _is_quick_sequence, quick)


def _is_quick_sequence(point: Point) -> bool:
    if point.head_dim != 128:
        return False
    return point.seqlen_q in (1024, 4096) if point.draw is None else point.draw == 0


def gpt2_medium(direction: str) -> Point:
    """The shape of the table in the first FlashAttention paper (Fig. 2, left): no mask."""
    return Point(direction, "gpt2-medium", "float16", 64, 1024, 1024, 16, 16, 64, False)


def plan(direction: str, quick: bool, seqlens=None, head_dims=None, dtypes=None) -> list[Point]:
    """All points of a run, in the order in which they are measured.

    Args:
        direction: "forward" or "backward".
        quick: only the quick part of the grid, and one decode point.
        seqlens, head_dims, dtypes: what to keep of the grid; None keeps what `quick` leaves.
    """
    points = grid(
        direction,
        tuple(seqlens or (QUICK_SEQLENS if quick else SEQLENS)),
        tuple(head_dims or (QUICK_HEAD_DIMS if quick else HEAD_DIMS)),
        tuple(dtypes or (QUICK_DTYPES if quick else DTYPES)),
    )
    extra = [gpt2_medium(direction), *(decode() if direction == "forward" else [])]
    # After the quick points, so that a run that is cut short has them too.
    at = sum(is_quick(point) for point in points)
    return [*points[:at], *extra, *points[at:]]
