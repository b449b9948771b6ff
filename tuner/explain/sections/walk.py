"""The walk of one block of the mask's section, from left to right in time."""

from numflash.selection.layout import EDGE, EMPTY, WHOLE

from ...drawing.axes import text, width_of
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import (
    SMALL,
    STRIP_FONT,
    STRIP_WIDTH,
    boxed_text,
    rect,
    slashes,
    strip,
)
from ..facts.mask import MaskFacts, Walk

ROLES = {EMPTY: "none", EDGE: "edge", WHOLE: "full"}
"""The colour of each kind of tile."""
_NAMES = {EMPTY: "skipped", EDGE: "masked", WHOLE: "whole"}


def sides(facts: MaskFacts) -> tuple[str, str]:
    """What rows and columns are."""
    return ("keys", "queries") if facts.owns_keys else ("queries", "keys")


def figure_of(facts: MaskFacts, walk: Walk) -> Figure:
    """From left to right in time, a row for each unit that masks by itself."""
    own, other = sides(facts)
    left, pitch = 116, 27
    size = min(34.0, (STRIP_WIDTH - left - 16) / len(walk.shown))
    parts = [text(left - 10, 16, f"tile of {other}", "muted", "end")]
    every = next(n for n in (1, 2, 4, 8) if n * size > width_of("000", STRIP_FONT * SMALL) + 3)
    for at, place in enumerate(walk.shown):
        if place >= 0 and at % every == 0:
            middle = left + (at + 0.5) * size
            parts.append(text(middle, 16, str(walk.tiles[place]), "muted small", "middle"))
    tile = facts.column_tile.value
    for n, (name, _, _) in enumerate(walk.units):
        y, edges = 24 + n * pitch, []
        parts.append(text(left - 10, y + 15, name, None, "end"))
        for at, place in enumerate(walk.shown):
            box = left + at * size, y, size - 1.5, pitch - 5.0
            if place < 0:
                parts.append(boxed_text(box, "…", "muted", 9))
                continue
            kind, column = int(walk.kinds[n, place]), int(walk.tiles[place])
            about = f"{other} {column * tile:,} to {(column + 1) * tile - 1:,}: {_NAMES[kind]}"
            parts.append(rect(*box, ROLES[kind], about))
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
