"""A figure: a chart with its title, its caption and its numbers; the entries of its legend."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .markup import Markup, joined, tag
from .tables import folded, row, table

MOST_ROWS = 24


@dataclass(frozen=True)
class Table:
    """The numbers that a figure draws, to unfold below it.

    Of more rows than `MOST_ROWS` the first and the last are shown.

    Attributes:
        head: names of the columns.
        rows: a row's cells, as many as columns.
        numbers: places of the columns that are aligned to the right.
        summary: what can be read while the table is folded.
    """

    head: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    numbers: Iterable[int] = ()
    summary: str = "The numbers"


@dataclass(frozen=True)
class Figure:
    """A chart with its title and caption; without a chart, the caption says why.

    Attributes:
        title: above the chart.
        caption: below it: a legend, and what is to be seen.
        svg: made by `axes.chart` or, for a wide figure, by `shapes.strip`.
        table: what the chart draws, as numbers.
        wide: takes the whole width of the page, and pans where that is narrow.
    """

    title: str
    caption: Markup
    svg: Markup | None = None
    table: Table | None = None
    wide: bool = False


def drawn(figure: Figure) -> Markup:
    """The element of a figure. One that pans can be reached and moved by the keyboard."""
    parts = [tag("h3", figure.title)]
    if figure.svg is not None and figure.wide:
        pan = {"class_": "pan", "tabindex": 0, "role": "group", "aria_label": figure.title}
        parts.append(tag("div", figure.svg, **pan))
    elif figure.svg is not None:
        parts.append(figure.svg)
    parts.append(tag("figcaption", figure.caption))
    if figure.table is not None:
        parts.append(_unfolding(figure.table))
    return tag("figure", *parts, class_="wide" if figure.wide else None)


def arranged(figures: list[Figure]) -> Markup:
    """Figures in their order: those that are not wide side by side where there is room."""
    groups: list[list[Figure]] = []
    for figure in figures:
        if groups and not figure.wide and not groups[-1][-1].wide:
            groups[-1].append(figure)
        else:
            groups.append([figure])
    return joined(
        drawn(group[0]) if group[0].wide else tag("div", *map(drawn, group), class_="charts few")
        for group in groups
    )


def _unfolding(found: Table) -> Markup:
    numbers = tuple(found.numbers)
    rows = [row(*cells, numbers=numbers) for cells in found.rows]
    if len(rows) > MOST_ROWS:
        left_out = f"… {len(rows) - MOST_ROWS:,} rows …"
        gap = tag("tr", tag("td", left_out, colspan=len(found.head), class_="muted"))
        rows = [*rows[: MOST_ROWS // 2], gap, *rows[-MOST_ROWS // 2 :]]
    return folded(found.summary, table(found.head, rows, numbers))


def key(symbol: str, class_: str, meaning: str) -> Markup:
    """An entry of a legend: a symbol in the colour of its class, and what it means."""
    return tag("span", tag("span", symbol, class_=class_), f" {meaning} ", class_="key")


def swatch(role: str, meaning: str) -> Markup:
    """An entry of a legend: a square in the colour of a role of `roles.ROLES`."""
    return tag("span", tag("i", class_=f"swatch {role}"), f"{meaning} ", class_="key")
