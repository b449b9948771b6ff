"""Errors beside their budget, and the online softmax of one row."""

import numpy as np

from ...drawing.axes import Axis, line, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, escaped, joined, tag
from ...drawing.shapes import STRIP_WIDTH, Bar, Mark, bars, boxes, rect, ruler, strip
from ..facts.numerics import Checked, NumericsFacts, Row

_LEFT, _RIGHT = 60, STRIP_WIDTH - 60
_SCORES, _SUMS = (26.0, 190.0), (218.0, 292.0)
_MOST_DOTS, _MOST_TITLES, _MOST_BARS = 1000, 64, 400


def figures(facts: NumericsFacts) -> list[Figure]:
    """The errors and the row, or why they are not there."""
    if facts.checked is None:
        reason = f"There are no errors to draw: {facts.not_checked}."
        found = [Figure("Error against budget", escaped(reason))]
    else:
        found = [_errors(facts.checked, facts.elements)]
    if facts.row is None:
        return [
            *found,
            Figure("Online softmax of one row", escaped(f"Not shown: {facts.no_row}.")),
        ]
    return [*found, _row(facts.row, facts.elements)]


def _errors(checked: Checked, elements: str) -> Figure:
    """Bars in shares of the budget, which is a line."""
    found, rows = [], []
    for name, numbers in checked.errors.items():
        budget = numbers["budget"].value
        for of, role in (("error", "s"), ("naive", "walk3")):
            value = numbers[of].value
            share = value / budget if budget else 0.0
            bar = name if of == "error" else f"{name}, naive"
            about = f"{bar}: {value:.2g}, {share:.0%} of {budget:.2g}"
            found.append(Bar(bar, share, f"{value:.1e}, {share:.0%}", role, about))
        row = (f"{numbers[of].value:.2e}" for of in ("error", "naive", "budget"))
        rows.append((name, *row, "computed"))
    worst = max(checked.errors, key=lambda name: checked.errors[name]["share"].value)
    share = checked.errors[worst]["share"].value
    verdict = "within" if share <= 1 else "beyond"
    said = f"The largest error of {worst} is {share:.0%} of its budget, {verdict} it"
    part = checked.part
    caption = [
        f"{said}. Computed {checked.place} by the kernel {checked.kernel}, from {elements}: "
        f"{part.queries} queries from {part.first_query:,} on, {part.keys} keys from "
        f"{part.first_key:,} on, {part.heads} head{'s' if part.heads > 1 else ''}. Naive is "
        f"{checked.naive}. The budget is twice its error, and the rounding of one result. "
    ]
    if checked.left_out:
        caption.append(f"Computed without {', '.join(checked.left_out)}.")
    return Figure(
        "Error against budget",
        joined(caption),
        bars(said, found, [Mark(1.0, "budget")]),
        Table(("result", "error", "naive", "budget", "origin"), rows, (1, 2, 3)),
    )


def _row(row: Row, elements: str) -> Figure:
    """Above the scores with both maxima, below the sum, a bar for each tile."""
    tiles, n = len(row.sums), row.tile.value
    x = Axis(0.0, float(tiles), _LEFT, _RIGHT)
    y = _axis(row)
    s = Axis(0.0, float(row.sums.max()) or 1.0, _SUMS[1], _SUMS[0])
    parts = [
        text(_LEFT, 16, "scores of the row, in the order of keys", "muted"),
        text(_LEFT, _SUMS[0] - 8, "running sum after each tile", "muted"),
    ]
    for tick in y.ticks(4):
        parts.append(line(_LEFT, y(tick), _RIGHT, y(tick), "grid"))
        parts.append(text(_LEFT - 6, y(tick) + 4, f"{tick:g}", "muted", "end"))
    parts.append(boxes(_dots(row, x, y), "full"))
    parts += _bars(row, x, s)
    parts.append(_steps(row.largest, x, y, "default", "the true running maximum"))
    parts.append(_steps(row.subtracted, x, y, "outline", "the number that is subtracted"))
    parts += _ends(row, y)
    parts.append(ruler(x, _SUMS[1], f"tiles of {n} keys"))
    own, others = int(row.own.sum()), int(row.others.sum())
    said = f"{own} of {tiles} tiles rescale the sum and O of this row"
    title = f"Online softmax of query {row.query}, head {row.head}"
    return Figure(
        title,
        joined([*_legend(), f"{said}. ", *_said(row, others), f"From {elements}."]),
        strip(f"{said}; lse {row.lse.value:.6f}", *parts, height=336),
        Table(
            ("tile", "largest so far", "subtracted", "factor", "sum", "rescaled"),
            _table(row),
            (0, 1, 2, 3, 4),
        ),
        wide=True,
    )


