"""Elements of HTML and SVG as text in which everything that is not markup has been escaped.

The result is well-formed as XML, too.
"""

import html


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """Content of an element: markup as it is, anything else as text.

    Unprintable characters become replacement characters: XML cannot hold control characters and
    surrogates, and marks that turn the direction of writing would disguise a name.
    """
    if isinstance(content, Markup):
        return content
    shown = (c if c.isprintable() or c in "\t\n" else "\ufffd" for c in str(content))
    return Markup(html.escape("".join(shown)))


def joined(contents) -> Markup:
    """One piece of content after the other."""
    return Markup("".join(map(escaped, contents)))


def tag(name: str, *contents: object, **attributes: object) -> Markup:
    """An element. In names of attributes `_` means `-`, at the end nothing: `class_`.

    An attribute that is None is left out; numbers are rounded to a tenth.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{joined(contents)}</{name}>")


def _number(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
