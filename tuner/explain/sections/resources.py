"""Where a kernel's time goes: roofs, parts alone, a turn of its main loop, its share of an SM."""

from ...drawing.axes import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Labels,
    chart,
    circle,
    cross,
    frame,
    line,
    text,
)
from ...drawing.figures import Figure, Table
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import (
    SMALL,
    STRIP_FONT,
    STRIP_WIDTH,
    Bar,
    Mark,
    bars,
    boxed_text,
    rect,
    strip,
)
from ..facts.resources import ResourceFacts, Roofline, Share, Turn
from ..numbers import Number, written

_ROLES = {
    **{"matrix": "s", "products": "s", "exponential": "exp", "exponentials": "exp"},
    **{"memory": "copy", "L2": "copy", "shared memory": "copy", "latency": "bar-floor"},
    **{"alu": "max", "maxima, conversions": "max"},
}
_TILES = {"Q": "s", "DO": "s", "K": "copy", "V": "copy", "O": "pv", "P": "pv"}
_EDGE = 8


def figures(facts: ResourceFacts) -> list[Figure]:
    """The roofs, the parts, the turn and the share."""
    found = [] if facts.roofline is None else [_roofline(facts.roofline)]
    found += [] if facts.predicted is None else [_parts(facts)]
    found += [] if facts.turn is None else [turn_figure(facts.turn, facts.no_code)]
    return [*found, share_figure(facts.share, facts.no_code)]


def _roofline(roof: Roofline) -> Figure:
    here, reached = roof.intensity.value, roof.reached.value
    points = [here, roof.standard_intensity.value]
    heights = [reached, roof.tensor.value, roof.exponential.value, roof.standard.value]
    x = Axis(
        min(points) / 2,
        max(*points, 1e3 * roof.tensor.value / roof.memory.value) * 3,
        LEFT,
        RIGHT,
        log=True,
    )
    y = Axis(min(heights) / 3, max(heights) * 1.8, BOTTOM, TOP, log=True)
    slope = roof.memory.value / 1e3
    ticks = [tick for tick in x.ticks() if x(tick) < x.end - 12]

    def up(level: float) -> Markup:
        """The roof of memory up to a level, then that level."""
        begin = max(x.low, y.low / slope)
        bend = min(max(begin, level / slope), x.high)
        start = min(level, begin * slope)
        path = f"M{x(begin):.1f} {y(start):.1f}L{x(bend):.1f} {y(level):.1f}H{x.end:.1f}"
        return tag(
            "path",
            tag("title", f"device memory, then {level:,.0f} TFLOP/s"),
            d=path,
            class_="curve",
        )

    tensor, exponential = roof.tensor.value, roof.exponential.value
    at, level = x(min(x.high, exponential / slope)), y(exponential)
    labels = Labels()
    labels.keep_clear(x(here), y(reached), 7)
    above = -5 if tensor >= exponential else 13
    for said, value, shift in (
        (f"tensor cores {tensor:,.0f}", tensor, above),
        (f"exponentials {exponential:,.0f}", exponential, 8 - above),
    ):
        labels.add(said, "halo", (x.end - 2, y(value) + shift, "end"), (x.end - 2, 10, "end"))
    beside = [
        (x(here) + dx, y(reached) + dy, anchor)
        for dx, dy, anchor in ((-9, 4, "end"), (-9, 16, "end"), (0, 20, "middle"))
    ]
    labels.add(f"this kernel {reached:,.0f}", "label-best halo", *beside)
    other = x(roof.standard_intensity.value), y(roof.standard.value)
    said = f"standard, at most {roof.standard.value:,.0f}"
    labels.add(
        said,
        "muted halo",
        (other[0] + 8, other[1] + 12, "start"),
        (other[0] + 8, other[1] - 6, "start"),
    )
    parts = [
        frame(x, y, "FLOP a byte of device memory", "TFLOP/s", ticks),
        up(tensor),
        line(at, level, x.end, level, "default", f"exponentials: {exponential:,.0f} TFLOP/s"),
        cross(*other, "cross", said),
        circle(x(here), y(reached), 5, "dot", f"{reached:,.0f} TFLOP/s, {here:,.0f} FLOP a byte"),
        *labels.drawn(),
    ]
    lowest = min(tensor, exponential, here * slope)
    name = {tensor: "tensor cores", exponential: "exponentials"}.get(lowest, "device memory")
    caption = (
        f"{_giga(roof.flop)} GFLOP without masked scores, {_mib(roof.bytes)} MiB from and to "
        f"device memory. The lowest roof above this kernel is that of {name}: it is predicted to "
        f"reach {reached / lowest:.0%} of it. Dashed are the exponentials: 4 head_dim FLOP go "
        "with each, and an SM has 16 a clock. The cross is attention that stores S and P."
    )
    rows = [(name, str(getattr(roof, name)), getattr(roof, name).origin) for name in vars(roof)]
    said = (
        f"{reached:,.0f} TFLOP/s predicted at {here:,.0f} FLOP a byte, {reached / lowest:.0%} of "
    )
    return Figure(
        "Three roofs",
        joined([caption]),
        chart(f"{said}what {name} would allow", *parts),
        Table(("what", "number", "origin"), [(n.replace("_", " "), *r) for n, *r in rows], (1,)),
    )


