"""The work of a point: FLOPs, exponentials, bytes, and the time that no kernel can beat.

FLOPs are counted as the FlashAttention papers do (`hopper/benchmark_attn.py`): two products of
2 seqlen_q avg_seqlen_k head_dim each in the forward, where a causal mask halves avg_seqlen_k, and
2.5 times that in the backward. They are what the problem asks for, not what a kernel executes;
`bench.studies.schedule` counts the latter.
"""

from dataclasses import dataclass
from math import prod

from bench.points.points import Point

BACKWARD_FACTOR = 2.5
EXPONENTIALS_PER_CLOCK_PER_SM = 16
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Ceilings:
    """The device's rates in the same run, and its clock.

    Attributes:
        matmul_tflops: of a large matrix product.
        copy_gbps: of a large copy, bytes read plus bytes written, in 1e9 per second.
        num_sms: multiprocessors.
        sm_clock_mhz: the highest clock of the SMs; None if nobody knows.
    """

    matmul_tflops: float
    copy_gbps: float
    num_sms: int
    sm_clock_mhz: float | None


def average_keys(point: Point) -> float:
    """Keys that a query sees on average, by the papers' convention: half of them if causal."""
    if not point.causal:
        return point.seqlen_k
    return (max(0, point.seqlen_k - point.seqlen_q) + point.seqlen_k) / 2


def scores(point: Point) -> float:
    """Scores that some query sees, over all heads."""
    if point.is_packed:
        # Each token of a sequence sees half of it with a causal mask, as in `average_keys`.
        squares = sum(n * n for n in point.seqlens)
        return point.num_heads_q * squares / (2 if point.causal else 1)
    return point.batch * point.num_heads_q * point.seqlen_q * average_keys(point)


def flops(point: Point) -> float:
    """Floating-point operations of a point."""
    forward = 4 * scores(point) * point.head_dim
    return forward * (BACKWARD_FACTOR if point.direction == "backward" else 1)


def exponentials(point: Point) -> float:
    """Exponentials: one for each score; the backward computes each once more."""
    return scores(point)


def min_bytes(point: Point, operand_bytes: int | None = None) -> int:
    """Bytes if every input is read once and every result written once.

    Forward: Q, K, V, and O, lse. Backward: Q, K, V, O, dO, lse, and dQ, dK, dV. `operand_bytes` is
    the size of an element of Q, K and V in a forward on other operands than the point's.
    """
    queries = point.batch * point.seqlen_q * point.num_heads_q * point.head_dim
    keys = point.batch * point.seqlen_k * point.num_heads_kv * point.head_dim
    statistics = point.batch * point.num_heads_q * point.seqlen_q * _FLOAT_BYTES
    if point.direction == "forward":
        operand_bytes = operand_bytes or point.dtype_bytes
        read = (queries + 2 * keys) * operand_bytes
        return read + queries * point.dtype_bytes + statistics
    return (4 * queries + 4 * keys) * point.dtype_bytes + statistics


def cache_bytes(point: Point) -> int:
    """Bytes of K and V."""
    return 2 * point.dtype_bytes * prod(point.kv_shape)


def share_of_copy(point: Point, milliseconds: float, ceilings: Ceilings) -> float:
    """The bytes of K and V a second, as a share of what a copy moves in the same run."""
    return cache_bytes(point) / milliseconds / 1e6 / ceilings.copy_gbps


def floor_ms(point: Point, ceilings: Ceilings) -> dict[str, float]:
    """The time that each resource alone would take, in milliseconds, and the largest: "floor"."""
    parts = {
        "matmul": flops(point) / ceilings.matmul_tflops / 1e9,
        "bytes": min_bytes(point) / ceilings.copy_gbps / 1e6,
    }
    if ceilings.sm_clock_mhz is not None:
        per_ms = EXPONENTIALS_PER_CLOCK_PER_SM * ceilings.num_sms * ceilings.sm_clock_mhz * 1e3
        parts["exponentials"] = exponentials(point) / per_ms
    return {**parts, "floor": max(parts.values())}


def tflops(point: Point, milliseconds: float) -> float:
    """The speed of a call that took this long, in 1e12 FLOPs per second."""
    return flops(point) / milliseconds / 1e9


def gbps(point: Point, milliseconds: float, operand_bytes: int | None = None) -> float:
    """The bandwidth of a call that took this long, in 1e9 bytes per second; see `min_bytes`."""
    return min_bytes(point, operand_bytes) / milliseconds / 1e6