def _axis(row: Row) -> Axis:
    seen = row.scores[np.isfinite(row.scores)]
    low, high = float(seen.min()), float(seen.max())
    room = 0.08 * (high - low) or 1.0
    return Axis(low - room, high + room, _SCORES[1], _SCORES[0])


def _dots(row: Row, x: Axis, y: Axis) -> list[tuple[float, float, float, float]]:
    """The scores, thinned out."""
    keys = np.flatnonzero(np.isfinite(row.scores))
    keys = keys[:: -(-len(keys) // _MOST_DOTS)]
    return [(x(key / row.tile.value) - 0.6, y(row.scores[key]) - 0.6, 1.4, 1.4) for key in keys]


def _bars(row: Row, x: Axis, s: Axis) -> list[Markup]:
    """The sum after each tile, or each of a few; of many only the first that rescale are named."""
    step = -(-len(row.sums) // _MOST_BARS)
    gap = 2 if x(1) - x(0) > 6 else 0.0
    many, found, parts = len(row.sums) > _MOST_TITLES, {"full": [], "edge": [], "max": []}, []
    for i in range(0, len(row.sums), step):
        end = min(i + step, len(row.sums))
        own, others, total = row.own[i:end].any(), row.others[i:end].any(), row.sums[end - 1]
        role = "edge" if own else "max" if others else "full"
        width, top = max(0.3, x(end) - x(i) - gap), s(float(total))
        box = x(i) + gap / 2, top, width, _SUMS[1] - top
        if many and not (own and len(parts) < _MOST_TITLES):
            found[role].append(box)
            continue
        about = f"tile {i}: largest {row.largest[i]:.3f}, subtracted {row.subtracted[i]:.3f}, "
        about += f"sum {total:.4g}, factor {row.factors[i]:.3g}"
        parts.append(rect(*box, role, about))
    return [*(boxes(each, role) for role, each in found.items() if each), *parts]


def _steps(values: np.ndarray, x: Axis, y: Axis, class_: str, about: str) -> Markup:
    """A line that is level over each tile."""
    path, ends = "", np.flatnonzero(np.append(values[1:] != values[:-1], True))
    for i, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        value = float(values[i])
        if np.isfinite(value):
            begin = f"V{y(value):.1f}" if path else f"M{x(i):.1f} {y(value):.1f}"
            path += f"{begin}H{x(end + 1):.1f}"
    return tag("path", tag("title", about), d=path or f"M{_LEFT} {_SCORES[1]}", class_=class_)


def _ends(row: Row, y: Axis) -> list[Markup]:
    """The names of both lines, to the right of them."""
    upper, lower = y(float(row.largest[-1])) + 4, y(float(row.subtracted[-1])) + 4
    if lower - upper < 13:
        lower = upper + 13
    names = [text(_RIGHT + 4, upper, "largest", "label-default small")]
    return [*names, text(_RIGHT + 4, lower, "subtracted", "small")]


def _legend() -> list[Markup]:
    return [
        swatch("full", "scores, and the sum"),
        swatch("edge", "rescaled: the maximum grew"),
        swatch("max", "multiplied by 1: a neighbour had to rescale"),
    ]


def _said(row: Row, others: int) -> list[str]:
    found = ["Dashed is the true running maximum, solid what is subtracted. "]
    if row.lag is None:
        found.append("This kernel follows each new maximum. ")
    else:
        found.append(
            f"The maximum may grow by a factor of 2^{row.lag} in P before anything is rescaled. A "
            f"warp votes for its {row.neighbours} rows: in {others} more tiles this row was "
            "multiplied by 1 because a neighbour had to rescale. "
        )
    if row.parts.value > 1:
        found.append(f"{row.parts} blocks share the keys, and each begins without a maximum. ")
    difference = abs(row.lse.value - row.lse_at_once.value)
    found.append(
        f"log-sum-exp {row.lse.value:.6f}; of all scores at once {row.lse_at_once.value:.6f}, a "
        f"difference of {difference:.1g}. "
    )
    return [*found, row.note]


def _table(row: Row) -> list[tuple]:
    found = []
    for i in range(len(row.sums)):
        why = "by itself" if row.own[i] else "with a neighbour" if row.others[i] else ""
        numbers = (
            f"{v[i]:.4f}" if np.isfinite(v[i]) else "none yet"
            for v in (row.largest, row.subtracted)
        )
        found.append((i, *numbers, f"{row.factors[i]:.3g}", f"{row.sums[i]:.5g}", why))
    return found
