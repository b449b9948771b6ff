"""One SM in clocks: rows of buffers, roles and units, what fills and what waits."""

from ...drawing.axes import Axis, line, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import (
    SMALL,
    STRIP_FONT,
    STRIP_WIDTH,
    boxed_text,
    boxes,
    rect,
    ruler,
    strip,
)
from ..facts.timeline import Piece, Row, TimelineFacts

_LEFT, _RIGHT, _TOP = 140, STRIP_WIDTH - 54, 8
_HEIGHT, _GAP, _GROUP = 21, 4, 9
# Pieces narrower than this, in pixels, have no title.
_THIN = 5.0
_ROLES = {"copy": "copy", "held": "held", "turn": "wait", "wait": "wait", "products": "under"}
_ROLES |= {"exp": "exp", "mask": "edge"}
_SCORES = ("S", "dP")
_UNITS = {"copies": "copies (L2)", "tensor": "tensor cores", "FMA": "FMA units"}
_PRODUCTS = {
    "S": "S = Q Kᵀ",
    "PV": "O += P V",
    "dP": "dP = dO Vᵀ",
    "dV": "dV += Pᵀ dO",
    "dK": "dK += dSᵀ Q",
    "dQ": "dQ += dS K",
}


def figures(facts: TimelineFacts) -> list[Figure]:
    """The rows of one SM, from its first clock on."""
    x, parts, y, group = Axis(0.0, facts.shown.value, _LEFT, _RIGHT), [], _TOP, "buffer"
    for row in facts.rows:
        if row.group != group:
            y, group = y + _GROUP, row.group
            parts.append(line(6, y - 6, _RIGHT, y - 6, "grid"))
            if group == "unit":
                parts.append(text(STRIP_WIDTH - 4, y - 8, "busy", "muted small", "end"))
        drawn, y = _drawn(row, x, y)
        parts += drawn
    unit = "clocks of the SM since its first block began (model of events)"
    parts.append(ruler(x, y + 2, unit))
    return [
        Figure(
            "One SM, clock by clock",
            joined([*_legend(facts), *_said(facts)]),
            strip(_sentence(facts), *parts, height=y + 42),
            Table(
                ("lane", "from", "to", "what", "tile"),
                [
                    (row.name, f"{piece.start:,.0f}", f"{piece.end:,.0f}", piece.kind, piece.label)
                    for row in facts.rows
                    for piece in row.pieces
                ],
                (1, 2),
                "The numbers, in clocks",
            ),
            wide=True,
        )
    ]


def _drawn(row: Row, x: Axis, y: float) -> tuple[list[Markup], float]:
    """A lane from y on, and where the next one begins."""
    several = max(1, len(row.owners))
    height = _HEIGHT if several == 1 else 18 * several
    name = _UNITS.get(row.name, row.name.replace("WG", "warpgroup"))
    parts = [
        text(_LEFT - 8, y + height / 2 + 4, name, None, "end"),
        rect(_LEFT, y, x.end - _LEFT, height, "none"),
    ]
    each, thin = height / several, {}
    # What holds a buffer lies behind what fills it.
    for piece in sorted(row.pieces, key=lambda p: (p.kind != "held", p.start)):
        a, b = x(piece.start), x(piece.end)
        box = a, y + piece.row * each, max(0.5, b - a - 0.6), each - (several > 1)
        role = _role(row, piece)
        if b - a < _THIN:
            thin.setdefault(role, []).append(box)
            continue
        about = f"{name}: {_what(piece)}, {piece.start:,.0f} to {piece.end:,.0f}"
        parts.append(rect(*box, role, about))
        label = piece.kind if piece.kind in ("wait", "turn") else piece.label
        parts.append(boxed_text(box, label, f"on-{role} small", STRIP_FONT * SMALL))
    parts += [boxes(found, role) for role, found in thin.items()]
    if row.group == "unit":
        share = f"{row.busy.value:.0%}"
        parts.append(text(STRIP_WIDTH - 4, y + height / 2 + 4, share, "bold", "end"))
    return parts, y + height + _GAP


def _role(row: Row, piece: Piece) -> str:
    """The colour of a piece: that of its product, or of its work."""
    if piece.kind == "issue":
        product = piece.label.split(" ")[0]
        return _of_product(product) if product in _PRODUCTS else "copy"
    if piece.kind in _PRODUCTS:
        return _of_product(piece.kind)
    return _ROLES.get(piece.kind, "max")


def _of_product(product: str) -> str:
    return "s" if product in _SCORES else "pv"


def _what(piece: Piece) -> str:
    label = "" if piece.label.startswith(piece.kind) else f"{piece.kind} "
    return f"{label}{piece.label}".strip()


def _legend(facts: TimelineFacts) -> list[Markup]:
    scores = [_PRODUCTS[name] for name in facts.products if name in _SCORES]
    sums = [_PRODUCTS[name] for name in facts.products if name not in _SCORES]
    names = {
        "copy": "copy on its way",
        "held": "buffer holds a tile",
        "s": ", ".join(scores),
        "pv": ", ".join(sums),
        "exp": "exponentials",
        "max": "maximum, conversion, other work",
        "edge": "mask",
        "wait": "waits",
        "under": "waits for its products",
    }
    drawn = {_role(row, piece) for row in facts.rows for piece in row.pieces}
    return [swatch(role, name) for role, name in names.items() if role in drawn]


def _sentence(facts: TimelineFacts) -> str:
    busy = next(row.busy.value for row in facts.rows if row.name == facts.unit)
    return f"A turn takes {facts.turn}, and the {_UNITS[facts.unit]} are busy {busy:.0%} of it"


def _said(facts: TimelineFacts) -> list[object]:
    """Three clocks of a turn with their names; what bounds it, what is waited for."""
    several = facts.blocks.value > 1
    who = f"all {facts.blocks} blocks that share the SM are" if several else "the block is"
    bound, rows = _UNITS.get(facts.bound_by, facts.bound_by), {row.name: row for row in facts.rows}
    said: list[object] = [
        tag("b", _sentence(facts)),
        f", until {who} a tile further, by the events drawn here. Products alone take "
        f"{facts.least.value:,.0f}; the model that predicts times, which also counts what chance "
        f"loses, says {facts.calibrated.value:,.0f}. Busiest: {bound}, "
        f"{rows[facts.bound_by].busy.value:.0%}. ",
    ]
    if facts.waits:
        shares = [f"{what} {share.value:.0%}" for what, share in list(facts.waits.items())[:4]]
        said.append(f"Who multiplies waits for {', '.join(shares)} of the time. ")
    if facts.blocks.value > facts.drawn_blocks:
        said.append(f"Of {facts.blocks} blocks {facts.drawn_blocks} have rows. ")
    if not facts.whole:
        said.append(f"Drawn are the first {facts.shown} of a walk of {facts.tiles} tiles. ")
    origin = "from machine code" if facts.rates == "machine code" else "by formula"
    said.append(
        f"Clocks of the softmax are {origin}, those of copies assumed: an ideal machine, not a "
        "measurement."
    )
    return said
