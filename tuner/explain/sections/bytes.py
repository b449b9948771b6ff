"""FLOP, bytes and memory beside standard attention, memory over seqlen, and the backward."""

from ...drawing.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, Labels, chart, circle, line, text
from ...drawing.figures import Figure, Table
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import Bar, bars
from ..facts.bytes import Backward, BytesFacts, Cost, Growth
from ..numbers import Number, written

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_ROLES = {"this call": "s", "standard": "exp", "least": "copy"}
_KINDS = (("flop", "FLOP of products"), ("bytes", "Bytes moved"), ("memory", "Memory"))


def figures(facts: BytesFacts) -> list[Figure]:
    """A chart for each of FLOP, bytes and memory, the growth, and the backward."""
    found = [_kind(facts.ways, name, title) for name, title in _KINDS]
    found.append(_growth(facts.growth))
    return found if facts.backward is None else [*found, _backward(facts.backward)]


_SAID = {
    "flop": "Standard attention multiplies all masked scores; this call those of edge tiles.",
    "bytes": "Standard attention writes and reads S and P; the least is each input read and each "
    "result written once.",
    "memory": "All arrays that exist at once; standard attention has S and P beside them.",
}


def _kind(ways: dict[str, Cost], kind: str, title: str) -> Figure:
    numbers = {name: getattr(way, kind) for name, way in ways.items()}
    found = [Bar(name, n.value, shown(n), _ROLES[name]) for name, n in numbers.items()]
    ratio = numbers["standard"].value / max(1, numbers["this call"].value)
    said = f"{title}: standard attention takes {written(ratio)} times as much as this call"
    rows = [(name, shown(n), f"{n.value:,}", n.origin) for name, n in numbers.items()]
    return Figure(
        title,
        joined([f"Standard attention takes {written(ratio)} times as much. {_SAID[kind]}"]),
        bars(said, found),
        Table(("way", title, "exactly", "origin"), rows, (1, 2)),
    )


def _growth(growth: Growth) -> Figure:
    """Memory over seqlen on two logarithmic axes."""
    ours, standard = growth.ours.value, growth.standard.value
    x = Axis(float(growth.seqlens[0]), float(growth.seqlens[-1]), LEFT, RIGHT, log=True)
    y = Axis(float(ours.min()) / 1.5, float(standard.max()) * 1.5, BOTTOM, TOP, log=True)
    labels, parts = Labels(), _grid(x, y)
    slopes = [f"{slope.value:.3g}" for slope in growth.slopes]
    for values, class_, name in ((ours, "step", "this call"), (standard, "default", "standard")):
        points = [f"{x(n):.1f} {y(v):.1f}" for n, v in zip(growth.seqlens, values, strict=True)]
        parts.append(tag("path", tag("title", name), d=f"M{'L'.join(points)}", class_=class_))
    for values, name, slope, dx, dy, anchor in (
        (ours, "this call", slopes[0], 6, 16, "start"),
        (standard, "standard", slopes[1], -6, -6, "end"),
    ):
        points = [
            (x(float(growth.seqlens[i])) + dx, y(float(values[i])) + dy, anchor)
            for i in (8, 10, 12, 6)
        ]
        labels.add(f"{name}, slope {slope}", "halo", *points)
    rows = [
        (f"{n:,}", shown(Number(a, "counted")), shown(Number(b, "counted")))
        for n, a, b in zip(growth.seqlens.tolist(), ours, standard, strict=True)
    ]
    caption = [
        f"{growth.of[0].upper()}{growth.of[1:]} grow, all else is as in the call. Memory of this "
        f"call grows with the power {slopes[0]}, of standard attention with {slopes[1]}. "
    ]
    said = f"Memory over seqlen: slope {slopes[0]} for this call and {slopes[1]} for standard"
    if growth.available is not None:
        level = y(min(max(growth.available.value, y.low), y.high))
        parts.append(line(x.start, level, x.end, level, "floor", "memory of this GPU"))
        places = [
            (at, level + dy, anchor)
            for dy in (-4, 13)
            for at, anchor in ((x.start + 4, "start"), (x.end - 4, "end"), (x.end / 2, "middle"))
        ]
        labels.add(f"this GPU: {shown(growth.available)}", "muted halo", *places)
        for fits, name in ((growth.standard_fits, "standard"), (growth.ours_fits, "this call")):
            if x.low <= fits.value <= x.high:
                about = f"{name} fits up to {fits} tokens"
                parts.append(circle(x(fits.value), level, 4, "hollow", about))
        caption.append(
            f"This GPU has room for {growth.standard_fits} tokens the standard way, and for "
            f"{growth.ours_fits} this way. "
        )
        rows += [
            ("this GPU", shown(growth.available), ""),
            ("fits", f"{growth.ours_fits} tokens", f"{growth.standard_fits} tokens"),
        ]
    at = growth.here.value
    if x.low <= at <= x.high:
        parts.append(line(x(at), TOP, x(at), BOTTOM, "axis", f"this call: {at:,} tokens"))
        caption.append(f"The upright line is this call's {at:,}. ")
    return Figure(
        "Memory over the length of a sequence",
        joined(caption),
        chart(said, *parts, *labels.drawn()),
        Table((growth.of, "this call", "standard"), rows, (0, 1, 2)),
    )


