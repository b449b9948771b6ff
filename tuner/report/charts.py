"""The charts of a result, each a `Figure`; those of occupancy are in `report.occupancy`."""

import math

from ..drawing.axes import (
    BOTTOM,
    IN_SIGHT,
    LEFT,
    RIGHT,
    RING,
    TOP,
    WIDTH,
    Axis,
    Labels,
    beyond,
    chart,
    circle,
    elided,
    frame,
    line,
    room_of,
    text,
    width_of,
)
from ..drawing.figures import Figure, key
from ..drawing.markup import escaped, joined, tag
from ..drawing.shapes import Bar, bars
from ..drawing.style import HEAT_STEPS
from ..records import FAILURES, Record
from ..search.results import Result, format_ms, parameters, rank_correlation

_STRIP = 12


def described(record: Record) -> str:
    """A record in one line, for a tooltip."""
    parts = [record.config, record.outcome.replace("_", " ")]
    if record.median_ms is not None:
        parts.append(f"{format_ms(record.median_ms)} ms measured")
    if record.predicted_ms is not None:
        parts.append(f"{format_ms(record.predicted_ms)} ms predicted")
    return ", ".join(parts) + (f": {record.reason}" if record.reason else "")


def history(result: Result) -> Figure:
    """Time of each trial, and the best so far.

    Trials beyond `IN_SIGHT` times the best lie at the edge, or are counted in words.
    """
    title = f"History ({result.origin} time)"
    times = [result.time_ms(record) for record in result.records]
    found = [time for time in times if time is not None]
    failures = sum(record.outcome in FAILURES for record in result.records)
    if not found:
        reason = f"No trial has a {result.origin} time; {failures} of {len(times)} failed."
        return Figure(title, escaped(reason))
    is_result = [record.outcome != "estimated" for record in result.records]
    results = [t for t, counts in zip(times, is_result, strict=True) if counts and t is not None]
    best = min(results or found)
    slowest = IN_SIGHT * best
    lines_at = {
        name: time
        for name, time in (("default", result.time_ms(result.default)), ("floor", result.floor))
        if time
    }
    drawn = {n: time for n, time in lines_at.items() if slowest >= time > best / IN_SIGHT}
    shown = [*(time for time in found if time <= slowest), *drawn.values()]
    x = Axis(0.5, len(times) + 0.5, LEFT, RIGHT)
    y = Axis.around(shown, BOTTOM - _STRIP, TOP + _STRIP)
    top = TOP + _STRIP
    ticks = [tick for tick in x.ticks() if tick == int(tick) and tick >= 1]
    marks, labels, path, so_far = [], Labels(), "", math.inf
    for number, (record, time) in enumerate(zip(result.records, times, strict=True), 1):
        about = f"trial {number}: {described(record)}"
        if time is not None:
            class_ = "dot" if record.outcome == result.origin else "hollow"
            at = x(number), y(time) if time <= slowest else top
            marks.append(circle(*at, 2.5, class_, about))
            if time > slowest:
                marks.append(beyond(*at, "up"))
            if result.winner and record.config == result.winner.config:
                marks.append(circle(*at, RING, "ring"))
                labels.keep_clear(*at, RING)
            if time < so_far and is_result[number - 1]:
                path += f"H{at[0]:.1f}V{at[1]:.1f}" if path else f"M{at[0]:.1f} {at[1]:.1f}"
                so_far = time
        elif record.outcome in FAILURES:
            marks.append(line(x(number), TOP, x(number), TOP + 7, "cross", about))
    lines = [tag("path", d=f"{path}H{RIGHT}", class_="step")]
    if "default" in drawn:
        at = y(drawn["default"])
        lines.append(line(LEFT, at, RIGHT, at, "default"))
        labels.add(f"default {format_ms(drawn['default'])}", "label-default halo", *_along(at))
    labels.add(f"best so far {format_ms(best)}", "label-best halo", *_along(y(best), below=True))
    if "floor" in drawn:
        at = y(drawn["floor"])
        lines.append(line(LEFT, at, RIGHT, at, "floor"))
        left_first = sorted(_along(at), key=lambda place: place[0])
        labels.add(f"floor {format_ms(drawn['floor'])}", "muted halo", *left_first)
    legend = [key("●", "k-accent", result.origin)]
    if result.winner:
        legend.append(key("◯", "k-text", "the best"))
    if any(record.outcome == "slow" for record in result.records):
        legend.append(key("○", "k-accent", "stopped early, slow"))
    if not all(is_result):
        legend.append(key("○", "k-accent", "estimated: not compiled, because it could not win"))
    if slower := sum(time > slowest for time in found):
        legend.append(key("↑", "k-accent", f"slower than {format_ms(slowest)} ms ({slower})"))
    if failures:
        legend.append(key("|", "failed", f"failed ({failures})"))
    if others := len(times) - len(found) - failures:
        legend.append(f"{others} without a {result.origin} time are not shown. ")
    for name, time in lines_at.items():
        if name not in drawn:
            side = "above" if time > best else "below"
            legend.append(f"The {name}, {format_ms(time)} ms, is {side} the picture. ")
    return Figure(
        title,
        joined(legend),
        chart(
            f"Time of {len(found)} trials; best {format_ms(best)} ms, "
            f"default {format_ms(lines_at.get('default'))} ms",
            frame(x, y, "trial", "ms", ticks),
            *lines,
            *marks,
            *labels.drawn(),
        ),
    )


