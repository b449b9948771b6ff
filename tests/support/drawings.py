"""Where the text of a drawing lies: in an SVG each line of text is a box, whose place is computed.

Widths are those of DejaVu Sans, the widest of the fonts that the drawings name, in thousandths of
the font's size, from " " to "~".
"""

from itertools import combinations
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
_WIDTHS = (
    *(318, 401, 460, 838, 636, 950, 780, 275, 390, 390, 500, 838, 318, 361, 318, 337, 636, 636),
    *(636, 636, 636, 636, 636, 636, 636, 636, 337, 337, 838, 838, 838, 531, 1000, 684, 686, 698),
    *(770, 632, 575, 775, 752, 295, 295, 656, 557, 863, 748, 787, 603, 787, 695, 635, 611, 732),
    *(684, 989, 685, 611, 685, 390, 337, 390, 838, 500, 500, 613, 635, 550, 635, 615, 352, 635),
    *(634, 278, 278, 579, 278, 974, 634, 612, 635, 635, 411, 521, 392, 634, 592, 818, 592, 592),
    *(525, 636, 337, 636, 838),
)
_OTHERS = 1000
_ASCENT, _DESCENT = 0.73, 0.05
Box = tuple[float, float, float, float]


def text_width(line: str, size: float) -> float:
    """Pixels that a line takes."""
    places = (ord(character) - 32 for character in line)
    return size * sum(_WIDTHS[n] if 0 <= n < len(_WIDTHS) else _OTHERS for n in places) / 1000


def text_boxes(drawing: ElementTree.Element, sizes: dict[str, float]) -> list[tuple[str, Box]]:
    """(text, (left, top, right, bottom)) of each line; digits reach down to the baseline only.

    Args:
        drawing: an SVG element.
        sizes: of the font, by class; that of "" is all others'.
    """
    found = []
    for element in drawing.iter(SVG + "text"):
        line = "".join(element.itertext())
        names = [name for name in element.get("class", "").split() if name in sizes]
        size = sizes[names[0] if names else ""]
        width, x, y = text_width(line, size), float(element.get("x")), float(element.get("y"))
        left = x - {"middle": width / 2, "end": width}.get(element.get("text-anchor"), 0)
        box = left, y - _ASCENT * size, left + width, y + _DESCENT * size
        found.append((line, _turned(box, x, y) if element.get("transform") else box))
    return found


def _turned(box: Box, x: float, y: float) -> Box:
    """The box of a line that is turned to read upwards, by rotate(-90 x y)."""
    left, top, right, bottom = box
    return x + top - y, y - (right - x), x + bottom - y, y - (left - x)


def faults(drawing: ElementTree.Element, sizes: dict[str, float]) -> list[str]:
    """Faults of the text of a drawing: lines that it cuts, and lines on each other."""
    _, _, width, height = map(float, drawing.get("viewBox").split())
    boxes = text_boxes(drawing, sizes)
    wrong = [
        f"{line!r} is cut"
        for line, (left, top, right, bottom) in boxes
        if left < 0 or top < 0 or right > width or bottom > height
    ]
    for (a, p), (b, q) in combinations(boxes, 2):
        apart = (min(p[i + 2], q[i + 2]) - max(p[i], q[i]) for i in (0, 1))
        if min(apart) > 0:
            wrong.append(f"{a!r} covers {b!r}")
    return wrong
