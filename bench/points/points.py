"""Points to measure: the FlashAttention papers' grid, decoding and GPT-2 medium.

The grid is that of `benchmarks/benchmark_flash_attention.py` of the papers: 16k tokens in all,
hidden size 2,048, seqlen 512 to 16k; so batch = 16384 // seqlen and heads = 2048 // head_dim.
"""

from dataclasses import asdict, dataclass, fields

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
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Point:
    """One call that every method is timed on.

    Attributes:
        direction: "forward" or "backward".
        kind: "grid", "decode" (one query token) or "gpt2-medium" (the first paper's table).
        dtype: of the inputs.
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim: sizes.
        causal: each query sees the keys up to its own position.
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
    def q_shape(self) -> tuple[int, ...]:
        """(batch, seqlen_q, num_heads_q, head_dim)."""
        return self.batch, self.seqlen_q, self.num_heads_q, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """(batch, seqlen_k, num_heads_kv, head_dim)."""
        return self.batch, self.seqlen_k, self.num_heads_kv, self.head_dim

    def as_dict(self) -> dict:
        """The point as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Point":
        """The inverse of `as_dict`; ignores what else a record says about the point."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        heads = f"h{self.num_heads_q}"
        if self.group_size > 1:
            heads += f"/{self.num_heads_kv}"
        seqlen = f"s{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            seqlen += f"x{self.seqlen_k}"
        parts = [self.direction, self.dtype, f"b{self.batch}", seqlen, heads, f"d{self.head_dim}"]
        return " ".join([*parts, *(["causal"] if self.causal else [])])


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
