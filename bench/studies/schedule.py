"""FLOPs and global-memory bytes of the kernels, counted from their tile schedule; and memory.

The count walks the blocks of a launch as the kernels do: which tiles a block visits under the
mask, which rows it loads, what it writes. Heads are not packed into one tile. FLOPs are those of
whole tiles, as executed, masked scores included. Bytes are those that blocks ask of global memory;
where neighbouring blocks find them in the L2, device memory sees fewer, and never fewer than
`work.min_bytes`. Nothing here is measured.

Standard attention is counted as its fewest steps in the input precision, each reading its operands
and writing its result once. Forward: S = Q K^T, P = softmax(S), O = P V. Backward from a stored P:
dV = P^T dO, dP = dO V^T, dS from P and dP, dQ = dS K, dK = dS^T Q.
"""

from dataclasses import dataclass, replace

import numpy as np

from bench.points import work
from bench.points.points import Point
from numflash.selection.layout import Tiling, tiles_seen

_FLOAT_BYTES = 4
# Passes over a matrix of seqlen_q x seqlen_k: write S, read S, write P, read P; and backward
# read P, write dP, read P, read dP, write dS, read dS twice.
STANDARD_PASSES = {"forward": 4, "backward": 7}
# Products of the matrix: S, O; and dV, dP, dQ, dK.
_STANDARD_PRODUCTS = {"forward": 2, "backward": 4}


