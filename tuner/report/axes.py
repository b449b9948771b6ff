"""Axes of the report's charts: where a value lies, where ticks go, how they are drawn.

Charts are laid out for their smallest size, so that their text stays legible on a phone.
"""

import math
from dataclasses import dataclass

from numflash_tuner.report.markup import Markup, joined, tag

WIDTH = 350
LEFT, RIGHT = 46, 340
TOP, BOTTOM = 16, 214
HEIGHT = 250
"""Pixels: a chart, and the plot in it."""


@dataclass(frozen=True)
class Axis:
    """A line of values between two positions in pixels; logarithmic or linear."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies, in pixels."""
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


def text(x: float, y: float, content: object, class_: str | None = None, anchor="start") -> Markup:
    """A line of text; `anchor` is "start", "middle" or "end"."""
    anchor = None if anchor == "start" else anchor
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, title: str = "") -> Markup:
    """A straight line, with a tooltip."""
    about = [tag("title", title)] if title else []
    return tag("line", *about, x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def circle(x: float, y: float, r: float, class_: str, title: str = "") -> Markup:
    """A circle, with a tooltip."""
    about = [tag("title", title)] if title else []
    return tag("circle", *about, cx=x, cy=y, r=r, class_=class_)


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
            text(x.start - 5, at + 4, f"{tick:.6g}", "muted", "end"),
        ]
    for tick in x.ticks() if x_ticks is None else x_ticks:
        parts += [
            line(x(tick), BOTTOM, x(tick), BOTTOM + 4, "axis"),
            text(x(tick), BOTTOM + 16, f"{tick:.6g}", "muted", "middle"),
        ]
    parts += [
        line(x.start, BOTTOM, x.end, BOTTOM, "axis"),
        text(2, 10, y_label, "muted"),
        text(x.end, BOTTOM + 31, x_label, "muted", "end"),
    ]
    return joined(parts)


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