def _parts(facts: ResourceFacts) -> Figure:
    """Each part of the machine alone."""
    found = [
        Bar(
            name,
            ms.value,
            f"{_time(ms)}, {ms.value / facts.predicted.value:.0%}",
            _ROLES.get(name, "walk2"),
            f"{name} alone: {_time(ms)}",
        )
        for name, ms in facts.parts.items()
    ]
    marks = [
        Mark(facts.predicted.value, f"predicted {_time(facts.predicted)}"),
        Mark(facts.floor.value, f"at least {_time(facts.floor)}", "floor"),
    ]
    if facts.measured is not None:
        marks.append(Mark(facts.measured.value, f"measured {_time(facts.measured)}", "axis"))
    first = next(iter(facts.parts))
    said = f"{first} alone would take {_time(facts.parts[first])} of {_time(facts.predicted)}"
    rows = [(name, _time(ms), ms.origin) for name, ms in facts.parts.items()]
    rows += [
        ("predicted", _time(facts.predicted), "model"),
        ("floor", _time(facts.floor), "model"),
    ]
    rows += [("measured", _time(facts.measured), "measured")] if facts.measured else []
    caption = (
        "Bars add up to more than the whole, because parts overlap. No kernel beats the floor."
    )
    return Figure(
        "If everything else were free",
        joined([f"What each part of the machine takes by itself. {caption}"]),
        bars(said, found, marks),
        Table(("part", "time", "origin"), rows, (1,)),
    )


def turn_figure(turn: Turn, no_code: str) -> Figure:
    """The clocks of a turn of the main loop, by unit."""
    origin = next(iter(turn.clocks.values())).origin
    source = "from machine code" if origin == "machine code" else "by formula"
    found = [
        Bar(
            name,
            n.value,
            f"{n.value:,.0f}",
            _ROLES.get(name, "walk2"),
            f"{name}: {n.value:,.0f} clocks",
        )
        for name, n in turn.clocks.items()
    ]
    longest = max(turn.clocks, key=lambda name: turn.clocks[name].value)
    said = f"A turn of {turn.of} asks {longest} for {turn.clocks[longest].value:,.0f} clocks"
    caption = [f"{said}, the most of all. "]
    if turn.overlapped is not None:
        caption.append(
            f"{turn.overlapped} of {turn.exponentials} exponentials are issued while "
            "products run. "
        )
    if turn.skipped:
        kept = ", ".join(f"{n} for {name}" for name, n in turn.skipped.items())
        caption.append(f"Instructions off the steady path: {kept}. ")
    caption.append(f"By formula: {no_code}." if no_code else "")
    rows = [(f"clocks of {name}", f"{n.value:,.0f}", n.origin) for name, n in turn.clocks.items()]
    rows += [(f"instructions: {name}", str(n), n.origin) for name, n in turn.instructions.items()]
    rows += [(f"passed over: {name}", str(n), n.origin) for name, n in turn.skipped.items()]
    return Figure(
        f"A turn of the main loop, {source}",
        joined(caption),
        bars(said, found),
        Table(("what", "number", "origin"), rows, (1,)),
    )