def _along(y: float, below: bool = False) -> list[tuple[float, float, str]]:
    """Places for the label of a horizontal line, the usual one first."""
    sides = (y + 13, y - 4) if below else (y - 4, y + 13)
    ends = (RIGHT, "end"), (LEFT + 4, "start"), ((LEFT + RIGHT) / 2, "middle")
    return [(x, at, anchor) for x, anchor in ends for at in sides]


def heat_map(result: Result) -> Figure:
    """The best time for each tile_m and tile_n, whatever the other parameters are."""
    title = f"Best {result.origin} time by tile, ms"
    cells: dict[tuple[int, int], list[Record]] = {}
    for record in result.records:
        config = parameters(result.problem.family, record.config)
        if "tile_m" in config:
            cells.setdefault((config["tile_m"], config["tile_n"]), []).append(record)
    if not cells:
        return Figure(title, escaped("No config that was tried has tiles."))
    times = {}
    for cell, records in cells.items():
        timed = [(result.time_ms(record), record) for record in records if result.time_ms(record)]
        if timed:
            times[cell] = min(timed, key=lambda pair: pair[0])
    fastest = min((time for time, _ in times.values()), default=1.0)
    slowest = max((time for time, _ in times.values()), default=1.0)
    palest = min(slowest, IN_SIGHT * fastest)
    longest = max((width_of(_short(time)) for time, _ in times.values()), default=0.0)
    rows, columns = sorted({m for m, _ in cells}, reverse=True), sorted({n for _, n in cells})
    width = min(64.0, (WIDTH - LEFT - 8) / len(columns))
    height = min(32.0, max(16.0, 180 / len(rows)))
    marks, outline = [], []
    for i, m in enumerate(rows):
        y = TOP + 6 + i * height
        marks.append(text(LEFT - 6, y + height / 2 + 4, m, "muted", "end"))
        for j, n in enumerate(columns):
            x, tried = LEFT + j * width, cells.get((m, n), [])
            box = {"x": x + 0.5, "y": y + 0.5, "width": width - 1.0, "height": height - 1.0}
            where, middle = f"tile {m} x {n}: ", (x + width / 2, y + height / 2 + 4)
            if (m, n) not in times:
                about = where + (f"{len(tried)} tried, none has a time" if tried else "not tried")
                marks.append(tag("rect", tag("title", about), class_="hatched", **box))
                if tried:
                    marks.append(text(*middle, "x", "muted halo", "middle"))
                continue
            time, record = times[m, n]
            step = _heat_step(time, fastest, palest)
            about = f"{where}{described(record)}; {len(tried)} tried"
            marks.append(tag("rect", tag("title", about), class_=f"heat{step}", **box))
            if longest < width:
                marks.append(text(*middle, _short(time), f"on-heat{step}", "middle"))
            if time == fastest and not outline:
                inner = {"x": x + 2, "y": y + 2, "width": width - 4, "height": height - 4}
                outline.append(tag("rect", class_="ring-heat", **inner))
    end = TOP + 6 + len(rows) * height
    for j, n in enumerate(columns):
        marks.append(text(LEFT + (j + 0.5) * width, end + 14, n, "muted", "middle"))
    marks += [
        text(2, 10, "tile_m", "muted"),
        text(LEFT + len(columns) * width, end + 29, "tile_n", "muted", "end"),
    ]
    ramp = [tag("i", class_=f"heat{i}") for i in range(HEAT_STEPS)]
    legend = [
        tag("span", f"{format_ms(fastest)} ", *ramp, f" {format_ms(palest)} ms", class_="ramp"),
        " and more" if slowest > palest else "",
        "; outlined: the fastest; hatched: no time, x if it was tried.",
    ]
    return Figure(
        title,
        joined(legend) if times else escaped("All of them failed."),
        chart(
            f"Best time by tile, {len(times)} tiles from {format_ms(fastest)} to "
            f"{format_ms(slowest)} ms",
            *marks,
            *outline,
            height=end + 34,
        ),
    )


def _short(time: float) -> str:
    """Three significant digits, as in .123, for which a cell has room."""
    return f"{time:.{max(0, 2 - math.floor(math.log10(time)))}f}".removeprefix("0")


def _heat_step(time: float, fastest: float, slowest: float) -> int:
    """0 for the fastest, on a logarithmic scale; the last from `slowest` on."""
    if slowest <= fastest:
        return 0
    share = math.log(time / fastest) / math.log(slowest / fastest)
    return min(HEAT_STEPS - 1, int(share * HEAT_STEPS))


