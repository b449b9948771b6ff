"""8-bit floats: sizes before and after the rotation, scales, flushed elements, errors, heads."""

import numpy as np

from ...drawing.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, Labels, chart, line, text
from ...drawing.figures import Figure, Table, key
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import STRIP_WIDTH, Bar, Mark, bars, rect, ruler, strip
from ...drawing.style import HEAT_STEPS
from ..facts.fp8 import Fp8Facts, Heads, Sizes

_NAME_ROOM, _MOST_CELLS, _ROW = 40.0, 128, 30


def figures(facts: Fp8Facts) -> list[Figure]:
    """The sizes of Q and K, what is flushed, errors, the decision for heads, scales."""
    found = [_sizes(name, sizes, facts) for name, sizes in facts.sizes.items()]
    found += [_flushed(facts), _errors(facts)]
    found += [] if facts.heads is None else [_heads(facts.heads, facts.budget.value)]
    return [*found, _scales(facts)]


def _sizes(name: str, sizes: Sizes, facts: Fp8Facts) -> Figure:
    """Two outlines over one logarithmic axis."""
    upper = name.upper()
    x = Axis(float(sizes.edges[0]), float(sizes.edges[-1]), LEFT, RIGHT, log=True)
    most = float(max(sizes.before.max(), sizes.after.max()))
    y = Axis(0.0, most * 1.15 or 1.0, BOTTOM, TOP + 14)
    parts, labels = [_ground(x, y)], Labels()
    outlines = ((sizes.before, "default", "before"), (sizes.after, "step", "rotated"))
    for shares, class_, about in outlines:
        path = f"M{x.start:.1f} {y(0):.1f}"
        for share, edge in zip(shares, sizes.edges[1:], strict=True):
            path += f"V{y(float(share)):.1f}H{x(float(edge)):.1f}"
        path += f"V{y(0):.1f}"
        title = tag("title", f"|{name}| {about}: largest {sizes.largest[class_ == 'step']}")
        parts.append(tag("path", title, d=path, class_=class_))
    for value, said in (
        (sizes.reach[1].value, "448 x scale"),
        (sizes.smallest[1].value, "smallest code"),
    ):
        if x.low <= value <= x.high:
            parts.append(line(x(value), TOP + 14, x(value), BOTTOM, "floor", said))
            labels.add(
                said,
                "muted halo",
                (x(value) - 4, TOP + 10, "end"),
                (x(value) + 4, TOP + 10, "start"),
            )
    before, after = sizes.largest
    said = f"The largest |{name}| is {before} before the rotation and {after} after it"
    rows = [
        (f"{edge:.3g}", f"{a:.2%}", f"{b:.2%}")
        for edge, a, b in zip(sizes.edges, sizes.before, sizes.after, strict=False)
    ]
    caption = [
        key("- - -", "k-second", "before"),
        key("—", "k-accent", "rotated"),
        f"{said}. Rotated rows have the same length, so Q Kᵀ stays the same. Dotted: what the "
        f"largest and the smallest code stand for, by a scale in the middle. "
        f"{facts.tokens[name == 'k']} tokens of one head, {facts.elements}.",
    ]
    return Figure(
        f"Sizes of {upper}, before and after the rotation",
        joined(caption),
        chart(said, *parts, *labels.drawn()),
        Table((f"|{name}| from", "before", "rotated"), rows, (0, 1, 2)),
    )


def _ground(x: Axis, y: Axis) -> Markup:
    """The axis of sizes at powers of 16, and shares."""
    parts = [
        line(x.start, BOTTOM, x.end, BOTTOM, "axis"),
        text(2, 10, "share of elements", "muted"),
    ]
    for tick in y.ticks(4):
        parts += [
            line(x.start, y(tick), x.end, y(tick), "grid"),
            text(x.start - 5, y(tick) + 4, f"{tick:.0%}", "muted", "end"),
        ]
    first = int(np.ceil(np.log2(x.low) / 4)) * 4
    for power in range(first, int(np.log2(x.high)) + 1, 4):
        at = x(2.0**power)
        parts.append(line(at, BOTTOM, at, BOTTOM + 4, "axis"))
        parts.append(text(min(at, x.end - 12), BOTTOM + 16, f"2^{power}", "muted", "middle"))
    return joined([*parts, text(x.end, BOTTOM + 31, "absolute value", "muted", "end")])


def _flushed(facts: Fp8Facts) -> Figure:
    """Shares of elements that become 0."""
    found, rows = [], []
    for name, sizes in facts.sizes.items():
        for about, share, role in (
            ("", sizes.flushed[0].value, "exp"),
            (", rotated", sizes.flushed[1].value, "s"),
        ):
            found.append(Bar(f"{name.upper()}{about}", share, f"{share:.3%}", role))
    found.append(Bar("V", facts.flushed_v.value, f"{facts.flushed_v.value:.3%}", "pv"))
    rows = [(bar.name, bar.shown) for bar in found]
    worst = max(found, key=lambda bar: bar.value)
    said = f"At most {worst.shown} of the elements are flushed to 0, those of {worst.name}"
    return Figure(
        "Elements flushed to 0",
        joined(
            [
                f"{said}. They are not 0, and their code is: they are smaller than half of the "
                f"smallest code, {facts.recipe}."
            ]
        ),
        bars(said, found),
        Table(("array", "flushed"), rows, (1,)),
    )


