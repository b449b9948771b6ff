"""Axes of charts: the places of values and ticks, and their drawing.

Charts are laid out for their smallest size, so that their text stays legible on a phone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .markup import Markup, joined, tag

WIDTH = 350
LEFT, RIGHT = 46, 340
TOP, BOTTOM = 16, 214
HEIGHT = 250
"""Pixels: a chart, and the plot in it."""
FONT = 11
"""Pixels: the size of a chart's text."""
RING = 5
"""Pixels: the radius of the ring around the best."""
IN_SIGHT = 3.0
"""Times beyond so many times the best are not drawn to scale: they would squeeze all others."""
_CHARACTER = 0.62


@dataclass(frozen=True)
class Axis:
    """A line of values between two positions in pixels; logarithmic or linear."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value, in pixels."""
        low, high, value = self.low, self.high, value
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values for about so many ticks."""
        if self.log and self.high / self.low > 4:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**n for n in decades for step in steps]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) <= count + 2:
                    return found
            return found[:: -(-len(found) // count)]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    @classmethod
    def around(cls, values, start: float, end: float, room: float = 0.06) -> "Axis":
        """A logarithmic axis that shows these positive values with some room on both sides."""
        low, high = min(values), max(values)
        factor = max((high / low) ** room, 1.02)
        return cls(low / factor, high * factor, start, end, log=True)


def _round_step(step: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))


def width_of(content: object, size: float = FONT) -> float:
    """Pixels that a line of text takes in the widest of the fonts, DejaVu Sans, or a few more."""
    return _CHARACTER * size * len(str(content))


def room_of(names: Iterable[str]) -> float:
    """The position at which bars begin, so that their names fit; half of a chart at most."""
    return min(WIDTH / 2, 8 + max(map(width_of, names)))


def elided(name: str, room: float) -> str:
    """A name, cut where it has no room."""
    most = int(room / width_of("x"))
    return name if len(name) <= most else f"{name[: most - 1]}…"


class Labels:
    """The labels of a chart: each takes the place where it covers the least of the others."""

    def __init__(self, height: float = HEIGHT):
        self._height, self._taken, self._drawn = height, [], []

    def add(self, content: object, class_: str, *places: tuple[float, float, str]) -> None:
        """Write a label at the first of these places (x, y, anchor) that is free.

        If none is, at the one where the label covers, or leaves outside the chart, the least.
        """
        boxes = {place: _box(content, *place) for place in places}
        place = min(boxes, key=lambda place: self._covered(boxes[place]))
        self._taken.append(boxes[place])
        self._drawn.append(text(*place[:2], content, class_, place[2]))

    def keep_clear(self, x: float, y: float, radius: float) -> None:
        """A mark that no later label may cover."""
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def drawn(self) -> list[Markup]:
        """The labels, to be drawn over everything else."""
        return list(self._drawn)

    def _covered(self, box: tuple[float, float, float, float]) -> float:
        inside = _common(box, (0.0, 0.0, WIDTH, self._height))
        return _common(box, box) - inside + sum(_common(box, other) for other in self._taken)


def _box(content: object, x: float, y: float, anchor: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a line of text."""
    width = width_of(content)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - 0.8 * FONT, left + width, y + 0.25 * FONT


def _common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(0.0, width) * max(0.0, height)


def text(x: float, y: float, content: object, class_: str | None = None, anchor="start") -> Markup:
    """A line of text; `anchor` is "start", "middle" or "end"."""
    anchor = None if anchor == "start" else anchor
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def upwards(x: float, y: float, content: object, class_: str | None = None) -> Markup:
    """A line of text that reads from below to above and ends at (x, y)."""
    turn = f"rotate(-90 {x:g} {y:g})"
    return tag("text", content, x=x, y=y, class_=class_, text_anchor="end", transform=turn)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, title: str = "") -> Markup:
    """A straight line, with a tooltip."""
    about = [tag("title", title)] if title else []
    return tag("line", *about, x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def circle(x: float, y: float, r: float, class_: str, title: str = "") -> Markup:
    """A circle, with a tooltip."""
    about = [tag("title", title)] if title else []
    return tag("circle", *about, cx=x, cy=y, r=r, class_=class_)


def beyond(x: float, y: float, toward: str) -> Markup:
    """A small arrow from a mark to where it would be: "up" or "right"."""
    arrow = f"M{x - 3:.1f} {y - 5:.1f}l3 -4l3 4"
    if toward == "right":
        arrow = f"M{x + 5:.1f} {y - 3:.1f}l4 3l-4 3"
    return tag("path", d=arrow, class_="beyond")


def cross(x: float, y: float, class_: str, title: str = "") -> Markup:
    """A small x, with a tooltip."""
    about = [tag("title", title)] if title else []
    return tag("path", *about, d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6", class_=class_)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks=None) -> Markup:
    """Grid lines, tick labels and names of both axes."""
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts += [
            line(x.start, at, x.end, at, "grid"),
            text(x.start - 5, at + 4, _tick(tick, x.start - 5), "muted", "end"),
        ]
    end = 0.0
    for tick in x.ticks() if x_ticks is None else x_ticks:
        label = f"{tick:.6g}"
        middle = min(x(tick), WIDTH - width_of(label) / 2)
        parts.append(line(x(tick), BOTTOM, x(tick), BOTTOM + 4, "axis"))
        if middle - width_of(label) / 2 > end:
            parts.append(text(middle, BOTTOM + 16, label, "muted", "middle"))
            end = middle + width_of(label) / 2
    parts += [
        line(x.start, BOTTOM, x.end, BOTTOM, "axis"),
        text(2, 10, y_label, "muted"),
        text(x.end, BOTTOM + 31, x_label, "muted", "end"),
    ]
    return joined(parts)


def _tick(value: float, room: float) -> str:
    """A tick's label; without the zero before the point where that has no room."""
    label = f"{value:.6g}"
    return label if width_of(label) <= room else label.removeprefix("0")


def chart(label: str, *parts: Markup, height: float = HEIGHT) -> Markup:
    """A chart as an SVG element; its label is for those who cannot see it."""
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:g}",
        class_="chart",
        role="img",
        aria_label=label,
    )
