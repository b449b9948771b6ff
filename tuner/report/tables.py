"""The report's tables: the summary, all trials, pruned configs and failures."""

import re
from collections.abc import Iterable

from ..drawing.markup import Markup, tag
from ..drawing.tables import row, table
from ..records import FAILURES, Record
from ..search.results import Result, format_ms, parameters

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def summary(results: list[Result]) -> Markup:
    """A row per result, linked to its section; predicted times begin with ~."""
    device = ("device",) if len({result.device for result in results}) > 1 else ()
    head = ("problem class", *device, "default", "ms", "best", "ms", "TFLOP/s")
    head += ("speed-up", "spread", "times")
    aligned = ("ms", "TFLOP/s", "speed-up", "spread")
    numbers = [i for i, name in enumerate(head) if name in aligned]
    rows = [
        row(
            tag("a", result.problem, href=f"#result-{number}"),
            *([result.device] if device else []),
            tag("code", result.default.config),
            format_time(result, result.default),
            tag("code", result.best.config) if result.winner else "none",
            format_time(result, result.best) if result.winner else "-",
            format_speed(result, result.best),
            format_speedup(result.speedup),
            format_share(result.spread),
            result.origin,
            numbers=numbers,
            classes={0: "class"},
        )
        for number, result in enumerate(results, 1)
    ]
    return table(head, rows, numbers)


def tried(result: Result) -> Markup:
    """All records by time, those without one at the end in order of trial."""
    records = sorted(result.records, key=lambda record: result.time_ms(record) or float("inf"))
    rows, winner = [], result.winner
    for record in records:
        resources = record.resources
        failed = record.outcome in FAILURES
        compiled = ("-", "-", "-")
        if resources is not None:
            smem = f"{resources.smem_bytes / 1024:.1f}"
            compiled = (resources.registers, smem, resources.blocks_per_sm)
        rows.append(
            row(
                tag("code", record.config),
                tag("span", record.outcome.replace("_", " "), class_="failed" if failed else None),
                "-" if failed else format_ms(record.median_ms),
                "-" if failed else format_share(record.spread),
                format_ms(record.predicted_ms),
                format_speed(result, record),
                *compiled,
                numbers=range(2, 9),
                class_="best" if winner and record.config == winner.config else None,
            )
        )
    head = (
        "config",
        "outcome",
        "measured, ms",
        "spread",
        "predicted, ms",
        "TFLOP/s",
        "registers",
        "shared, KB",
        "blocks/SM",
    )
    return table(head, rows, numbers=range(2, 9))


def switches(result: Result) -> Markup | None:
    """The switches of configs, each with its best time on and off; None if there are none.

    The other parameters may differ, too.
    """
    rows = []
    for name, (off, on) in best_by_switch(result).items():
        gain = format_speedup(result.time_ms(off) / result.time_ms(on))
        cells = [x for each in (off, on) for x in (format_time(result, each), each.config)]
        cells[1::2] = [tag("code", config) for config in cells[1::2]]
        rows.append(row(tag("code", name), *cells, gain, numbers=(1, 3, 5)))
    head = ("switch", "off, ms", "best config without", "on, ms", "best config with", "on/off")
    return table(head, rows, numbers=(1, 3, 5)) if rows else None


def best_by_switch(result: Result) -> dict[str, tuple[Record, Record]]:
    """Parameter that is on or off -> (the best record without it, the best with it)."""
    found: dict[str, dict[bool, Record]] = {}
    for record in result.records:
        if record.outcome in FAILURES or result.time_ms(record) is None:
            continue
        for name, value in parameters(result.problem.family, record.config).items():
            if isinstance(value, bool):
                best = found.setdefault(name, {}).get(value)
                if best is None or result.time_ms(record) < result.time_ms(best):
                    found[name][value] = record
    return {name: (by[False], by[True]) for name, by in found.items() if len(by) == 2}


def pruned(result: Result) -> Markup:
    """Configs that each constraint removed before compiling: the number, and one reason."""
    ordered = sorted(result.pruned.items(), key=lambda item: (-item[1], item[0]))
    rows = []
    for name, count in ordered:
        share = f"{count / result.space_size:.1%}" if result.space_size else "-"
        why = result.pruned_examples.get(name, "")
        rows.append(row(name, count, share, why, numbers=(1, 2), classes={3: "reason"}))
    header = ("constraint", "configs", "of the space", "for example")
    return table(header, rows, numbers=(1, 2))


def failures(result: Result) -> Markup:
    """The failed, grouped by outcome and reason, with one of each group as its example."""
    rows = [
        row(
            tag("span", outcome.replace("_", " "), class_="failed"),
            len(records),
            records[0].reason or "no reason given",
            tag("code", records[0].config),
            numbers=(1,),
            classes={2: "reason"},
        )
        for outcome, records in failure_groups(result.records)
    ]
    return table(("outcome", "configs", "reason (of the example)", "example"), rows, numbers=(1,))


def failure_groups(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Failed records by outcome and reason, most frequent first.

    Reasons that differ only in numbers are one.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.outcome in FAILURES:
            reason = _NUMBER.sub("#", record.reason)
            groups.setdefault((record.outcome, reason), []).append(record)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return [(outcome, members) for (outcome, _), members in ordered]


def format_time(result: Result, record: Record) -> str:
    """Milliseconds as they compare in the result, marked by ~ if predicted; or "failed"."""
    if record.outcome in FAILURES:
        return "failed"
    time = result.time_ms(record)
    mark = "~" if time is not None and result.origin == "predicted" else ""
    return mark + format_ms(time)


def format_speed(result: Result, record: Record) -> str:
    """TFLOP/s of the same time, marked by ~ if predicted; a dash if there are none."""
    speed = result.tflops(record)
    if speed is None:
        return "-"
    mark = "~" if result.origin == "predicted" else ""
    return mark + (f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}")


def format_speedup(speedup: float | None) -> str:
    """As in 1.25x; a dash if unknown."""
    return "-" if speedup is None else f"{speedup:.2f}x"


def format_share(share: float | None) -> str:
    """In percent; a dash if unknown."""
    return "-" if share is None else f"{share:.1%}"
