"""Progress of a run of the tuner.

On a terminal it is one line, redrawn in place; elsewhere (the log of a CI job) a plain line now
and then. A stream that can no longer be written to stops the display, never the run.
"""

import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

from numflash.runtime.printable import printable

from ..records import FAILURES, OUTCOMES, Record
from .results import format_ms

REDRAW_SECONDS = 0.1
LINE_SECONDS = 10.0
"""Between redraws on a terminal, and between lines elsewhere."""
_BAR_WIDTHS = (24, 12, 0)
_CLEAR = "\r\x1b[K"
_STYLES = {"done": "36", "left": "2", "best": "1", "failed": "33", "": ""}
_Piece = tuple[str, str]


class Progress:
    """A context manager that shows a run: `with Progress(120, "forward ...") as progress`."""

    def __init__(
        self,
        total: int | None,
        title: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        time_budget: float | None = None,
        earlier: Iterable[Record] = (),
        quiet: bool = False,
    ):
        """Nothing is shown before the context is entered.

        Args:
            total: trials of the whole run, earlier ones included; None if only time limits it.
            title: of the run.
            stream: where to show it; `sys.stderr` if None.
            clock: seconds, for the time elapsed and left.
            time_budget: seconds after which the run ends; None if only trials limit it.
            earlier: records of trials that a run before this one made: they count as done, but
                not for the pace.
            quiet: show nothing at all.
        """
        self._total, self._title = total, printable(title)
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._time_budget = clock, time_budget
        self._terminal = _is_terminal(self._stream)
        self._color = self._terminal and not os.environ.get("NO_COLOR")
        self._fill = _encodable("━─", self._stream, "#-")
        self._counts: Counter[str] = Counter()
        self._fastest: Record | None = None
        self._best: Record | None = None
        self._started, self._shown, self._broken = clock(), None, quiet
        for record in earlier:
            self._count(record)
        self._earlier = self._counts.total()

    def __enter__(self) -> "Progress":
        self._started = self._clock()
        self.refresh()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pieces = self._pieces(0)
        if kind is not None:
            stopped = "interrupted" if issubclass(kind, KeyboardInterrupt) else "stopped"
            pieces.append((stopped, "failed"))
        self._write((_CLEAR if self._terminal else "") + self._join(pieces) + "\n")

    def update(self, record: Record) -> None:
        """One more trial is done."""
        self._count(record)
        self.refresh()

    def name_best(self, record: Record) -> None:
        """The search is over, and this is the best: the last line shows it."""
        self._best = record

    def refresh(self) -> None:
        """Show the time that has passed; for loops that wait. Cheap if called often."""
        now = self._clock()
        wait = REDRAW_SECONDS if self._terminal else LINE_SECONDS
        if self._shown is None and not self._terminal:
            self._shown = now
        if self._shown is None or now - self._shown >= wait:
            self._shown = now
            self._draw()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        lines = "".join(printable(line) + "\n" for line in text.splitlines() or [""])
        self._write((_CLEAR if self._terminal else "") + lines)
        if self._terminal:
            self._draw()

    @property
    def done(self) -> int:
        """Trials done, earlier ones included."""
        return self._counts.total()

    def seconds_left(self) -> float | None:
        """Until trials or time run out at this pace, whichever is first; None if unknown."""
        elapsed = self._clock() - self._started
        candidates = []
        if self._time_budget is not None:
            candidates.append(self._time_budget - elapsed)
        new = self.done - self._earlier
        if self._total is not None and (new or self.done >= self._total):
            candidates.append((self._total - self.done) * elapsed / max(new, 1))
        return max(0.0, min(candidates)) if candidates else None

    def _count(self, record: Record) -> None:
        self._counts[record.outcome] += 1
        # A measured time beats every predicted one: they do not compare. An estimate is no result.
        if record.outcome not in (*FAILURES, "estimated") and (
            self._fastest is None or _rank(record) < _rank(self._fastest)
        ):
            self._fastest = record

    def _draw(self) -> None:
        if not self._terminal:
            self._write(self._join(self._pieces(0)) + "\n")
            return
        room = _columns(self._stream) - 1
        # The first form that fits is shown; the last one is cut.
        for dropped in ((), ("title",), ("title", "counts"), ("title", "counts", "config")):
            for bar_width in _BAR_WIDTHS:
                pieces = self._pieces(bar_width, dropped)
                if _width("  ".join(text for text, _ in pieces)) <= room:
                    self._write(_CLEAR + self._join(pieces))
                    return
        self._write(_CLEAR + _cut("  ".join(text for text, _ in pieces), room))

    def _pieces(self, bar_width: int, dropped: tuple[str, ...] = ()) -> list[_Piece]:
        """The shown pieces, as (text, style); `_draw` leaves out those that have no room."""
        pieces: list[_Piece] = [] if "title" in dropped else [(self._title, "")]
        if bar_width:
            share = self._share()
            full = min(bar_width, int(share * bar_width))
            pieces.append((self._fill[0] * full + self._fill[1] * (bar_width - full), "done"))
        pieces.append(
            (f"{self.done}" if self._total is None else f"{self.done}/{self._total}", "")
        )
        # The best is decided at the end; until then there is a fastest.
        if (record := self._best or self._fastest) is not None:
            about = "" if record.median_ms is not None else "predicted "
            text = f"{'best' if self._best else 'fastest'} {about}{format_ms(record.time_ms)} ms"
            pieces.append(
                (text if "config" in dropped else f"{text} {printable(record.config)}", "best")
            )
        if "counts" not in dropped:
            for outcome in OUTCOMES:
                if count := self._counts[outcome]:
                    style = "failed" if outcome in FAILURES else ""
                    pieces.append((f"{count} {outcome.replace('_', ' ')}", style))
        times = format_duration(self._clock() - self._started)
        if (left := self.seconds_left()) is not None and left:
            times += f", {format_duration(left)} left"
        pieces.append((times, "left"))
        return pieces

    def _share(self) -> float:
        """The share of the run that is over, by trials or by time: the larger of both."""
        shares = [0.0]
        if self._total:
            shares.append(self.done / self._total)
        if self._time_budget:
            shares.append((self._clock() - self._started) / self._time_budget)
        return min(1.0, max(shares))

    def _join(self, pieces: list[_Piece]) -> str:
        if not self._color:
            return "  ".join(text for text, _ in pieces)
        return "  ".join(
            f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style else text for text, style in pieces
        )

    def _write(self, text: str) -> None:
        if self._broken:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            self._broken = True


def _rank(record: Record) -> tuple[bool, float]:
    return record.median_ms is None, record.time_ms


def format_duration(seconds: float) -> str:
    """Minutes and seconds, 3:07; with hours, 1:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _columns(stream: TextIO) -> int:
    """Width of the terminal: COLUMNS if set, else as the system says, else 80."""
    if (columns := os.environ.get("COLUMNS", "")).isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _encodable(text: str, stream: TextIO, otherwise: str) -> str:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return otherwise
    return text


def _cell_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _width(text: str) -> int:
    return sum(map(_cell_width, text))


def _cut(text: str, room: int) -> str:
    """As much of a text as fits."""
    while _width(text) > max(0, room):
        text = text[:-1]
    return text
