"""Marks of many parts: rectangles, many of them in one path, wide strips, rulers and bars."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .axes import WIDTH, Axis, chart, elided, line, room_of, text, width_of
from .markup import Markup, tag

STRIP_WIDTH = 960
"""Pixels: a wide figure is laid out for them, and pans where the page is narrower."""
STRIP_FONT = 12
"""Pixels: the size of a wide figure's text; of class `small` it is `SMALL` times that."""
SMALL = 0.84
Box = tuple[float, float, float, float]


def strip(label: str, *parts: Markup, height: float) -> Markup:
    """A wide chart as an SVG element; its label states what it shows, for who cannot see it."""
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {STRIP_WIDTH} {height:g}",
        class_="strip",
        role="img",
        aria_label=label,
    )


def rect(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> Markup:
    """A rectangle, with a tooltip."""
    about = [tag("title", title)] if title else []
    box = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return tag("rect", *about, **box, class_=class_)


def boxes(found: Iterable[Box], class_: str, title: str = "") -> Markup:
    """Many rectangles (x, y, width, height) as one path: a tenth of the bytes of elements."""
    about = [tag("title", title)] if title else []
    path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in found)
    return tag("path", *about, d=path, class_=class_)


def lanes(
    found: Iterable[tuple[float, float, float]], thickness: float, class_: str, title: str = ""
) -> Markup:
    """Many rectangles of one height (x, y of the middle, width): half the bytes of `boxes`."""
    about = [tag("title", title)] if title else []
    path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}" for x, y, w in found)
    return tag("path", *about, d=path, class_=f"lanes {class_}", stroke_width=f"{thickness:.2f}")


def between(x: float, y: float, width: float, height: float, columns: int, rows: int) -> Markup:
    """The lines between the cells of a grid, in the colour of the card."""
    down, across = rows * height, columns * width
    path = "".join(f"M{_n(x + n * width)} {_n(y)}v{_n(down)}" for n in range(1, columns))
    path += "".join(f"M{_n(x)} {_n(y + n * height)}h{_n(across)}" for n in range(1, rows))
    return tag("path", d=path, class_="between") if path else Markup("")


def slashes(found: Iterable[Box], class_: str = "slash") -> Markup:
    """A diagonal in each of many rectangles: marks them apart without colour."""
    path = "".join(f"M{_n(x)} {_n(y + h)}l{_n(w)} {_n(-h)}" for x, y, w, h in found)
    return tag("path", d=path, class_=class_)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# Of the width by `width_of` that a short label of digits and capitals really takes.
_FILLED = 0.92


def boxed_text(box: Box, content: str, class_: str, size: float) -> Markup:
    """A line of text in the middle of a box; nothing where it has no room."""
    x, y, width, height = box
    if _FILLED * width_of(content, size) > width or size > height:
        return Markup("")
    return text(x + width / 2, y + height / 2 + 0.36 * size, content, class_, "middle")


def ruler(x: Axis, y: float, label: str, size: float = STRIP_FONT, count: int = 8) -> Markup:
    """The ticks and the name of a horizontal axis, in 36 pixels below y."""
    parts, end = [line(x.start, y, x.end, y, "axis")], 0.0
    for tick in x.ticks(count):
        shown, half = f"{tick:,.6g}", width_of(f"{tick:,.6g}", size) / 2
        parts.append(line(x(tick), y, x(tick), y + 4, "axis"))
        if x(tick) - half > end and x(tick) + half <= x.end + 24:
            parts.append(text(x(tick), y + 5 + size, shown, "muted", "middle"))
            end = x(tick) + half
    parts.append(text(x.end, y + 8 + 2 * size, label, "muted", "end"))
    return Markup("".join(parts))


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its value, the text at its end, its role or class, its tooltip."""

    name: str
    value: float
    shown: str
    class_: str = "bar"
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line through all bars at a value: its text and its class."""

    value: float
    shown: str
    class_: str = "default"


_ROW = 24


def bars(label: str, found: Sequence[Bar], marks: Sequence[Mark] = (), low: float = 0.0) -> Markup:
    """A chart of horizontal bars; logarithmic from `low` on where that is above 0.

    Args:
        label: a sentence that states what is to be seen.
        found: from above to below; names longer than half of the chart are cut.
        marks: lines through all bars, each with a line of text above them.
        low: where the axis begins.

    Returns:
        The SVG element, as wide as other charts.
    """
    left = room_of(bar.name for bar in found)
    right = WIDTH - 8 - min(WIDTH / 3, max(width_of(bar.shown) for bar in found))
    high = max([*(bar.value for bar in found), *(mark.value for mark in marks)])
    x = Axis(low, max(high, low * 1.01, 1e-12), left, right, log=low > 0)
    top = 6 + 14 * len(marks)
    end = top + _ROW * len(found)
    parts = []
    for i, mark in enumerate(marks):
        at = x(max(low, mark.value))
        to_the_right = at < WIDTH / 2
        anchor, beside = ("start", 4) if to_the_right else ("end", -4)
        parts.append(line(at, 4 + 14 * i, at, end, mark.class_))
        parts.append(text(at + beside, 13 + 14 * i, mark.shown, "halo", anchor))
    for i, bar in enumerate(found):
        y, width = top + _ROW * i, max(0.5, x(max(low, bar.value)) - left)
        about = bar.title or f"{bar.name}: {bar.shown}"
        parts += [
            text(left - 6, y + 14, elided(bar.name, left - 6), None, "end"),
            rect(left, y + 3, width, _ROW - 8, bar.class_, about),
            text(left + width + 4, y + 14, bar.shown, "halo"),
        ]
    return chart(label, *parts, height=end + 6)