def importances(result: Result) -> Figure:
    """The share of the variation in time that each parameter explains."""
    title = "Which parameters matter"
    shares = sorted(result.importances.items(), key=lambda item: (-item[1], item[0]))
    if not shares:
        return Figure(title, escaped("Too few trials with a time to tell."))
    label = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    found = [Bar(name, share, f"{share:.1%}") for name, share in shares]
    caption = escaped("Share of the variation of the time among the trials.")
    return Figure(title, caption, bars(label, found))


def agreement(result: Result) -> Figure:
    """Predicted against measured time of each config that has both.

    Times of more than `IN_SIGHT` times the shortest lie at the edge.
    """
    title = "Predicted against measured"
    pairs = result.pairs()
    if not pairs:
        return Figure(title, escaped("Nothing to compare: no config has both times."))
    times = [time for _, *both in pairs for time in both]
    longest = IN_SIGHT * min(times)
    x = Axis.around([time for time in times if time <= longest], LEFT, RIGHT)
    y = Axis(x.low, x.high, BOTTOM, TOP, log=True)
    marks, labels = [line(LEFT, BOTTOM, RIGHT, TOP, "default")], Labels()
    labels.add("equal", "label-default halo", (RIGHT - 30, TOP + 12, "end"))
    for record, predicted, measured in pairs:
        at = (
            x(measured) if measured <= longest else RIGHT,
            y(predicted) if predicted <= longest else TOP,
        )
        marks.append(circle(*at, 2.5, "dot", described(record)))
        marks += [beyond(*at, "right")] if measured > longest else []
        marks += [beyond(*at, "up")] if predicted > longest else []
        if record.config == result.best.config:
            marks.append(circle(*at, RING, "ring"))
            label_best(labels, *at)
    rho = rank_correlation([p for _, p, _ in pairs], [m for _, _, m in pairs])
    points = f"{len(pairs)} config" + ("s" if len(pairs) != 1 else "")
    summary = (
        f"Rank correlation is undefined for {points}."
        if rho is None
        else f"Spearman's rank correlation {rho:.3f}, {points}."
    )
    caption = summary
    if outside := sum(max(both) > longest for _, *both in pairs):
        caption += f" Arrows: beyond the picture ({outside})."
    return Figure(
        title,
        escaped(caption),
        chart(summary, frame(x, y, "measured, ms", "predicted, ms"), *marks, *labels.drawn()),
    )


def label_best(labels: Labels, x: float, y: float) -> None:
    """Write "best" next to its ring."""
    labels.keep_clear(x, y, RING)
    sides = [
        (x + side * away, y + down, "start" if side > 0 else "end")
        for away in (8, 16, 32)
        for down in (4, 16, -8)
        for side in (1, -1)
    ]
    labels.add("best", "halo", *sides)


def parts(result: Result) -> Figure:
    """The time that each resource alone would take for the best config, next to the floor."""
    title = "What bounds the best, by the model"
    if result.winner is None:
        return Figure(title, escaped("There is no best: no config has a time."))
    times = result.winner.parts or {}
    if not times:
        return Figure(title, escaped("The model was not asked about the best config."))
    names = sorted({*times, *result.floor_ms}, key=lambda name: -times.get(name, 0.0))
    totals = [("predicted", result.best.predicted_ms), ("measured", result.best.median_ms)]
    totals = [(name, time) for name, time in totals if time]
    row, left, top = 34, room_of(map(str, names)), 8 + 14 * len(totals)
    end = top + len(names) * row
    drawn = [*times.values(), *result.floor_ms.values()]
    longest = max(*drawn, *(time for _, time in totals), 1e-9)
    x = Axis(0.0, longest, left, WIDTH - 6 - max(width_of(format_ms(time)) for time in drawn))
    marks = []
    for i, (name, time) in enumerate(totals):
        marks.append(line(x(time), 6 + 14 * i, x(time), end, "default" if i == 0 else "axis"))
        label = f"{name} {format_ms(time)} ms"
        side = (x(time) + 4, "start") if x(time) < WIDTH / 2 else (x(time) - 4, "end")
        marks.append(text(side[0], 14 + 14 * i, label, "halo", side[1]))
    for i, name in enumerate(names):
        y = top + i * row
        shown = elided(name.replace("_", " "), left - 6)
        marks.append(text(left - 6, y + 12, shown, None, "end"))
        for time, class_, at in (
            (times.get(name), "bar", y + 2),
            (result.floor_ms.get(name), "bar-floor", y + 16),
        ):
            if time is not None:
                about = tag("title", f"{name}: {format_ms(time)} ms")
                marks += [
                    tag(
                        "rect", about, x=left, y=at, width=x(time) - left, height=11, class_=class_
                    ),
                    text(x(time) + 4, at + 10, format_ms(time), "muted halo"),
                ]
    legend = [
        key("■", "k-accent", "the best config, each resource alone"),
        key("■", "k-axis", "floor of the problem"),
    ]
    label = ", ".join(f"{name} {format_ms(times[name])} ms" for name in names if name in times)
    return Figure(title, joined(legend), chart(label, *marks, height=end + 6))
