"""A page: one HTML document, well-formed as XML too, without scripts, complete in itself."""

from .markup import Markup, tag
from .style import STYLE

_HATCH = tag(
    "svg",
    tag(
        "defs",
        tag(
            "pattern",
            tag("line", x1=0, y1=0, x2=0, y2=6, class_="hatch"),
            id="hatch",
            width=6,
            height=6,
            patternUnits="userSpaceOnUse",
            patternTransform="rotate(45)",
        ),
    ),
    xmlns="http://www.w3.org/2000/svg",
    class_="defs",
    width=0,
    height=0,
    aria_hidden="true",
)


def document(title: str, *contents: object) -> str:
    """A page of these elements, which may fill marks with the pattern `#hatch`."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"{tag('title', title)}<style>{STYLE}</style></head>\n"
        f"<body>{_HATCH}{tag('main', *contents)}</body></html>\n"
    )


def standalone(svg: Markup) -> str:
    """A chart as a file of its own: with its colours, and the ground that they are meant for."""
    head, rest = svg.split(">", 1)
    ground = tag("rect", width="100%", height="100%", class_="ground")
    return f"{head}><style>{STYLE}</style>{ground}{rest}\n"
