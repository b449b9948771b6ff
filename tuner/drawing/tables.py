"""Tables of a page, and what unfolds."""

from collections.abc import Iterable

from .markup import Markup, escaped, joined, tag


def folded(summary: str, contents: Markup, opened: bool = False) -> Markup:
    """Contents to unfold."""
    return tag("details", tag("summary", summary), contents, open="" if opened else None)


def row(
    *cells: object,
    numbers: Iterable[int] = (),
    classes: dict[int, str] | None = None,
    class_: str | None = None,
) -> Markup:
    """A row; columns in `numbers` are aligned to the right."""
    classes = {**dict.fromkeys(numbers, "n"), **(classes or {})}
    contents = [tag("td", cell, class_=classes.get(i)) for i, cell in enumerate(cells)]
    return tag("tr", *contents, class_=class_)


def table(head: tuple[str, ...], rows: list[Markup], numbers: Iterable[int]) -> Markup:
    """A table that scrolls by itself where the page is narrow."""
    names = [
        tag("th", name, scope="col", class_="n" if i in numbers else None)
        for i, name in enumerate(head)
    ]
    body = joined(rows) if rows else escaped("")
    found = tag("table", tag("thead", tag("tr", *names)), tag("tbody", body))
    return tag("div", found, class_="scroll", tabindex="0")
