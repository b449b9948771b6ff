"""Who works when: a row for each SM and slot, and above them the share of slots at work."""

import numpy as np

from ...drawing.axes import Axis, line, text
from ...drawing.figures import Figure, Table, swatch
from ...drawing.markup import Markup, joined, tag
from ...drawing.shapes import STRIP_WIDTH, lanes, rect, ruler, strip
from ..facts.schedule import QUARTERS, ScheduleFacts

_LEFT, _RIGHT, _TOP = 66, STRIP_WIDTH - 12, 78
_CURVE_TOP, _CURVE_BOTTOM = 26, 62
_HEIGHT, _THICKEST = 300.0, 13.0
_MOST_TITLES = 160


def figures(facts: ScheduleFacts) -> list[Figure]:
    """The blocks over the machine in time."""
    x = Axis(0.0, facts.finish.value, _LEFT, _RIGHT)
    slots = -(-facts.slots.value // facts.every) * facts.every
    row = min(_THICKEST, _HEIGHT / slots)
    bottom = _TOP + slots * row
    said = (
        f"Slots are busy {facts.busy.value:.1%} of {facts.finish}: {facts.places} "
        f"{_walks(facts)} over {facts.slots} slots"
    )
    parts = [
        rect(_LEFT, _TOP, _RIGHT - _LEFT, slots * row, "none"),
        *_blocks(facts, x, row),
        *_curve(facts, x),
        *_first_idle(facts, x, bottom),
        ruler(x, bottom, "µs since the first block began (model)"),
        *_names(facts, row),
    ]
    return [
        Figure(
            "Who works when",
            joined([*_legend(facts), *_said(facts)]),
            strip(said, *parts, height=bottom + 40),
            _table(facts),
            wide=True,
        )
    ]


def _walks(facts: ScheduleFacts) -> str:
    return "tiles of rows" if facts.persistent else "blocks"


def _blocks(facts: ScheduleFacts, x: Axis, row: float) -> list[Markup]:
    """A rectangle for each walk that is drawn; of few, each with its own title."""
    height = facts.every * row
    # Thin rows overlap a little, or seams would show between them.
    thickness = height - 0.6 if height > 4 else height + 0.2
    spans = list(zip(*(each.tolist() for each in facts.drawn), strict=True))
    parts, found = [], [[] for _ in range(QUARTERS)]
    for lane, start, end, tiles, quarter in spans:
        a, b = x(start), x(end)
        width, y = b - a - min(0.6, 0.15 * (b - a)), _TOP + lane * row
        found[quarter].append((a, y + height / 2, width))
        if len(spans) <= _MOST_TITLES:
            slot, sm = divmod(lane, facts.sms.value)
            about = f"SM {sm}, slot {slot}: {tiles} tiles, {start:,.1f} to {end:,.1f} µs"
            parts.append(rect(a, y, width, min(thickness, height), f"walk{quarter}", about))
    return parts or [
        lanes(each, thickness, f"walk{quarter}", f"walks of {_range(facts, quarter)} tiles")
        for quarter, each in enumerate(found)
        if each
    ]


def _range(facts: ScheduleFacts, quarter: int) -> str:
    low, high = facts.quarters[quarter]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _curve(facts: ScheduleFacts, x: Axis) -> list[Markup]:
    up = Axis(0.0, 1.0, _CURVE_BOTTOM, _CURVE_TOP)
    times, shares = (each.tolist() for each in facts.curve)
    path = f"M{_LEFT} {_CURVE_BOTTOM}"
    path += "".join(
        f"H{x(time):.1f}V{up(share):.1f}" for time, share in zip(times, shares, strict=True)
    )
    return [
        tag("path", d=f"{path}V{_CURVE_BOTTOM}z", class_="area"),
        line(_LEFT, _CURVE_BOTTOM, _RIGHT, _CURVE_BOTTOM, "axis"),
        text(_LEFT - 6, _CURVE_TOP + 6, "100 %", "muted small", "end"),
        text(_LEFT - 6, _CURVE_BOTTOM + 1, "0 %", "muted small", "end"),
        text(_LEFT, 14, "share of slots at work", "muted"),
    ]


def _first_idle(facts: ScheduleFacts, x: Axis, bottom: float) -> list[Markup]:
    at, said = x(facts.first_idle.value), f"first idle slot: {facts.first_idle}"
    side = (at - 4, "end") if at > STRIP_WIDTH / 2 else (max(at, _LEFT + 170) + 4, "start")
    return [
        line(at, 18, at, bottom, "default", said),
        text(side[0], 14, said, "label-default halo", side[1]),
    ]


def _names(facts: ScheduleFacts, row: float) -> list[Markup]:
    """The first and the last SM of each slot, where there is room; and the slots."""
    sms, slots, parts = facts.sms.value, facts.resident.value, []
    height = sms * row
    for slot in range(slots):
        y = _TOP + slot * height
        if slot:
            parts.append(line(6, y, _RIGHT, y, "axis"))
        middle = text(_LEFT - 6, y + height / 2 + 4, f"slot {slot}", None, "end")
        if height >= 44 or slots == 1:
            parts.append(text(_LEFT - 6, y + 10, "SM 0", "muted small", "end"))
            if sms > 1 and height >= 24:
                parts.append(
                    text(_LEFT - 6, y + height - 2, f"SM {sms - 1}", "muted small", "end")
                )
            parts += [middle] if slots > 1 else []
        elif height >= 14 or slot % max(1, round(14 / height)) == 0:
            parts.append(middle)
    return parts


def _legend(facts: ScheduleFacts) -> list[Markup]:
    present = np.unique(facts.drawn[4])
    return [swatch(f"walk{n}", f"{_range(facts, n)} tiles") for n in present.tolist()]


def _said(facts: ScheduleFacts) -> list[object]:
    places, slots, sms = facts.places, facts.slots, facts.sms
    if facts.draws:
        how = (
            f"{facts.blocks} persistent blocks draw {places} tiles of rows one by one: who is "
            "through with a tile takes the next one that nobody has. "
        )
    elif facts.persistent:
        how = (
            f"{facts.blocks} persistent blocks deal {places} tiles of rows out among themselves, "
            "to and fro: who has the longest of one round has the shortest of the next. "
            f"Each takes {facts.places.value / facts.blocks.value:.3g}. "
        )
    else:
        how = (
            f"{places} blocks start in their order on whichever of {slots} slots ({sms} SMs x "
            f"{facts.resident}) is free first. "
        )
    said: list[object] = [
        how,
        tag("b", f"Slots are busy {facts.busy.value:.1%} of the time"),
        f"; {facts.tail.value:.1%} is lost after the first slot has nothing left to do. "
        f"The last block ends after {facts.finish}",
    ]
    if facts.predicted is not None:
        said.append(
            f"; the model, which also counts the launch and device memory, predicts "
            f"{facts.predicted}"
        )
    said.append(". ")
    if facts.opposite is not None:
        longer = f"{facts.opposite.value:+.0%}"
        longer = "as long" if longer in ("+0%", "-0%") else longer
        said.append(
            f"Started from the shortest to the longest, the same blocks would take {longer}. "
        )
    if facts.every > 1:
        said.append(f"Every {facts.every}th row is drawn, {facts.every} times as high. ")
    said += [f"{note[0].upper()}{note[1:]}. " for note in facts.notes]
    return said


def _table(facts: ScheduleFacts) -> Table:
    lane, start, end, tiles, _ = facts.drawn
    order = np.lexsort((lane, start))
    slot, sm = np.divmod(lane[order], facts.sms.value)
    columns = sm, slot, tiles[order], start[order].round(1), end[order].round(1)
    rows = list(zip(*(each.tolist() for each in columns), strict=True))
    return Table(("SM", "slot", "tiles", "from, µs", "to, µs"), rows, range(5))
