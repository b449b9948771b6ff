"""The tuner's report: a table for the terminal, and a page that explains it.

The page is one file without scripts and without anything from elsewhere. A time is called measured
only if it was; predicted ones are marked wherever they stand.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from numflash.runtime.files import replace_file
from numflash.runtime.printable import printable

from ..drawing.document import document
from ..drawing.figures import drawn
from ..drawing.markup import Markup, escaped, joined, tag
from ..drawing.tables import folded
from ..records import FAILURES, Record
from ..search.results import Result, format_ms
from . import charts, tables
from .occupancy import occupancy
from .tables import format_share, format_speed, format_speedup, format_time

NO_PAGES: Mapping[int, str] = MappingProxyType({})
"""Of a report without pages beside it."""
_OPEN_ROWS = 40
_PREDICTED = "Predicted by the offline model, not measured."


def table(results: Sequence[Result]) -> str:
    """The end of a run, for a terminal: each problem class with its default and its best config.

    Predicted times begin with ~.
    """
    if not results:
        return "Nothing was tuned."
    head = ("default", "ms", "best", "ms", "speed-up", "spread", "times")
    rows = [head, *(_columns(result) for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines, device = ["  " + _aligned(head, widths)], None
    for result, row in zip(results, rows[1:], strict=True):
        if (result.device, result.num_sms) != device:
            device = result.device, result.num_sms
            lines.append(printable(_device(result)))
        lines += [f"  {result.problem}", "  " + _aligned(row, widths)]
        if result.winner and result.best.reason:
            lines.append(printable(f"    best: {result.best.reason}"))
    if any(result.origin == "predicted" for result in results):
        lines.append(f"~ {_PREDICTED[0].lower()}{_PREDICTED[1:]}")
    return "\n".join(lines)


def write_html(
    path: str | Path, results: Sequence[Result], pages: Mapping[int, str] = NO_PAGES
) -> None:
    """Write the report: one page, complete in itself.

    Args:
        path: the page.
        results: of the run.
        pages: by the place of a result, the address of the page that explains its winner.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(Path(path), page(list(results), pages))


def page(results: list[Result], pages: Mapping[int, str] = NO_PAGES) -> str:
    """The report as HTML; `pages` as for `write_html`."""
    title = "numflash-tune"
    if len(results) == 1:
        title += f": {results[0].problem} on {results[0].device}"
    body: list[object] = [tag("h1", "numflash-tune"), tag("p", _subtitle(results), class_="muted")]
    if len(results) > 1:
        body.append(tables.summary(results))
    for number, result in enumerate(results, 1):
        body.append(_section(number, result, results, pages.get(number - 1)))
    return document(title, *body)


def _section(number: int, result: Result, results: list[Result], explained: str | None) -> Markup:
    figures = [
        charts.history(result),
        charts.heat_map(result),
        charts.importances(result),
        charts.agreement(result),
        *occupancy(result),
        charts.parts(result),
    ]
    tried, failed = len(result.records), tables.failure_groups(result.records)
    figures.sort(key=lambda figure: figure.svg is None)
    alone = len(results) == 1
    contents = [
        tag("h2", result.problem),
        tag("p", _device(result), class_="muted"),
        _facts(result),
        *_link(explained),
        tag("div", *map(drawn, figures), class_="charts"),
        folded(f"Tried: {tried}", _tried(result), alone and tried <= _OPEN_ROWS),
    ]
    if (switches := tables.switches(result)) is not None:
        contents.append(folded("What is on or off", switches, alone))
    if result.pruned:
        removed = sum(result.pruned.values())
        summary = f"Pruned before anything was compiled: {removed:,}"
        if result.space_size:
            summary += f" of {result.space_size:,} in the space"
        contents.append(folded(summary, tables.pruned(result), alone))
    if failed:
        count = sum(len(records) for _, records in failed)
        summary = f"Failed: {count} of {tried} tried"
        contents.append(folded(summary, tables.failures(result), alone))
    return tag("section", *contents, id=f"result-{number}")


def _link(explained: str | None) -> list[Markup]:
    """The way to the page that explains a winner, if there is one."""
    if explained is None:
        return []
    return [tag("p", tag("a", "What the best config does, in pictures", href=explained))]


def _facts(result: Result) -> Markup:
    """The outcome in a few figures."""
    about = "" if result.origin == "measured" else " (predicted)"
    best = result.time_ms(result.best)
    entries = [
        (f"default{about}", _timed(result, result.default), result.default.config),
        (f"best{about}", _timed(result, result.best), result.best.config),
        (f"speed-up{about}", tag("b", format_speedup(result.speedup)), None),
    ]
    if result.default.outcome in FAILURES:
        entries[0] = ("default", tag("b", "failed", class_="failed"), result.default.config)
    if result.winner is None:
        entries[1] = ("best", tag("b", "none", class_="failed"), None)
    if result.winner and result.best.reason:
        entries.append(("why it is the best", result.best.reason, None))
    if result.spread is not None:
        entries.append(("spread of the best", tag("b", format_share(result.spread)), None))
    if result.floor and best:
        reached = f"the best takes {best / result.floor:.2f} times as long"
        entries.append(("floor, by the model", tag("b", f"{format_ms(result.floor)} ms"), reached))
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value, *([" ", _detail(more)] if more else [])))
            for name, value, more in entries
        ),
        class_="facts",
    )


def _timed(result: Result, record: Record) -> Markup:
    """A record's time and speed."""
    time, speed = format_ms(result.time_ms(record)), format_speed(result, record)
    return joined([tag("b", f"{time} ms"), f", {speed} TFLOP/s" if speed != "-" else ""])


def _detail(text: str) -> Markup:
    return tag("span", text, class_="muted") if " " in text else tag("code", text)


def _tried(result: Result) -> Markup:
    counted = "TFLOP/s counts the matrix products of this kernel over scores that no mask hides."
    return joined([tables.tried(result), tag("p", counted, class_="muted")])


def _subtitle(results: list[Result]) -> Markup:
    if not results:
        return escaped("Nothing was tuned.")
    tried = sum(len(result.records) for result in results)
    classes = "1 problem class" if len(results) == 1 else f"{len(results)} problem classes"
    text = f"{classes}, {tried:,} trial" + ("s" if tried != 1 else "")
    finished = max((r.finished for result in results for r in result.records), default=0.0)
    if finished:
        text += f", the last of them on {datetime.fromtimestamp(finished, UTC):%Y-%m-%d %H:%M} UTC"
    predicted = sum(result.origin == "predicted" for result in results)
    if not predicted:
        return escaped(text + ".")
    which = (
        "All times are"
        if predicted == len(results)
        else f"Times of {predicted} of the classes are"
    )
    return joined([text + ". ", tag("b", f"{which} {_PREDICTED[0].lower()}{_PREDICTED[1:]}")])


def _device(result: Result) -> str:
    if result.device == result.arch:
        return f"{result.device}, {result.num_sms} SMs"
    return f"{result.device} ({result.arch}, {result.num_sms} SMs)"


def _columns(result: Result) -> tuple[str, ...]:
    return (
        result.default.config,
        format_time(result, result.default),
        result.best.config if result.winner else "none",
        format_time(result, result.best) if result.winner else "-",
        format_speedup(result.speedup),
        format_share(result.spread),
        result.origin,
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of the table; configs and words to the left, numbers to the right."""
    aligned = [
        printable(cell).ljust(width) if i in (0, 2, 6) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  " + "  ".join(aligned).rstrip()
