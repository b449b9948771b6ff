"""Blocks over the machine in time, by the model: which slot runs which walk, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...model.clocks import BlockClocks
from ...model.dispatch import Schedule, dispatched
from ..asked import Asked, Kernel, NotShownError
from ..numbers import Number
from .laid import clocks_of, laid, places_of

QUARTERS = 4
"""Walks are told apart by the quarter of the longest that they reach."""
MOST_DRAWN = 1600
"""Rectangles; of more, every so many-th lane is drawn."""
_MOST_LANES = 230
_CURVE_POINTS = 240


@dataclass(frozen=True)
class ScheduleFacts:
    """The blocks of a kernel over the machine.

    Attributes:
        persistent: whether a block takes one tile of rows after another.
        draws: whether that is the next one that nobody has; else they are dealt out.
        blocks, places: of the launch, and the walks that they do.
        sms, resident, slots: multiprocessors, blocks that share one, and their product.
        drawn: (lane, start, end, tiles, quarter) of walks, an array each; start and end in
            microseconds. Lane slot * sms + SM; quarter 0 has the longest walks.
        every: lanes that a drawn one stands for.
        quarters: of each quarter the fewest and the most tiles.
        curve: (microseconds, mean share of slots at work until the next), an array each.
        first_idle: when the first slot has nothing left to do.
        finish: when the last block ends.
        busy, tail: shares of all slots' time until then: at work, and idle after `first_idle`.
        opposite: how much longer it would take from the shortest walk to the longest, a share;
            None where the order is no choice.
        predicted: the model's time for the kernel.
        notes: what the model of this schedule leaves out.
    """

    persistent: bool
    draws: bool
    blocks: Number
    places: Number
    sms: Number
    resident: Number
    slots: Number
    drawn: Sequence[np.ndarray]
    every: int
    quarters: Sequence[tuple[int, int]]
    curve: tuple[np.ndarray, np.ndarray]
    first_idle: Number
    finish: Number
    busy: Number
    tail: Number
    opposite: Number | None
    predicted: Number | None
    notes: Sequence[str]


def find(asked: Asked, kernel: Kernel) -> ScheduleFacts:
    """The facts of a kernel's schedule.

    Raises:
        NotShownError: there is nothing to do, or the model knows no clocks of the kernel.
    """
    found = laid(asked, kernel)
    at, tiles = places_of(found, asked.problem.num_heads_q)
    if not tiles.any():
        raise NotShownError("no block has anything to do, so no time passes")
    clocks, sms, opposite = clocks_of(asked, kernel, found), asked.machine.num_sms, None
    if not clocks.persistent:
        tiles = np.bincount(at.block, tiles).astype(np.int64)
    slots = sms * clocks.resident
    spans = _played(tiles, clocks, sms)
    if not clocks.persistent and len(tiles) > slots and tiles.min() < tiles.max():
        worst = dispatched(np.sort(tiles), clocks.place, sms, clocks.resident)
        opposite = Number(worst.clocks / float(spans.end.max()) - 1, "model")
    notes = list(found.notes)
    if kernel.problem.family == "backward":
        notes.append("blocks that add to one dQ also wait for their turn, which is left out here")
    spans = spans.scaled(1 / asked.machine.clock_mhz)
    predicted = None
    if kernel.prediction is not None:
        predicted = Number(kernel.prediction.ms * 1e3, "model", "µs")
    every = max(1, -(-len(spans.lane) // MOST_DRAWN), -(-slots // _MOST_LANES))
    first_idle, finish, busy, tail = _shares(spans, slots)
    drawn, quarters = _drawn(spans, every)
    return ScheduleFacts(
        persistent=clocks.persistent,
        draws=clocks.drawn,
        blocks=Number(min(slots, len(tiles)) if clocks.persistent else len(tiles), "counted"),
        places=Number(len(tiles), "counted"),
        sms=Number(sms, "counted"),
        resident=Number(clocks.resident, "model" if kernel.report is None else "machine code"),
        slots=Number(slots, "counted"),
        drawn=drawn,
        every=every,
        quarters=quarters,
        curve=_curve(spans, slots),
        first_idle=Number(first_idle, "model", "µs"),
        finish=Number(finish, "model", "µs"),
        busy=Number(busy, "model"),
        tail=Number(tail, "model"),
        opposite=opposite,
        predicted=predicted,
        notes=notes,
    )


class _Spans(NamedTuple):
    """Walks in time, an array each; one may stand for many that follow each other."""

    lane: np.ndarray
    start: np.ndarray
    end: np.ndarray
    tiles: np.ndarray

    def scaled(self, factor: float) -> "_Spans":
        return self._replace(start=self.start * factor, end=self.end * factor)


def _played(tiles: np.ndarray, clocks: BlockClocks, sms: int) -> _Spans:
    """The walks in time. Of very many blocks those between the first and last waves are one."""
    found = clocks.played(tiles, sms)
    spans = _Spans(found.slot * sms + found.sm, found.start, found.end, tiles[found.number])
    return spans if len(found.number) == len(tiles) else _joined(spans, found, tiles)


def _joined(spans: _Spans, found: Schedule, tiles: np.ndarray) -> _Spans:
    """With a span in each lane for the walks that were not played."""
    gap = int(np.argmax(np.diff(found.number)))
    last, slots = found.number > found.number[gap], int(spans.lane.max()) + 1
    begin, end = np.zeros(slots), np.full(slots, spans.end.max())
    np.maximum.at(begin, spans.lane[~last], spans.end[~last])
    np.minimum.at(end, spans.lane[last], spans.start[last])
    mean = tiles[found.number[gap] + 1 : found.number[gap + 1]].mean()
    between = _Spans(np.arange(slots), begin, end, np.full(slots, round(float(mean))))
    return _Spans(*(np.concatenate(pair) for pair in zip(spans, between, strict=True)))


def _shares(spans: _Spans, slots: int) -> tuple[float, float, float, float]:
    """(end of the first idle slot, of all), and the shares of the time at work and in the tail."""
    last = np.zeros(slots)
    np.maximum.at(last, spans.lane, spans.end)
    finish, work = float(spans.end.max()), float((spans.end - spans.start).sum())
    tail = float((finish - last).sum()) / slots / finish
    return float(last.min()), finish, work / slots / finish, tail


def _drawn(spans: _Spans, every: int) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    most = max(1, int(spans.tiles.max()))
    quarter = np.minimum(QUARTERS - 1, (QUARTERS * (1 - spans.tiles / most)).astype(int))
    of_quarters = [spans.tiles[quarter == n] for n in range(QUARTERS)]
    ends = [(int(x.min()), int(x.max())) if len(x) else (0, 0) for x in of_quarters]
    kept = spans.lane % every == 0
    columns = spans.lane, spans.start, spans.end, spans.tiles, quarter
    return [each[kept] for each in columns], ends


def _curve(spans: _Spans, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean share of slots at work in each of many short times of one length."""
    times, place = np.unique(np.concatenate([spans.start, spans.end]), return_inverse=True)
    change = np.zeros(len(times))
    np.add.at(change, place, np.repeat([1, -1], len(spans.start)))
    worked = np.concatenate([[0.0], (change.cumsum()[:-1] * np.diff(times)).cumsum()])
    ends = np.linspace(0.0, times[-1], _CURVE_POINTS + 1)
    shares = np.diff(np.interp(ends, times, worked)) / np.diff(ends) / slots
    return ends[:-1], np.clip(shares, 0.0, 1.0)
