"""Lesson 1: the product of blocks is the product."""

import numpy as np

from ...drawing.axes import chart, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, TENSOR_CORES, Seen, see
from .matrices import CELL, ROW, cells, named

_Q = np.arange(1, 17).reshape(4, 4)
_K_TRANSPOSED = np.arange(17, 33).reshape(4, 4)
_SCALE = 1 / 1000
_CODE = """\
import numpy as np
import numflash

# batch, tokens, heads, head_dim
q = np.arange(1, 17, dtype="float32").reshape(1, 4, 1, 4)
k = np.arange(17, 33, dtype="float32").reshape(4, 4).T.reshape(1, 4, 1, 4)
v = np.eye(4, dtype="float32").reshape(1, 4, 1, 4)
p, lse = numflash.attention(q, k, v, softmax_scale=1 / 1000, return_lse=True)
s = 1000 * (np.log(p[0, :, 0]) + lse.reshape(4, 1))
print(s.round())
"""


def lesson() -> Lesson:
    """Blocked Q K^T equals the full product."""
    whole, blocked = _Q @ _K_TRANSPOSED, _by_blocks(_Q, _K_TRANSPOSED)
    seen = see(_Q, _K_TRANSPOSED.T, _SCALE)
    random = np.random.default_rng(0)
    q, k = random.integers(-4, 5, (8, 8)), random.integers(-4, 5, (24, 8))
    tiled = see(q, k, 1 / 16)
    multiplied = see(q, k, 1 / 16, TENSOR_CORES, np.float16)
    error = _error(seen, whole)
    return Lesson(
        1,
        "A product by blocks is the product",
        "FlashAttention never computes the score matrix as a whole. If Q and K are cut into "
        "blocks and only small blocks are multiplied, is S = Q Kᵀ still the same?",
        (_by_hand(whole), _from_the_kernel(seen, error), _longer(q @ k.T, tiled, multiplied)),
        (
            Slip(
                "S = Q K.",
                "Attention multiplies by K transposed: a score is the product of a row of Q and a "
                "row of K. To get the notes' matrix from a kernel, pass the transpose of their K.",
            ),
            Slip(
                "Blocks cut the depth, too.",
                "A tile of S needs whole rows of Q and K, so kernels cut queries and keys only. "
                "The depth is cut inside the tensor cores, 16 numbers of 16 bits at a time, and "
                "its sum never leaves the registers.",
            ),
        ),
        (
            Check.close("Blocks of 2 x 2 give the full product", blocked, whole, 0.0),
            Check.close("The kernel's hidden scores are the product", seen.scores, whole, 1e-3),
            Check.close("So are those of 2 x 3 tiles", tiled.scores, q @ k.T, 1e-4),
            Check.close("And those on tensor cores", multiplied.scores, q @ k.T, 0.05),
        ),
        (_figure(whole, seen),),
    )


def _by_blocks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two 4 x 4 matrices from their 2 x 2 blocks."""
    found = np.zeros((4, 4), int)
    for i in (0, 2):
        for j in (0, 2):
            for depth in (0, 2):
                left, right = a[i : i + 2, depth : depth + 2], b[depth : depth + 2, j : j + 2]
                found[i : i + 2, j : j + 2] += left @ right
    return found


def _by_hand(whole: np.ndarray) -> Step:
    first, second = (_Q[0, d : d + 2] @ _K_TRANSPOSED[d : d + 2, 0] for d in (0, 2))
    return Step(
        "By hand, in blocks of 2 x 2",
        f"Q holds 1 to 16 and Kᵀ 17 to 32. The corner of S is a sum over the depth, and a sum may "
        f"be cut: 1·17 + 2·21 = {first} from the first blocks, 3·25 + 4·29 = {second} from the "
        f"second, {first} + {second} = {whole[0, 0]}. The last corner is {whole[-1, -1]}.",
        "exact",
    )


def _from_the_kernel(seen: Seen, error: float) -> Step:
    return Step(
        "What the kernel saw",
        "The kernel throws each tile of S away. Two tricks bring it back. With V the identity, "
        "O = P V is P itself. And P = exp(S - lse), where lse is what a call with "
        "`return_lse=True` returns, so S = log P + lse. Scores of 250 and 1528 would leave "
        "exp(250 - 1528) = 0, so we pass `softmax_scale=1/1000` and multiply it back. The "
        f"largest error is {error:.1e}.",
        "kernel",
        Table(
            ("query", *(f"key {j}" for j in range(4))),
            [(i, *(f"{x:.3f}" for x in line)) for i, line in enumerate(seen.scores)],
            range(5),
            f"S as the kernel {PORTABLE} saw it",
        ),
        _CODE,
    )


def _longer(exact: np.ndarray, tiled: Seen, multiplied: Seen) -> Step:
    return Step(
        "Now with several tiles",
        "4 x 4 is less than one tile of the kernel. Take 8 queries and 24 keys: "
        f"`{PORTABLE}` has tiles of 4 x 8, so two blocks each walk over three tiles of keys. The "
        f"largest error of a score is {_error(tiled, exact):.1e}. On tensor cores, "
        f"`{TENSOR_CORES}` with float16, it is {_error(multiplied, exact):.2f}: that is not the "
        "product, which is exact here, but the rounding of P to float16, which we took the "
        "logarithm of.",
        "kernel",
    )


def _error(seen: Seen, exact: np.ndarray) -> float:
    return float(np.abs(seen.scores - exact).max())


def _figure(whole: np.ndarray, seen: Seen) -> Figure:
    y, gap = 24.0, 18.0
    wide = CELL + 3
    lefts = 4.0, 4 + 4 * CELL + gap, 4 + 8 * CELL + 2 * gap
    in_block = {
        "Q": lambda i, j: "s" if i < 2 and j < 2 else "pv" if i < 2 else "none",
        "Kᵀ": lambda i, j: "s" if i < 2 and j < 2 else "pv" if j < 2 else "none",
        "S": lambda i, j: "full" if i < 2 and j < 2 else "none",
    }
    values = {"Q": _Q, "Kᵀ": _K_TRANSPOSED, "S": seen.scores.round().astype(int)}
    parts = []
    for (name, role), x in zip(in_block.items(), lefts, strict=True):
        width, found = (wide if name == "S" else CELL), values[name]
        shown = [[str(value) for value in line] for line in found]
        parts.append(named(name, x, y, 4, width))
        parts.append(
            cells(
                shown,
                x,
                y,
                role,
                lambda i, j, n=name, f=found: f"{n}[{i}, {j}] = {f[i, j]}",
                width,
            )
        )
    for sign, x in (("x", lefts[1] - gap / 2 - 1), ("=", lefts[2] - gap / 2 - 1)):
        parts.append(text(x, y + 2 * ROW + 3, sign, "muted", "middle"))
    corner = whole[:2, :2].tolist()
    return Figure(
        "One block of S is a sum of two products",
        joined(
            [
                swatch("s", "first two of the depth"),
                swatch("pv", "last two"),
                swatch("full", "their sum."),
                "S is what the kernel saw, rounded to whole numbers.",
            ]
        ),
        chart(
            f"The upper left block of S, {corner}, is the sum of two products of 2 x 2 blocks.",
            joined(parts),
            height=y + 4 * ROW + 6,
        ),
        Table(
            ("row", *(f"column {j}" for j in range(4))),
            [(i, *line) for i, line in enumerate(whole.tolist())],
            range(5),
            "S, exact",
        ),
    )
