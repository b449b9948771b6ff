"""The clock of an SM, its units, and the spans of what it does.

Units work in order: who asks first is served first. Products and exponentials are asked for in
steps of equal length, so that roles that ask at once share a unit fairly.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

from .timeline import Span

_STEP = 32.0
"""Clocks of a unit that are asked for at once: a `wgmma` of 64 x 64 x 16."""
Process = Iterator["float | Event"]
"""What goes on at a time that it yields, or once an event that it yields has happened."""


class Event:
    """Something that happens once; `at` says when, and is None before."""

    def __init__(self):
        self.at: float | None = None
        self.waiting: list[Process] = []


class Clock:
    """The clock, the units and the spans of an SM."""

    def __init__(self):
        self.now, self.spans = 0.0, defaultdict(list)
        self._queue, self._number = [], 0
        self._free: dict[str, float] = defaultdict(float)

    def begin(self, process: Process, at: float | None = None) -> None:
        """Let a process go on, at once or at a time."""
        self._number += 1
        heapq.heappush(self._queue, (self.now if at is None else at, self._number, process))

    def later(self, at: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        self.begin(_do(action), at)

    def fire(self, event: Event) -> None:
        """An event happens, and who waits for it goes on."""
        event.at = self.now
        for process in event.waiting:
            self.begin(process)

    def run(self) -> None:
        """Until nothing is left that can happen."""
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            for wanted in process:
                if isinstance(wanted, Event):
                    if wanted.at is None:
                        wanted.waiting.append(process)
                        break
                elif wanted > self.now:
                    self.begin(process, wanted)
                    break

    def use(self, unit: str, clocks: float, kind: str, label: str, owner: str) -> float:
        """Ask a unit for work; when it will be done."""
        start = max(self.now, self._free[unit])
        self._free[unit] = start + clocks
        self.note(Span(unit, start, start + clocks, kind, label, owner))
        return start + clocks

    def note(self, span: Span) -> None:
        """Keep a span, or add it to the one before it that it continues."""
        if span.end <= span.start:
            return
        spans = self.spans[span.lane]
        if spans and _continues(spans[-1], span):
            span = replace(span, start=spans.pop().start)
        spans.append(span)


def _do(action: Callable[[], None]) -> Process:
    action()
    yield from ()


def steps_of(clocks: float) -> list[float]:
    """The clocks of each step of so many."""
    count = max(1, round(clocks / _STEP))
    return [clocks / count] * count


def _continues(last: Span, span: Span) -> bool:
    same = (last.kind, last.label, last.owner) == (span.kind, span.label, span.owner)
    return same and span.start <= last.end