def _errors(facts: Fp8Facts) -> Figure:
    """Errors of the result beside the budget."""
    roles = {"16 bits": "s", "32 bits": "s", "8 bits": "exp", "8 bits, not rotated": "max"}
    found = [Bar(name, n.value, f"{n.value:.2%}", roles[name]) for name, n in facts.errors.items()]
    share = facts.errors["8 bits"].value
    verdict = "within" if share <= facts.budget.value else "beyond"
    said = f"8 bits have an error of {share:.2%} of the result, {verdict} the budget"
    rows = [(name, f"{n.value:.3e}", n.origin) for name, n in facts.errors.items()]
    rows.append(("budget", f"{facts.budget.value:.3e}", facts.budget.origin))
    queries, keys = facts.part
    return Figure(
        "Error of the result",
        joined(
            [
                f"{said}. Root mean square, relative to the result, of {queries} queries and "
                f"{keys} keys of one head, by the specifications of the kernels in float64. The "
                "budget is that of max_rel_error."
            ]
        ),
        bars(said, found, [Mark(facts.budget.value, f"budget {facts.budget.value:.0%}")]),
        Table(("way", "error", "origin"), rows, (1,)),
    )


def _heads(heads: Heads, budget: float) -> Figure:
    """The estimate for each key-value head."""
    values = heads.estimated.value
    found = [
        Bar(
            f"head {i}{' 16 bits' if i in heads.in_16_bits else ''}",
            float(value),
            f"{value:.1%}",
            "exp" if i in heads.in_16_bits else "s",
        )
        for i, value in enumerate(values)
    ]
    some = ", ".join(map(str, heads.in_16_bits))
    stay = f"heads {some} stay" if len(heads.in_16_bits) > 1 else f"head {some} stays"
    said = f"Key-value {stay} in 16 bits" if some else "All key-value heads are computed in 8 bits"
    return Figure(
        "Heads that stay in 16 bits",
        joined(
            [
                f"{said}. The kernel's estimate, from the first {heads.tokens.value} tokens of "
                "the first batch entry."
            ]
        ),
        bars(said, found, [Mark(budget, f"budget {budget:.0%}")]),
        Table(
            ("head", "estimated error", "computed in"),
            [
                (i, f"{v:.3e}", "16 bits" if i in heads.in_16_bits else "8 bits")
                for i, v in enumerate(values)
            ],
            (0, 1),
        ),
    )


def _scales(facts: Fp8Facts) -> Figure:
    """A row of each array, over tokens; the darkest is the largest scale."""
    every = np.concatenate(list(facts.scales.values()))
    low, high = float(every.min()), float(every.max())
    tokens = max(n.value for n in facts.tokens)
    x = Axis(0.0, float(tokens), _NAME_ROOM, STRIP_WIDTH - 40)
    parts, rows = [], []
    for at, (name, scales) in enumerate(facts.scales.items()):
        y = 10 + at * _ROW
        parts.append(text(_NAME_ROOM - 10, y + 17, name.upper(), "bold", "end"))
        own = facts.tokens[name != "q"].value
        step = -(-len(scales) // _MOST_CELLS)
        width = own / max(1, -(-len(scales) // step))
        for i, begin in enumerate(range(0, len(scales), step)):
            value = float(scales[begin : begin + step].max())
            left, right = x(i * width), x(min(own, (i + 1) * width))
            heat = f"heat{_heat(value, low, high)}"
            about = f"{name.upper()}, tokens from {round(i * width):,}: scale {value:.3g}"
            parts.append(rect(left, y, max(0.4, right - left - 0.6), _ROW - 6, heat, about))
        rows.append(
            (
                name.upper(),
                len(scales),
                *(f"{v:.3g}" for v in (scales.min(), np.median(scales), scales.max())),
            )
        )
    bottom = 12 + _ROW * len(facts.scales)
    said = f"Scales lie between {low:.3g} and {high:.3g}, a factor of {high / low:.3g}"
    ramp = tag("span", *(tag("i", class_=f"heat{i}") for i in range(HEAT_STEPS)), class_="ramp")
    return Figure(
        "Scales over tokens",
        joined(
            [
                ramp,
                f" from {high:.3g} to {low:.3g}. {said}: {facts.recipe}; V is never rotated. "
                "A number in Q is code times scale.",
            ]
        ),
        strip(said, *parts, ruler(x, bottom, "tokens"), height=bottom + 38),
        Table(("array", "scales", "smallest", "median", "largest"), rows, (1, 2, 3, 4)),
        wide=True,
    )


def _heat(value: float, low: float, high: float) -> int:
    """0 is the largest."""
    if high <= low:
        return HEAT_STEPS // 2
    share = np.log(high / value) / np.log(high / low)
    return int(min(HEAT_STEPS - 1, share * HEAT_STEPS))
