"""What is wrong with a page: its markup, what it fetches, the text of its drawings.

A new kind of fault gets a function here and a page that has it in
`tests/host/tuner/drawing/test_pages.py`.
"""

import re
from xml.etree import ElementTree

from tests.support.drawings import SVG, faults
from tuner.drawing.axes import FONT
from tuner.drawing.shapes import SMALL, STRIP_FONT
from tuner.drawing.style import STYLE

REPOSITORY = "https://github.com/"
"""Where a page's links may lead, beside the page itself."""
_ACTIVE = {"script", "link", "img", "iframe", "object", "embed", "image", "use", "foreignObject"}
_ALLOWED = {"http://www.w3.org/2000/svg", "url(#hatch)"}
_FONTS = {"chart": FONT, "strip": STRIP_FONT}
_MARKS = {"rect", "path", "line", "circle", "text"}
_KNOWN = set(re.findall(r"\.([A-Za-z][\w-]*)", STYLE))


def page_faults(text: str, most_bytes: int = 400_000, tables: bool = True) -> list[str]:
    """The faults of a page, each in a line; none if it is as it should be.

    Args:
        text: the page.
        most_bytes: that it may have.
        tables: whether each figure with a drawing must have its numbers in a table.
    """
    try:
        root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    except ElementTree.ParseError as error:
        return [f"not well-formed: {error}"]
    found = _fetched(text, root) + _links(root)
    for drawing in root.iter(SVG + "svg"):
        if drawing.get("class") != "defs":
            found += drawing_faults(drawing)
    if tables:
        found += _without_table(root)
    if re.search(r"\b(nan|inf|None)\b", " ".join(root.find("body").itertext())):
        found.append("says nan, inf or None")
    if (size := len(text.encode())) > most_bytes:
        found.append(f"{size:,} bytes, of {most_bytes:,} at most")
    return found


def drawing_faults(drawing: ElementTree.Element) -> list[str]:
    """The faults of one SVG element."""
    label = drawing.get("aria-label") or ""
    found = []
    if drawing.get("role") != "img" or len(label.split()) < 4:
        found.append(f"is no image with a sentence: {label!r}")
    font = _FONTS.get(drawing.get("class"))
    if font is None:
        return [f"{label!r} is neither chart nor strip"]
    found += faults(drawing, {"": font, "small": font * SMALL})
    found += _outside(drawing)
    for element in drawing.iter():
        names = set((element.get("class") or "").split())
        if _name(element) in _MARKS and names - _KNOWN:
            found.append(f"no rule for the class {' '.join(names - _KNOWN)}")
        if _name(element) in _MARKS - {"text"} and not names:
            found.append(f"a {_name(element)} without a class")
    return [f"{label[:60]!r}: {fault}" for fault in found]


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _fetched(text: str, root: ElementTree.Element) -> list[str]:
    found = [f"has a {name}" for name in sorted({_name(e) for e in root.iter()} & _ACTIVE)]
    for element in root.iter():
        for name in element.attrib:
            if name.startswith("on") or name == "src":
                found.append(f"{_name(element)} has {name}")
    urls = set(re.findall(r"https?://[^\"' )<&]*|url\([^)]*\)|@import", text)) - _ALLOWED
    return found + [f"names {url}" for url in sorted(urls) if not url.startswith(REPOSITORY)]


def _links(root: ElementTree.Element) -> list[str]:
    names = [e.get("id") for e in root.iter() if e.get("id")]
    found = [f"two elements are {name}" for name in sorted(set(names)) if names.count(name) > 1]
    for element in root.iter("a"):
        link = element.get("href") or ""
        if not link.startswith(REPOSITORY) and link.removeprefix("#") not in names:
            found.append(f"a link leads nowhere: {link!r}")
    return found


def _without_table(root: ElementTree.Element) -> list[str]:
    return [
        f"figure {figure.findtext('h3')!r} has no table"
        for figure in root.iter("figure")
        if figure.find(f".//{SVG}svg") is not None and figure.find("details//table") is None
    ]


def _outside(drawing: ElementTree.Element) -> list[str]:
    """Marks beyond the view box, by their corners; of a path its points after M."""
    _, _, width, height = map(float, drawing.get("viewBox").split())
    found = []
    for element in drawing.iter():
        for x, y in _corners(element):
            if not (-0.1 <= x <= width + 0.1 and -0.1 <= y <= height + 0.1):
                found.append(f"a {_name(element)} at {x:g}, {y:g} lies outside")
                break
    return found


def _corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    def of(*names):
        return [float(element.get(name, 0)) for name in names]

    match _name(element):
        case "rect":
            x, y, width, height = of("x", "y", "width", "height")
            return [(x, y), (x + width, y + height)]
        case "line":
            x, y, x2, y2 = of("x1", "y1", "x2", "y2")
            return [(x, y), (x2, y2)]
        case "circle":
            x, y, r = of("cx", "cy", "r")
            return [(x - r, y - r), (x + r, y + r)]
        case "path":
            starts = re.findall(r"M(-?[\d.]+) (-?[\d.]+)", element.get("d"))
            ends = re.findall(r"M(-?[\d.]+) (-?[\d.]+)h(-?[\d.]+)v(-?[\d.]+)", element.get("d"))
            corners = [(float(x), float(y)) for x, y in starts]
            return corners + [(float(x) + float(w), float(y) + float(h)) for x, y, w, h in ends]
    return []
