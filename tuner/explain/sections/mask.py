"""The mask over tiles: squares, the work of each tile of rows beside them, the walk of a block."""

import numpy as np

from numflash.selection.layout import EDGE, EMPTY, WHOLE

from ...drawing.axes import Axis, chart, line, text, upwards, width_of
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import (
    SMALL,
    STRIP_FONT,
    STRIP_WIDTH,
    Box,
    between,
    boxed_text,
    boxes,
    rect,
    slashes,
    strip,
)
from ..facts.mask import MaskFacts, Walk

_LEFT, _TOP, _WIDTH, _HEIGHT = 40, 24, 262.0, 288.0
_MOST, _LEAST = 22.0, 6.0
_ROLES = {EMPTY: "none", EDGE: "edge", WHOLE: "full"}
_NAMES = {EMPTY: "skipped", EDGE: "masked", WHOLE: "whole"}


def figures(facts: MaskFacts) -> list[Figure]:
    """The tiles, the work of their rows, and the walk of one block."""
    found = [_tiles(facts), _work(facts)]
    return found if facts.walk is None else [*found, _walk(facts, facts.walk)]


def _sides(facts: MaskFacts) -> tuple[str, str]:
    """What rows and columns are."""
    return ("keys", "queries") if facts.owns_keys else ("queries", "keys")


def _pitch(count: int, room: float) -> float:
    return max(_LEAST, min(_MOST, room / count))


def _tiles(facts: MaskFacts) -> Figure:
    rows, columns = facts.squares.shape
    width, height = _pitch(columns, _WIDTH), _pitch(rows, _HEIGHT)
    found = {kind: _runs(facts.squares == kind, width, height) for kind in _ROLES}
    partial = [
        (_LEFT + n * width, _TOP + m * height, width, height)
        for m, n in np.argwhere(facts.squares == EDGE)
    ]
    bottom, right = _TOP + rows * height, _LEFT + columns * width
    own, other = _sides(facts)
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
    rows, own = len(facts.squares), _sides(facts)[0]
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


def _walk(facts: MaskFacts, walk: Walk) -> Figure:
    """From left to right in time, a row for each unit that masks by itself."""
    own, other = _sides(facts)
    left, pitch = 116, 27
    size = min(34.0, (STRIP_WIDTH - left - 16) / len(walk.shown))
    parts = [text(left - 10, 16, f"tile of {other}", "muted", "end")]
    every = next(n for n in (1, 2, 4, 8) if n * size > width_of("000", STRIP_FONT * SMALL) + 3)
    for at, place in enumerate(walk.shown):
        if place >= 0 and at % every == 0:
            middle = left + (at + 0.5) * size
            parts.append(text(middle, 16, str(walk.tiles[place]), "muted small", "middle"))
    tile = facts.column_tile.value
    for n, (name, first, last) in enumerate(walk.units):
        y, edges = 24 + n * pitch, []
        parts.append(text(left - 10, y + 15, name, None, "end"))
        for at, place in enumerate(walk.shown):
            box = left + at * size, y, size - 1.5, pitch - 5.0
            if place < 0:
                parts.append(boxed_text(box, "…", "muted", 9))
                continue
            kind, column = int(walk.kinds[n, place]), int(walk.tiles[place])
            about = f"{own} {first:,} to {last:,}, {other} {column * tile:,} to "
            about += f"{(column + 1) * tile - 1:,}: {_NAMES[kind]}"
            parts.append(rect(*box, _ROLES[kind], about))
            edges += [box] if kind == EDGE else []
        parts += [slashes(edges)] if edges else []
    whole, masked, skipped = (walk.counts[name] for name in ("whole", "masked", "skipped"))
    said = f"{len(walk.tiles)} steps: {whole} whole, {masked} masked and {skipped} skipped"
    rows = [
        (int(tile), *(_NAMES[int(kind)] for kind in walk.kinds[:, i]))
        for i, tile in enumerate(walk.tiles)
    ]
    return Figure(
        f"The walk of one block: {own} {walk.first} to {walk.last}",
        joined([*_legend(), f"{said}, from left to right in time. ", *_said(facts, walk)]),
        strip(said, *parts, height=28 + pitch * len(walk.units)),
        Table((f"tile of {other}", *(name for name, _, _ in walk.units)), rows, (0,)),
        wide=True,
    )


def _legend() -> list[Markup]:
    return [
        swatch("full", "whole"),
        swatch("edge", "masked"),
        swatch("none", "skipped: these rows see nothing there"),
    ]


def _said(facts: MaskFacts, walk: Walk) -> list[object]:
    if facts.owns_keys:
        each = "For each tile of queries S and P are computed again, and dK and dV grow."
    else:
        each = "Each step multiplies a tile of keys, and only masked ones pay for the mask."
    said: list[object] = [tag("b", each)]
    if walk.parts.value > 1:
        said.append(
            f" {walk.parts} blocks share the tiles of these rows; this is number {walk.part}."
        )
    return said