def _grid(x: Axis, y: Axis) -> list[Markup]:
    """Lines at powers of 1024 bytes, ticks at powers of two."""
    parts = [text(2, 10, "memory", "muted"), line(x.start, BOTTOM, x.end, BOTTOM, "axis")]
    for power in range(0, 80, 10):
        if y.low <= 2.0**power <= y.high:
            at = y(2.0**power)
            name = ("1 B", "1 KiB", "1 MiB", "1 GiB", "1 TiB", "1 PiB", "1 EiB", "1 ZiB")[
                power // 10
            ]
            parts += [
                line(x.start, at, x.end, at, "grid"),
                text(x.start - 5, at + 4, name, "muted", "end"),
            ]
    for power in range(8, 25, 4):
        at = x(2.0**power)
        name = (
            f"{2**power}"
            if power < 10
            else f"{2 ** (power - 10)} Ki"
            if power < 20
            else f"{2 ** (power - 20)} Mi"
        )
        parts += [
            line(at, BOTTOM, at, BOTTOM + 4, "axis"),
            text(min(at, x.end - 8), BOTTOM + 16, name, "muted", "middle"),
        ]
    return [*parts, text(x.end, BOTTOM + 31, "tokens of a sequence", "muted", "end")]


def _backward(backward: Backward) -> Figure:
    """What computing P again costs and saves."""
    again, kept = backward.again, backward.kept
    found = [
        Bar("kept: lse, O", again.memory.value, shown(again.memory), "s"),
        Bar("kept: P", kept.memory.value, shown(kept.memory), "exp"),
        Bar("moved, again", again.bytes.value, shown(again.bytes), "s"),
        Bar("moved, P kept", kept.bytes.value, shown(kept.bytes), "exp"),
    ]
    saved = written(kept.memory.value / max(1, again.memory.value))
    said = f"The backward that computes P again keeps {saved} times less from the forward"
    products = f"{backward.products[0]} products instead of {backward.products[1]}"
    rows = [
        ("kept from the forward", shown(again.memory), shown(kept.memory)),
        ("moved", shown(again.bytes), shown(kept.bytes)),
        ("FLOP", shown(again.flop), shown(kept.flop)),
        ("products", str(backward.products[0]), str(backward.products[1])),
    ]
    return Figure(
        "The backward with and without recomputation",
        joined([f"{said}. It pays with {products} of the size of Q Kᵀ, masked tiles left out."]),
        bars(said, found),
        Table(("", "P computed again", "P kept"), rows, (1, 2)),
    )


def shown(number: Number) -> str:
    """A number of bytes or FLOP in a unit that people read."""
    value = number.value
    if number.unit == "FLOP":
        power, name = next(
            ((p, n) for p, n in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")) if value >= p),
            (1, "FLOP"),
        )
        return f"{written(round(value / power, 2))} {name}"
    size, name = next(((s, n) for s, n in _UNITS if value >= s), (1, "bytes"))
    return f"{written(round(value / size, 2))} {name}"