def share_figure(share: Share, no_code: str) -> Figure:
    """Shared memory and registers of an SM, with all blocks that fit."""
    blocks = max(1, 1 if share.blocks is None else share.blocks.value)
    memory = Axis(0.0, float(share.sm_bytes.value), _EDGE, STRIP_WIDTH - _EDGE)
    total = f"{share.sm_bytes.value / 1024:,.0f} KiB"
    parts, at = [text(_EDGE, 14, f"shared memory of an SM: {total}", "muted")], 0.0
    for block in range(blocks):
        begin = at
        for buffer in share.buffers:
            size = buffer.bytes.value
            role = _TILES.get(buffer.name.split()[0].upper(), "walk3")
            about = f"block {block}, {buffer.name}: {size:,.0f} bytes from {at:,.0f} on"
            parts += _box(memory, at, size, 22, role, buffer.name, f"{size / 1024:.3g} K", about)
            at += size
        at = begin + max(share.smem_bytes.value, at - begin) + share.reserved.value
    at = min(at, share.sm_bytes.value)
    free = share.sm_bytes.value - at
    parts += _box(
        memory, at, free, 22, "none", "free", f"{free / 1024:.3g} K", f"{free:,.0f} bytes free"
    )
    height = 68
    if share.holders:
        parts += _registers(share, blocks)
        height = 138
    smem = f"{share.smem_bytes.value / 1024:.1f} of {total}"
    said = f"A block has {share.threads} threads and {smem} of shared memory"
    caption = [f"{said}. "]
    if share.blocks is not None:
        caption.append(f"{share.blocks} of them on an SM at once, limited by {share.limited_by}. ")
        lost = share.spilled.value
        caption.append(
            f"{lost:,} bytes a thread are spilled. " if lost else "Nothing is spilled. "
        )
    caption.append(f"Registers are not known: {no_code}." if no_code else "")
    rows = [(b.name, f"{b.bytes.value:,.0f} bytes", b.bytes.origin) for b in share.buffers]
    rows += [
        (
            f"registers of {h.name}",
            f"{h.named} of {h.available} a thread, {h.registers}",
            h.registers.origin,
        )
        for h in share.holders
    ]
    return Figure(
        "What a block takes of an SM",
        joined(caption),
        strip(said, *parts, height=height),
        Table(("what", "size", "origin"), rows, (1,)),
        wide=True,
    )


def _registers(share: Share, blocks: int) -> list[Markup]:
    """Registers of each holder: dark those that its code names."""
    axis = Axis(0.0, float(share.sm_registers.value), _EDGE, STRIP_WIDTH - _EDGE)
    parts = [text(_EDGE, 84, f"registers of an SM: {share.sm_registers} of 32 bits", "muted")]
    at = 0
    for block in range(blocks):
        for holder in share.holders:
            size, of_thread = holder.registers.value, holder.available.value
            said = f"{holder.named} of {holder.available} a thread"
            about = f"block {block}, {holder.name}: {holder.registers} registers, {said}"
            parts += _box(axis, at, size, 92, "under", "", "", about)
            used = size * holder.named.value / of_thread
            parts += _box(axis, at, used, 92, "s", holder.name, said, about)
            at += size
    free = max(0, share.sm_registers.value - at)
    return parts + _box(
        axis, at, free, 92, "none", "free", f"{free:,}", f"{free:,} registers free"
    )


def _box(
    axis: Axis, at: float, size: float, y: float, role: str, name: str, more: str, about: str
):
    """A box with up to two lines of text, where they have room."""
    if size <= 0:
        return []
    left, right = axis(at), min(axis(at + size), axis.end)
    width = max(0.4, right - left - 1)
    found = [rect(left, y, width, 40, role, about)]
    for line_of, top in ((name, y + 2), (more, y + 20)):
        if line_of:
            box = (left, top, width, 18.0)
            found.append(boxed_text(box, line_of, f"on-{role} small", STRIP_FONT * SMALL))
    return found


def _giga(number: Number) -> str:
    return written(round(number.value / 1e9, 1))


def _mib(number: Number) -> str:
    return written(round(number.value / 2**20, 1))


def _time(ms: Number) -> str:
    return (
        f"{written(ms.value)} ms" if ms.value >= 1 else f"{written(round(ms.value * 1e3, 1))} µs"
    )
