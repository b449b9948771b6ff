"""The mask over tiles: squares, and the work of each tile of rows beside them."""

import numpy as np

from numflash.selection.layout import EDGE, EMPTY, WHOLE

from ...drawing.axes import Axis, chart, line, text, upwards, width_of
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import joined
from ...drawing.shapes import (
    Box,
    between,
    boxes,
    rect,
    slashes,
)
from ..facts.mask import MaskFacts
from . import walk
from .walk import ROLES, sides

_LEFT, _TOP, _WIDTH, _HEIGHT = 40, 24, 262.0, 288.0
_MOST, _LEAST = 22.0, 6.0


def figures(facts: MaskFacts) -> list[Figure]:
    """The tiles, the work of their rows, and the walk of one block."""
    found = [_tiles(facts), _work(facts)]
    return found if facts.walk is None else [*found, walk.figure_of(facts, facts.walk)]


def _pitch(count: int, room: float) -> float:
    return max(_LEAST, min(_MOST, room / count))


def _tiles(facts: MaskFacts) -> Figure:
    rows, columns = facts.squares.shape
    width, height = _pitch(columns, _WIDTH), _pitch(rows, _HEIGHT)
    found = {kind: _runs(facts.squares == kind, width, height) for kind in ROLES}
    partial = [
        (_LEFT + n * width, _TOP + m * height, width, height)
        for m, n in np.argwhere(facts.squares == EDGE)
    ]
    bottom, right = _TOP + rows * height, _LEFT + columns * width
    own, other = sides(facts)
    parts = [
        boxes(found[EMPTY], "none", f"empty: {facts.empty} tiles, never visited"),
        boxes(found[WHOLE], "full", f"full: {facts.whole} tiles, without a mask"),
        boxes(found[EDGE], "edge", f"partial: {facts.masked} tiles, masked"),
        slashes(partial),
        between(_LEFT, _TOP, width, height, columns, rows),
        rect(_LEFT, _TOP, right - _LEFT, bottom - _TOP, "frame"),
        text(_LEFT, 15, f"{other}: {facts.column_tiles} tiles of {facts.column_tile} →", "muted"),
    ]
    name = f"{own}: {facts.row_tiles} tiles of {facts.row_tile}"
    if width_of(name) < bottom - _TOP:
        parts.append(upwards(28, _TOP, name, "muted"))
    if facts.walk is not None:
        y = _TOP + facts.walk.row_tile.value // facts.step[0] * height
        first, last = (n // facts.step[1] for n in facts.walk.tiles[[0, -1]].tolist())
        about = f"the walk below: {own} tile {facts.walk.row_tile}"
        span = _LEFT + first * width, y, (last - first + 1) * width, height
        parts.append(rect(*span, "outline", about))
    total = facts.whole.value + facts.masked.value + facts.empty.value
    visited = facts.whole.value + facts.masked.value
    said = f"{visited:,} of {total:,} tiles ({visited / total:.0%}) are visited by each head"
    caption = [
        swatch("full", f"full, no mask ({facts.whole})"),
        swatch("edge", f"partial, masked ({facts.masked})"),
        swatch("none", f"empty, never visited ({facts.empty})"),
        f"{said}. ",
        _squares(facts),
        *(f"{note[0].upper()}{note[1:]}. " for note in facts.notes),
    ]
    kinds = [("full", facts.whole), ("partial", facts.masked), ("empty", facts.empty)]
    return Figure(
        f"Which tiles of the score matrix exist{': transposed' if facts.owns_keys else ''}",
        joined(caption),
        chart(f"{said}; {facts.masked} of these are masked", *parts, height=bottom + 8),
        Table(("tiles", "number"), kinds, (1,)),
    )


def _runs(squares: np.ndarray, width: float, height: float) -> list[Box]:
    """The squares that are set; those beside each other are one box."""
    found = []
    for m, row in enumerate(squares):
        ends = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        for begin, end in ends.reshape(-1, 2).tolist():
            box = _LEFT + begin * width, _TOP + m * height, (end - begin) * width, height
            found.append(box)
    return found


def _squares(facts: MaskFacts) -> str:
    said = ""
    if facts.pack.value > 1:
        said = f"A tile has the rows of {facts.pack} heads. "
    if max(facts.step) > 1:
        said += f"A square stands for {facts.step[0]} x {facts.step[1]} tiles. "
    return said


def _work(facts: MaskFacts) -> Figure:
    """Bars at the pitch of the squares: of each row, or each row of squares, the mean."""
    work, step = facts.work.value, facts.step[0]
    rows, own = len(facts.squares), sides(facts)[0]
    height = _pitch(rows, _HEIGHT)
    bottom, most = _TOP + rows * height, max(1.0, float(facts.most.value))
    x = Axis(0.0, most, 52, 302)
    chosen = -1 if facts.walk is None else facts.walk.row_tile.value // step
    parts, free = [text(0, 15, f"tiles that each tile of {own} visits", "muted")], -np.inf
    for i, mean in enumerate(work.tolist()):
        y = _TOP + i * height
        role = "walk0" if i == chosen else "full"
        about = f"from {own} tile {i * step}: {mean:.4g} tiles"
        parts.append(rect(52, y + 0.5, max(0.6, x(mean) - 52), height - 1, role, about))
        middle = y + height / 2 + 4
        if i in (0, chosen, rows - 1) and middle - free >= 12:
            parts += [text(46, middle, str(i * step), None, "end")]
            parts += [text(x(mean) + 4, middle, f"{mean:.4g}", "halo")]
            free = middle
    at, said = x(float(facts.mean.value)), f"mean {facts.mean}"
    parts.append(line(at, _TOP, at, bottom, "default", said))
    beside = (at - 4, "end") if at > 180 else (at + 4, "start")
    parts.append(text(beside[0], bottom + 13, said, "label-default", beside[1]))
    ratio = f"{facts.imbalance.value:.2f}"
    rows_of_table = [(i * step, f"{mean:.4g}") for i, mean in enumerate(work.tolist())]
    return Figure(
        "The work of each tile of rows",
        joined(
            [
                f"The longest walk has {ratio} times the mean. ",
                "Blocks that start late should have short ones: the schedule shows what their "
                "order makes of it."
                if facts.imbalance.value > 1.02
                else "All have about the same, so their order does not matter.",
                f" A bar is the mean of {step} tiles of {own}." if step > 1 else "",
            ]
        ),
        chart(
            f"{facts.least.value} to {facts.most}; the longest walk has {ratio} times the mean",
            *parts,
            height=bottom + 20,
        ),
        Table((f"from tile of {own}", "tiles visited"), rows_of_table, (0, 1)),
    )
