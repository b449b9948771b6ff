"""Lesson 2: a softmax in two halves."""

import numpy as np

import numflash

from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from ...drawing.shapes import Bar, bars
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, matrix, rows, see

_X = np.arange(1.0, 7.0)
_CODE = """\
import numpy as np
import numflash

q = np.ones((1, 1, 1, 1), "float32")
k = np.arange(1, 7, dtype="float32").reshape(1, 6, 1, 1)
v = np.eye(6, dtype="float32").reshape(1, 6, 1, 6)
options = {"softmax_scale": 1, "return_lse": True}
halves = [
    numflash.attention(q, k[:, part], v[:, part], **options)
    for part in (slice(0, 3), slice(3, 6))
]
p, lse = numflash.merge_partials(*zip(*halves))
print(p.round(4), lse)
"""
_HALVES = slice(0, 3), slice(3, 6)


def lesson() -> Lesson:
    """The softmax of 1 to 6 from two halves of three."""
    exact = np.exp(_X - 6) / np.exp(_X - 6).sum()
    seen = see([[1.0]], _X[:, None])
    outs, lses = zip(*(_half(half) for half in _HALVES), strict=True)
    merged, lse = numflash.merge_partials(outs, lses)
    merged, lse = matrix(merged)[0], float(lse.reshape(()))
    sums = [float(np.exp(part.reshape(()) - 6)) for part in lses]
    apart = [matrix(out)[0, half] for out, half in zip(outs, _HALVES, strict=True)]
    return Lesson(
        2,
        "A softmax in two halves",
        "A softmax divides by a sum over all keys. How can a block that sees only half of the "
        "keys have a result at all?",
        (
            Step(
                "Two numbers say everything about a half",
                "Take the scores 1 to 6. A half keeps its result and one number, "
                "lse = log Σ exp(x). Relative to the common maximum 6 the sums are "
                f"{sums[0]:.4f} for 1, 2, 3 and {sums[1]:.4f} for 4, 5, 6, together "
                f"{sum(sums):.4f}. These are exp(lse - 6) of two calls of the kernel.",
                "kernel",
                _table(apart, merged, exact),
            ),
            Step(
                "The kernel that joins them",
                "`numflash.merge_partials` weighs each half by its share of the sum, "
                f"{sums[0] / sum(sums):.4f} and {sums[1] / sum(sums):.4f}, and adds. The result "
                f"is the softmax over all six, and its lse is {lse:.4f} = 6 + log "
                f"{sum(sums):.4f}. One call over all six keys gives "
                f"{', '.join(f'{p:.4f}' for p in seen.p[0])}; the largest error is "
                f"{np.abs(seen.p[0] - exact).max():.1e}.",
                "kernel",
                code=_CODE,
            ),
        ),
        (
            Slip(
                "The last weight is .6345 by blocks and .6344 directly, which is rounding.",
                f"Both are slips. It is {exact[-1]:.4f} either way: blocks change nothing that "
                "four digits can show.",
            ),
        ),
        (
            Check.close("The sums of the halves", sums, [0.0748, 1.5032], 5e-5),
            Check.close("Together they are the sum", sum(sums), np.exp(_X - 6).sum(), 1e-6),
            Check.close("One call gives the softmax", seen.p[0], exact, 1e-7),
            Check.close("Joined halves give the softmax", merged, exact, 1e-7),
            Check.close("lse of the joined halves", lse, seen.lse[0], 1e-6),
        ),
        (_halves_figure(apart), _merged_figure(merged, sums)),
    )


def _half(half: slice) -> tuple[np.ndarray, np.ndarray]:
    """The result and lse of one query that sees half of the keys; V is the identity."""
    keys, values = _X[half, None], np.eye(6)[half]
    return numflash.attention(
        rows([[1.0]]),
        rows(keys),
        rows(values),
        softmax_scale=1.0,
        return_lse=True,
        config=PORTABLE,
    )


def _table(apart: list[np.ndarray], merged: np.ndarray, exact: np.ndarray) -> Table:
    alone = np.concatenate(apart)
    found = [
        (f"{x:g}", f"{a:.4f}", f"{m:.4f}", f"{e:.4f}")
        for x, a, m, e in zip(_X, alone, merged, exact, strict=True)
    ]
    head = ("score", "in its half", "joined", "softmax, float64")
    return Table(head, found, range(4), "All six weights")


def _role(i: int) -> str:
    return "s" if i < 3 else "pv"


def _halves_figure(apart: list[np.ndarray]) -> Figure:
    alone = np.concatenate(apart)
    found = [
        Bar(f"score {x:g}", p, f"{p:.4f}", _role(i))
        for i, (x, p) in enumerate(zip(_X, alone, strict=True))
    ]
    return Figure(
        "Each half by itself",
        joined([swatch("s", "first half"), swatch("pv", "second half"), "Each sums to 1."]),
        bars("Each half sums to 1: both give their largest score the same weight.", found),
        Table(("score", "weight"), [(b.name, b.shown) for b in found], (1,)),
    )


def _merged_figure(merged: np.ndarray, sums: list[float]) -> Figure:
    found = [
        Bar(f"score {x:g}", p, f"{p:.4f}", _role(i))
        for i, (x, p) in enumerate(zip(_X, merged, strict=True))
    ]
    shares = [f"{part / sum(sums):.4f}" for part in sums]
    return Figure(
        "Joined",
        joined(
            [
                f"The first half counts {shares[0]}, the second {shares[1]}: within a half, "
                "weights keep their proportions."
            ]
        ),
        bars(f"Joined, the second half takes {shares[1]} of all weight.", found),
        Table(("score", "weight"), [(b.name, b.shown) for b in found], (1,)),
    )