@dataclass(frozen=True)
class Traffic:
    """The work of a launch: FLOPs, bytes read and bytes written."""

    flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes read and written."""
        return self.read_bytes + self.written_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.flops + other.flops,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
        )

    def times(self, count: int) -> "Traffic":
        """That many launches."""
        return Traffic(self.flops * count, self.read_bytes * count, self.written_bytes * count)


def forward(point: Point, tile_m: int, tile_n: int, num_splits: int = 1) -> Traffic:
    """The forward kernel; with num_splits > 1 also the one that joins the parts."""
    row = point.head_dim * point.dtype_bytes
    head = Traffic()
    for rows, tiles, _ in _walks(point, tile_m, tile_n):
        # Every part of a split loads its own copy of Q.
        parts = min(num_splits, max(tiles, 1))
        keys = min(tiles * tile_n, point.seqlen_k)
        head += Traffic(
            2 * _product(tile_m, tile_n, point) * tiles,
            parts * rows * row + 2 * keys * row,
            rows * (row + _FLOAT_BYTES),
        )
        if num_splits > 1:
            partial = num_splits * rows * (point.head_dim + 1) * _FLOAT_BYTES
            head += Traffic(0, partial, partial)
    return head.times(point.batch * point.num_heads_q)


def backward_dq(point: Point, tile_m: int, tile_n: int) -> Traffic:
    """The kernel of dQ: S, dP and dQ of the tiles that its rows see."""
    row = point.head_dim * point.dtype_bytes
    head = Traffic()
    for rows, tiles, _ in _walks(point, tile_m, tile_n):
        keys = min(tiles * tile_n, point.seqlen_k)
        head += Traffic(
            3 * _product(tile_m, tile_n, point) * tiles,
            2 * rows * row + 2 * keys * row + 2 * rows * _FLOAT_BYTES,
            rows * row,
        )
    return head.times(point.batch * point.num_heads_q)


def backward_dkdv(point: Point, tile_m: int, tile_n: int) -> Traffic:
    """The kernel of dK and dV: S, dP, dV and dK for every query head of a group."""
    row = point.head_dim * point.dtype_bytes
    head = Traffic()
    for keys, tiles, first_tile in _walks(point, tile_n, tile_m, by_keys=True):
        rows = max(0, point.seqlen_q - first_tile * tile_m)
        queries = Traffic(
            4 * _product(tile_m, tile_n, point) * tiles,
            2 * rows * row + 2 * rows * _FLOAT_BYTES,
            0,
        )
        head += queries.times(point.group_size) + Traffic(0, 2 * keys * row, 2 * keys * row)
    return head.times(point.batch * point.num_heads_kv)


def delta(point: Point) -> Traffic:
    """The kernel of delta = rowsum(O * dO)."""
    rows = point.batch * point.num_heads_q * point.seqlen_q
    row = point.head_dim * point.dtype_bytes
    return Traffic(2 * rows * point.head_dim, 2 * rows * row, rows * _FLOAT_BYTES)


def of_configs(point: Point, configs: dict) -> Traffic:
    """The traffic of a point with these configs, by family."""
    if point.direction == "forward":
        config = configs["forward"]
        splits = getattr(config, "num_splits", 1)
        return forward(point, config.tile_m, config.tile_n, splits)
    dq, dkdv = configs["backward-dq"], configs["backward-dkdv"]
    return (
        delta(point)
        + backward_dq(point, dq.tile_m, dq.tile_n)
        + backward_dkdv(point, dkdv.tile_m, dkdv.tile_n)
    )


def standard(point: Point) -> Traffic:
    """Standard attention in its fewest steps; a causal mask saves it nothing."""
    full = replace(point, causal=False)
    matrix = work.scores(full) * point.dtype_bytes
    queries = point.batch * point.seqlen_q * point.num_heads_q * point.head_dim
    keys = point.batch * point.seqlen_k * point.num_heads_kv * point.head_dim
    if point.direction == "forward":
        # Reads Q, K, V; writes O.
        inputs, outputs, matrix_writes = queries + 2 * keys, queries, 2
    else:
        # Reads dO, V; O and dO for delta; K, Q, dO once more; writes dQ, dK, dV.
        inputs, outputs, matrix_writes = 5 * queries + 2 * keys, queries + 2 * keys, 2
    matrix_reads = STANDARD_PASSES[point.direction] - matrix_writes
    flops = _STANDARD_PRODUCTS[point.direction] * 2 * work.scores(full) * point.head_dim
    return Traffic(
        int(flops),
        int(inputs * point.dtype_bytes + matrix_reads * matrix),
        int(outputs * point.dtype_bytes + matrix_writes * matrix),
    )


def memory_bytes(point: Point, num_splits: int = 1) -> int:
    """Device memory of a numflash call: results and workspace."""
    rows = point.batch * point.num_heads_q * point.seqlen_q
    keys = point.batch * point.num_heads_kv * point.seqlen_k
    statistics = rows * _FLOAT_BYTES  # lse, or delta
    if point.direction == "backward":
        return (rows + 2 * keys) * point.head_dim * point.dtype_bytes + statistics
    partial = num_splits * rows * (point.head_dim + 1) * _FLOAT_BYTES if num_splits > 1 else 0
    return rows * point.head_dim * point.dtype_bytes + statistics + partial


def standard_memory_bytes(point: Point) -> int:
    """Device memory of standard attention: results, and P; in a backward P and dP.

    Softmax in place: no implementation that has the matrix in memory can do with less.
    """
    matrix = point.batch * point.num_heads_q * point.seqlen_q * point.seqlen_k * point.dtype_bytes
    rows = point.batch * point.num_heads_q * point.seqlen_q * point.head_dim
    keys = point.batch * point.num_heads_kv * point.seqlen_k * point.head_dim
    if point.direction == "forward":
        return rows * point.dtype_bytes + matrix
    return (rows + 2 * keys) * point.dtype_bytes + 2 * matrix


def _walks(point: Point, row_tile: int, column_tile: int, by_keys: bool = False):
    """(rows, tiles that it walks over, the first of them) of each block of a head."""
    queries, keys = point.seqlen_q, point.seqlen_k
    lo, hi = -queries, keys - queries if point.causal else keys
    if by_keys:
        queries, keys, lo, hi = keys, queries, -hi, -lo
    seen = tiles_seen(Tiling(queries, keys, row_tile, column_tile, lo, hi))
    rows = np.minimum(row_tile, queries - np.arange(0, queries, row_tile))
    tiles = seen.end - seen.begin
    return zip(rows.tolist(), tiles.tolist(), seen.begin.tolist(), strict=True)


def _product(tile_m: int, tile_n: int, point: Point) -> int:
    """FLOPs of one matrix product over a whole tile."""
    return 2 * tile_m * tile_n * point.head_dim
