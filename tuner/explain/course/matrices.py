"""Matrices as pictures: a cell for each number, in the colour of a role."""

from collections.abc import Callable, Sequence

from ...drawing.axes import text
from ...drawing.markup import Markup, joined
from ...drawing.shapes import boxed_text, rect

CELL = 24.0
"""Pixels: the width of a cell."""
ROW = 20.0
"""Pixels: its height."""
_SIZE = 9.3


def cells(
    shown: Sequence[Sequence[str]],
    x: float,
    y: float,
    role: Callable[[int, int], str],
    title: Callable[[int, int], str],
    width: float = CELL,
) -> Markup:
    """A matrix of cells.

    Args:
        shown: the text of each cell; a text without room is left out.
        x, y: the upper left corner.
        role: (row, column) -> the role of the cell, of `drawing.roles`.
        title: (row, column) -> its tooltip.
        width: of a cell.
    """
    parts = []
    for i, line in enumerate(shown):
        for j, content in enumerate(line):
            box = (x + width * j, y + ROW * i, width - 1.5, ROW - 1.5)
            parts.append(rect(*box, role(i, j), title(i, j)))
            parts.append(boxed_text(box, content, f"on-{role(i, j)} small", _SIZE))
    return joined(parts)


def named(content: str, x: float, y: float, columns: int, width: float = CELL) -> Markup:
    """A name in the middle above a matrix whose upper left corner this is."""
    return text(x + width * columns / 2, y - 6, content, "muted", "middle")
