"""Elements of HTML and SVG as text in which everything that is not markup has been escaped.

What is written is well-formed as XML too.
"""

import html
import re

# What XML cannot hold: control characters, surrogates and two noncharacters.
_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """Content of an element: markup as it is, anything else as text."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_UNFIT.sub("\ufffd", str(content))))


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
