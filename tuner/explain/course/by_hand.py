"""Lesson 8: four queries, four keys, two numbers each, by hand."""

import numpy as np

import numflash

from ...drawing.axes import chart, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from .lesson import Check, Lesson, Slip, Step
from .looking import PORTABLE, matrix, rows, see
from .matrices import CELL, ROW, cells, named

_Q = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
_K = np.array([[2, 1], [4, 3], [6, 5], [8, 7]])
_V = _Q
_SEEN_SCALE = 1 / 16


def lesson() -> Lesson:
    """Attention with N = 4 and d = 2."""
    scores = _Q @ _K.T
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    seen, hidden = see(_Q, _K), see(_Q, _K, _SEEN_SCALE).scores
    out = matrix(
        numflash.attention(rows(_Q), rows(_K), rows(_V), softmax_scale=1.0, config=PORTABLE)
    )
    scaled = see(_Q, _K, 2**-0.5).p
    n, d = _Q.shape
    flop = 2 * (2 * n * n * d)
    return Lesson(
        8,
        "By hand: N = 4, d = 2",
        "Small enough for paper: what are S, P and O of four queries and four keys?",
        (
            Step(
                "S, row by row",
                "Row 2 of Q is 3, 4. Its products with the rows of K are 3·2 + 4·1 = 10, "
                f"3·4 + 4·3 = 24, 3·6 + 4·5 = 38, 3·8 + 4·7 = 52. The kernel saw "
                f"{_spaced(hidden[1], '.0f')}. S has a row for each query and a column for each "
                f"key: {scores.shape[0]} x {scores.shape[1]}.",
                "kernel",
                _table("S by the kernel", hidden, ".3f"),
            ),
            Step(
                "P: nearly all weight on one key",
                f"Row 1 of S is {_spaced(scores[0], 'd')}. Steps of 6 are factors of exp(6) = "
                f"{np.exp(6):.0f}, so P of row 1 is {_spaced(seen.p[0], '.4f')}. Attention also "
                f"divides S by √d; with that, row 1 is {_spaced(scaled[0], '.4f')}.",
                "kernel",
                _table("P by the kernel", seen.p, ".4f"),
            ),
            Step(
                "O, and the work",
                f"With V = Q the rows of O are nearly the last row of V: row 1 is "
                f"{_spaced(out[0], '.3f')}. Each of two products takes N² d multiplications "
                f"and as many additions: 4 N² d = {flop} FLOP.",
                "kernel",
                _table("O by the kernel", out, ".4f"),
            ),
        ),
        (
            Slip("Row 2 of S is 10, 25, 40, 55.", f"It is {_spaced(scores[1], 'd')}."),
            Slip(
                "S is 4 x 2, with a row 8, 22.",
                "That is a product of other shapes. Q Kᵀ of (4 x 2) and (2 x 4) is 4 x 4.",
            ),
            Slip(
                "Row 1 of P ends .12, .88.",
                f"It ends {_spaced(seen.p[0, 2:], '.4f')}: the scores 16 and 22 are 6 apart, and "
                f"exp(-6) is {np.exp(-6):.4f}.",
            ),
            Slip(
                "The forward takes 2 N² d FLOP.",
                "That is one of its two products. Q Kᵀ and P V together take 4 N² d.",
            ),
        ),
        (
            Check.equal("Row 2 of S", scores[1].tolist(), [10, 24, 38, 52]),
            Check.close("S by the kernel", hidden, scores, 1e-3),
            Check.close("P by the kernel", seen.p, weights, 1e-6),
            Check.close("Row 1 of P ends", seen.p[0, 2:], [0.0025, 0.9975], 5e-5),
            Check.close("O by the kernel", out, weights @ _V, 1e-5),
        ),
        (_figure(hidden, seen.p, out),),
    )


def _spaced(values, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _table(summary: str, found: np.ndarray, form: str) -> Table:
    head = ("query", *(str(j + 1) for j in range(found.shape[1])))
    lines = [(i + 1, *(f"{x:{form}}" for x in line)) for i, line in enumerate(found)]
    return Table(head, lines, range(len(head)), summary)


def _figure(hidden: np.ndarray, p: np.ndarray, out: np.ndarray) -> Figure:
    y, wide, gap = 24.0, CELL + 9, 14.0
    parts, x = [], 4.0
    kinds = (("S", hidden, ".0f", CELL), ("P", p, ".4f", wide), ("O", out, ".3f", wide))
    for name, found, form, width in kinds:
        shown = [[f"{value:{form}}".removeprefix("0")[:5] for value in line] for line in found]

        def role(i, j, name=name, found=found):
            if name == "S":
                return "s"
            return "pv" if name == "O" else "exp" if found[i, j] > 0.5 else "none"

        def title(i, j, name=name, found=found):
            return f"{name}[{i + 1}, {j + 1}] = {found[i, j]:.6g}"

        parts.append(named(name, x, y, found.shape[1], width))
        parts.append(cells(shown, x, y, role, title, width))
        x += width * found.shape[1] + gap
        if name != "O":
            parts.append(text(x - gap / 2 - 1, y + 2 * ROW + 3, "→", "muted", "middle"))
    return Figure(
        "From scores to the result",
        joined(
            [
                swatch("s", "scores"),
                swatch("exp", "weights above one half"),
                swatch("pv", "result."),
                "As the kernel saw and wrote them.",
            ]
        ),
        chart(
            "Every row of P gives its weight to the last key, so every row of O is nearly the "
            "last row of V.",
            joined(parts),
            height=y + 4 * ROW + 6,
        ),
        Table(
            ("query", "S", "P", "O"),
            [
                (i + 1, _spaced(s, ".0f"), _spaced(w, ".4f"), _spaced(o, ".4f"))
                for i, (s, w, o) in enumerate(zip(hidden, p, out, strict=True))
            ],
        ),
    )
